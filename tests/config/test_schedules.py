"""Schedules without a length of their own end with the run."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from difrl.config import CosineSchedule, LinearSchedule
from difrl.config.schema.schedules import RampSchedule


def values(schedule: RampSchedule, total: int) -> list[float]:
    coefficient = schedule.build(total)
    return [coefficient.value(step) for step in range(total)]


def test_the_last_step_has_the_end_value_by_hand() -> None:
    """u = (n − warmup − hold) / (total − warmup − hold − 1)."""
    cosine = CosineSchedule(kind="cosine", start=1e-3, end=0.0, warmup=1)
    assert values(cosine, 5) == pytest.approx([1e-3, 1e-3, 7.5e-4, 2.5e-4, 0.0], abs=1e-18)  # u = 0, 1/3, 2/3, 1
    linear = LinearSchedule(kind="linear", start=1.0, end=0.25, hold=2)
    assert values(linear, 6) == pytest.approx([1.0, 1.0, 1.0, 0.75, 0.5, 0.25])
    both = LinearSchedule(kind="linear", start=2.0, end=0.0, warmup=2, hold=1)
    assert values(both, 8) == pytest.approx([1.0, 2.0, 2.0, 2.0, 1.5, 1.0, 0.5, 0.0])


def test_without_warmup_and_hold_the_step_after_the_run_has_it() -> None:
    linear = LinearSchedule(kind="linear", start=4e-4, end=1e-4)
    assert values(linear, 3) == pytest.approx([4e-4, 3e-4, 2e-4])
    assert linear.build(3).value(3) == pytest.approx(1e-4)


def test_a_given_length_is_kept() -> None:
    linear = LinearSchedule(kind="linear", start=1.0, end=0.0, steps=2, warmup=1)
    assert values(linear, 6) == pytest.approx([1.0, 1.0, 0.5, 0.0, 0.0, 0.0])


@given(st.sampled_from(["linear", "cosine"]), st.integers(0, 20), st.integers(0, 20), st.integers(2, 50))
def test_every_shape_ends_at_its_end(kind: str, warmup: int, hold: int, ramp: int) -> None:
    if warmup + hold == 0:
        return
    section = {"linear": LinearSchedule, "cosine": CosineSchedule}[kind]
    schedule = section.model_validate({"kind": kind, "start": 0.7, "end": 0.1, "warmup": warmup, "hold": hold})
    found = values(schedule, warmup + hold + ramp)
    assert found[-1] == pytest.approx(0.1)
    assert found[warmup + hold] == pytest.approx(0.7)
    assert min(found[warmup:-1], default=1.0) > 0.1


@pytest.mark.parametrize("total", [1, 2, 3, 4])
def test_a_run_that_is_shorter_than_the_warmup_is_possible(total: int) -> None:
    linear = LinearSchedule(kind="linear", start=1.0, end=0.0, warmup=4)
    assert values(linear, total) == pytest.approx([0.25, 0.5, 0.75, 1.0][:total])
