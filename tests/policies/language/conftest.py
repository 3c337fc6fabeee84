"""A random model shared by the tests of language policies."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny_models import tiny_lm


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A causal language model of 15 tokens whose head shares its weights with the embedding."""
    return tiny_lm(tmp_path_factory.mktemp("models") / "m", tied=True)
