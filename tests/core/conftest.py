"""A policy small enough to write down, whose likelihoods have every term."""

from __future__ import annotations

import pytest

from tests.fakes import FakePolicy


@pytest.fixture
def fake_policy() -> type[FakePolicy]:
    return FakePolicy
