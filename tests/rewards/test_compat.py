"""The torchvision shim. An import works or fails once a process: real ones run in one of their own."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from types import SimpleNamespace

import pytest

from rewards import compat

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

from rewards.compat import ensure_torchvision
assert ensure_torchvision() is broken
assert ensure_torchvision() is broken
import torchvision, gc
gc.collect()

import torch
assert torch.ops.torchvision.nms.default is not None
resized = torchvision.transforms.functional.resize(torch.zeros(3, 8, 8), [4, 4])
assert resized.shape == (3, 4, 4)
"""

LIBRARIES = """
import sys
from rewards.compat import ensure_torchvision
ensure_torchvision()
assert "difrl" not in sys.modules
import open_clip
from diffusers import StableDiffusion3Pipeline
from transformers import CLIPImageProcessor
assert "ViT-H-14" in open_clip.list_models()
assert StableDiffusion3Pipeline.__name__ == "StableDiffusion3Pipeline"
assert CLIPImageProcessor().size
"""


def run(source: str) -> None:
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@needs_torchvision
def test_mends_an_import_that_has_already_failed_and_is_idempotent() -> None:
    run(IMPORTS_AFTER_A_FAILURE)


@needs_torchvision
def test_libraries_that_need_torchvision_import() -> None:
    run(LIBRARIES)


def pretend(monkeypatch: pytest.MonkeyPatch, spec: object, error: Exception | None = None) -> None:
    def import_module(name: str) -> None:
        if error is not None:
            raise error

    stub = SimpleNamespace(util=SimpleNamespace(find_spec=lambda name: spec), import_module=import_module)
    monkeypatch.setattr(compat, "_library", None)
    monkeypatch.setattr(compat, "importlib", stub)


def test_nothing_is_declared_without_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, spec=None)
    assert compat.ensure_torchvision() is False
    assert compat._library is None


def test_nothing_is_declared_where_the_operators_load(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, spec="found")
    assert compat.ensure_torchvision() is False
    assert compat._library is None


@pytest.mark.parametrize("error", [RuntimeError("CUDA version mismatch"), ImportError("a broken install")])
def test_other_failures_are_not_hidden(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    pretend(monkeypatch, spec="found", error=error)
    with pytest.raises(type(error), match=str(error)):
        compat.ensure_torchvision()
    assert compat._library is None
