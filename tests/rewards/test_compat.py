"""The torchvision hook. An import works or fails once a process: real ones run in one of their own."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

needs_torchvision = pytest.mark.skipif(
    importlib.util.find_spec("torchvision") is None, reason="torchvision is not installed"
)

IMPORTS_AFTER_A_FAILURE = """
try:
    import torchvision
    broken = False
except RuntimeError as error:
    assert "torchvision::nms" in str(error), error
    broken = True

from rewards import compat
compat.install_torchvision_hook()
compat.install_torchvision_hook()
import torchvision, gc
gc.collect()
assert (compat._hook.library is not None) is broken

import torch
assert torch.ops.torchvision.nms.default is not None
resized = torchvision.transforms.functional.resize(torch.zeros(3, 8, 8), [4, 4])
assert resized.shape == (3, 4, 4)
"""

LIBRARIES = """
import sys
import rewards
assert "difrl" not in sys.modules and "torch" not in sys.modules
import open_clip
from diffusers import StableDiffusion3Pipeline
from transformers import CLIPImageProcessor
assert "ViT-H-14" in open_clip.list_models()
assert StableDiffusion3Pipeline.__name__ == "StableDiffusion3Pipeline"
assert CLIPImageProcessor().size
"""

HIDDEN = """
import sys
sys.modules["torchvision"] = None  # as if it were not installed
from rewards import compat
try:
    import torchvision
except ModuleNotFoundError:
    pass
else:
    raise AssertionError
assert compat._hook.library is None and "torch" not in sys.modules
"""

OPERATORS_LOAD = """
from rewards import compat
import torchvision
assert torchvision.nms == "attached" and compat._hook.library is None
"""

LOADS = """
import torch
library = torch.library.Library("torchvision", "DEF")
library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""

ATTACHES = """
import torch
torch.library.register_fake("torchvision::nms")(lambda dets, scores, iou_threshold: dets)
"""


def run(source: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run the source in a process of its own, with the modules of `folder` in front of installed ones."""
    first = "" if folder is None else f"import sys; sys.path.insert(0, {str(folder)!r})\n"
    return subprocess.run([sys.executable, "-c", first + source], capture_output=True, text=True, timeout=300)


def passes(source: str, folder: Path | None = None) -> None:
    done = run(source, folder)
    assert done.returncode == 0, done.stderr


def write_torchvision(folder: Path, extension: str = "", registrations: str = ATTACHES) -> Path:
    """Write a package that registers code for an operator as torchvision does, after its compiled part."""
    (folder / "torchvision").mkdir()
    (folder / "torchvision/extension.py").write_text(extension)
    (folder / "torchvision/_meta_registrations.py").write_text(registrations)
    (folder / "torchvision/__init__.py").write_text(
        "from . import extension\nfrom torchvision import _meta_registrations\nnms = 'attached'\n"
    )
    return folder


@needs_torchvision
def test_mends_an_import_that_has_already_failed_and_is_idempotent() -> None:
    passes(IMPORTS_AFTER_A_FAILURE)


@needs_torchvision
def test_libraries_that_need_torchvision_import() -> None:
    passes(LIBRARIES)


def test_nothing_is_declared_without_torchvision() -> None:
    passes(HIDDEN)


def test_nothing_is_declared_where_the_operators_load(tmp_path: Path) -> None:
    passes(OPERATORS_LOAD, write_torchvision(tmp_path, extension=LOADS))


def test_schemas_are_declared_where_the_operators_are_missing(tmp_path: Path) -> None:
    passes("import rewards, torchvision\nassert torchvision.nms == 'attached'", write_torchvision(tmp_path))


@pytest.mark.parametrize("error", ["RuntimeError('CUDA version mismatch')", "ImportError('a broken install')"])
@pytest.mark.parametrize("place", ["extension", "registrations"])
def test_other_failures_are_not_hidden(tmp_path: Path, place: str, error: str) -> None:
    done = run("import rewards, torchvision", write_torchvision(tmp_path, **{place: f"raise {error}"}))
    assert done.returncode == 1
    assert error.split("'")[1] in done.stderr
