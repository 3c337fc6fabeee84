"""A policy small enough to write down, which fills every field of the record."""

from __future__ import annotations

import pytest

from tests.fakes import FakePolicy


@pytest.fixture
def fake_policy() -> type[FakePolicy]:
    return FakePolicy
