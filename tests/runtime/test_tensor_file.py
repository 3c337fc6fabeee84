"""Files of tensors: the bytes are those of safetensors itself."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from difrl.runtime.tensor_file import DTYPES, TensorSpec, write_tensors

NAMES = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=6)
SHAPES = st.lists(st.integers(0, 3), max_size=3).map(tuple)


def write(path: Path, tensors: dict[str, torch.Tensor]) -> str:
    specs = sorted((TensorSpec.of(name, tensor) for name, tensor in tensors.items()), key=lambda spec: spec.place)
    return write_tensors(path, specs, (tensors[spec.name] for spec in specs))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("files")


@given(st.dictionaries(NAMES.filter(lambda n: n != "__metadata__"), st.tuples(st.sampled_from(list(DTYPES)), SHAPES)))
def test_the_bytes_are_those_of_safetensors(
    folder: Path, chosen: dict[str, tuple[torch.dtype, tuple[int, ...]]]
) -> None:
    tensors = {}
    for name, (dtype, shape) in chosen.items():
        tensors[name] = (100 * torch.rand(shape)).to(dtype)
    save_file(tensors, folder / "expected")
    digest = write(folder / "found", tensors)
    content = (folder / "found").read_bytes()
    assert content == (folder / "expected").read_bytes()
    assert digest == hashlib.sha256(content).hexdigest()


def test_tensors_that_are_no_plain_block_of_memory_are_written_whole(tmp_path: Path) -> None:
    tensors = {"t": torch.arange(6.0).view(2, 3).T, "row": torch.arange(6.0).view(2, 3)[1], "zero": torch.tensor(3)}
    write(tmp_path / "file", tensors)
    found = load_file(tmp_path / "file")
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_another_tensor_than_the_header_describes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        write_tensors(tmp_path / "file", [TensorSpec("x", torch.float32, (2,))], [torch.zeros(3)])
