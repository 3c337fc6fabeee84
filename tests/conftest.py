"""Settings of all tests: no hub, and no accelerator except for tests marked gpu."""

from __future__ import annotations

import os
from pathlib import Path

# Set before transformers or diffusers are imported: a test that reaches for a hub must fail, not download.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["DIFRL_CACHE"] = ""  # a test that needs the cache has its own

import pytest
import torch
from hypothesis import settings

from rewards.compat import install_torchvision_hook

install_torchvision_hook()

# No test asserts a time: a busy machine must not fail an example that is right.
settings.register_profile("difrl", deadline=None)
settings.load_profile("difrl")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(scope="session")
def sd3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random pipeline like the shipped model: no T5, shift 1."""
    from tests.tiny_models import tiny_sd3  # diffusers takes seconds to import, and most tests do without

    return tiny_sd3(tmp_path_factory.mktemp("models") / "sd3")


@pytest.fixture(scope="session")
def lm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random language model over the characters of sums, with a context of 64."""
    from tests.tiny_models import tiny_lm

    return tiny_lm(tmp_path_factory.mktemp("models") / "lm")


@pytest.fixture(scope="session")
def sd35(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random pipeline with the extras of SD3.5: T5, QK norm, dual attention, shift 3."""
    from tests.tiny_models import tiny_sd3

    return tiny_sd3(tmp_path_factory.mktemp("models") / "sd35", like_35=True, shift=3.0)
