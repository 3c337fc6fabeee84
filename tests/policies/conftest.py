"""Random models shared by the tests of policies."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny_models import tiny_lm, tiny_sd3


@pytest.fixture(scope="session")
def sd35(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random pipeline with the extras of SD3.5: T5, QK norm, dual attention, shift 3."""
    return tiny_sd3(tmp_path_factory.mktemp("models") / "sd35", like_35=True, shift=3.0)


@pytest.fixture(scope="session")
def lm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A causal language model of 15 tokens."""
    return tiny_lm(tmp_path_factory.mktemp("models") / "lm")
