"""Predicted steps on several processes, by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from benchmarks.scaling import Hardware, Traffic, count_phases, count_traffic, fit, plan
from difrl.training.cost.estimate import estimate
from tests.recipes import recipe

SLOW = Hardware(flops=1e6, memory=1e6, inside=100.0, between=10.0, score=0.5, machine=2)
NONE = Traffic(gradients=1000, weights=500, reductions=2, rollout=8, references=4, learning=4, shard="none")


def test_two_sizes_of_a_step_give_the_part_that_does_not_divide() -> None:
    """3 s and 2 s a group; a phase that gets shorter by chance has no such part below 0."""
    found = fit({6: {"update": 15.0, "score": 2.0}, 12: {"update": 27.0, "score": 1.0}})
    assert found == {"update": (3.0, 2.0), "score": (1.0, 0.0)}


def test_a_ring_sends_gradients_twice_and_gathered_weights_once() -> None:
    assert NONE.bytes(1) == 0
    assert NONE.bytes(4) == 2 * 3 / 4 * 1000 * 2
    micro = replace(NONE, reductions=4)
    # On 2 processes: 2 micro-batches and 2 passes of references each, of the rollout 4; gradients are reduced each time.
    assert replace(micro, shard="gradients").bytes(2) == 0.5 * (500 * (1 + 2 + 2) + 1000 * 2)
    assert replace(micro, shard="weights").bytes(2) == 0.5 * (500 * (4 + 2 + 2 * 2) + 1000 * 2)


def test_a_step_divides_its_groups_and_waits_for_the_slowest_link() -> None:
    steps = plan({"update": (3.0, 2.0)}, NONE, 8, SLOW, [1, 2, 4])
    assert [step.seconds["update"] for step in steps] == [19.0, 11.0, 7.0]
    assert [step.seconds["network"] for step in steps] == [0.0, 2000 / 100, 3000 / 10]
    assert steps[2].total == 307.0


def test_counts_are_those_of_difrl_check() -> None:
    """4 prompts × 3 samples, 4 steps in batches of 5, 3 decisions each in micro-batches of 7: 2 samples."""
    config = recipe("tiny-sd3", anchors=[{"to": "base", "coefficient": 0.1}])
    found = estimate(config)
    traffic = count_traffic(found, config, "weights", 100)
    assert (traffic.gradients, traffic.weights) == (4 * found.model.trained, 400)
    assert (traffic.rollout, traffic.learning, traffic.references) == (math.ceil(48 / 5), 6, 6)
    phases = count_phases(found, config, SLOW)
    assert phases["rollout"] == (0.0, pytest.approx(12 * 4 * found.model.forward / 1e6 / 4))
    assert phases["score"] == (0.0, 1.5)
    assert phases["update"][1] == pytest.approx((36 * found.model.forward + 36 * found.model.training) / 1e6 / 4)
