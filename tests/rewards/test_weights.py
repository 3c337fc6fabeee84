from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rewards.weights import find_file, load_weights, read_tensors

TENSORS = {"weight": torch.arange(3.0)}


def test_a_file_or_a_folder_that_holds_it_is_found(tmp_path: Path) -> None:
    file = tmp_path / "head.pth"
    torch.save(TENSORS, file)
    assert find_file(str(file), "other.pt") == file
    assert find_file(str(tmp_path), "head.pth") == file


def test_errors_name_the_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no head\.pth"):
        find_file(str(tmp_path), "head.pth")
    with pytest.raises(FileNotFoundError, match="there is no file or folder"):
        find_file(str(tmp_path / "missing"), "head.pth")


@pytest.mark.parametrize("content", [TENSORS, {"epoch": 3, "state_dict": TENSORS}])
def test_tensors_of_a_pickle(tmp_path: Path, content: dict[str, object]) -> None:
    torch.save(content, tmp_path / "head.pth")
    assert torch.equal(read_tensors(tmp_path / "head.pth")["weight"], TENSORS["weight"])


def test_tensors_of_safetensors(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "head.safetensors")
    assert torch.equal(read_tensors(tmp_path / "head.safetensors")["weight"], TENSORS["weight"])


class _Code:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.folder),)


def test_code_in_a_pickle_never_runs(tmp_path: Path) -> None:
    torch.save({"weight": _Code(tmp_path / "made")}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="contains code, which is never run"):
        read_tensors(tmp_path / "evil.pt")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("content", [b"", b"text", b"\x80\x02junk", b"PK\x03\x04"])
def test_the_error_of_a_damaged_file_has_no_advice_to_run_it(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "head.pt").write_bytes(content)
    torch.save({"weight": _Code(tmp_path / "made")}, tmp_path / "evil.pt")
    for name in ("head.pt", "evil.pt"):
        with pytest.raises(ValueError, match=r"cannot read .* as tensors alone: it is damaged, or") as caught:
            read_tensors(tmp_path / name)
        assert "weights_only" not in str(caught.value)


def test_something_else_than_tensors_is_refused(tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="is a list, expected tensors by name"):
        read_tensors(tmp_path / "list.pt")


def test_weights_fill_a_module_only_if_all_of_them_fit() -> None:
    layer, source = torch.nn.Linear(2, 1), Path("head.pth")
    load_weights(layer, {"weight": torch.ones(1, 2), "bias": torch.zeros(1)}, source)
    assert layer(torch.tensor([3.0, 4.0])).item() == 7
    with pytest.raises(ValueError, match=r"head\.pth are not those of Linear: missing bias; unexpected a, b, c, … \(4"):
        load_weights(layer, {"weight": torch.ones(1, 2), **{name: torch.ones(1) for name in "abcd"}}, source)
    with pytest.raises(ValueError, match=r"of another shape weight \[2, 1\] instead of \[1, 2\]"):
        load_weights(layer, {"weight": torch.ones(2, 1), "bias": torch.zeros(1)}, source)
    assert layer.weight.tolist() == [[1.0, 1.0]]
