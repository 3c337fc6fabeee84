from __future__ import annotations

import pytest
import torch

from samplers import (
    Agreement,
    Condition,
    Counting,
    Grid,
    adaptive_classifier_free,
    classifier_free,
    reinforcement_learning,
)
from samplers.guidance import get_rows, with_negatives

X = torch.arange(6.0).reshape(2, 3)
T = torch.tensor([0.5, 0.5])
CONDITION = Condition({"shift": torch.tensor([[1.0], [2.0]])}, {"shift": torch.tensor([[10.0], [20.0]])})


def shifted(x_t, t, condition):
    """Return a sum from which all three inputs can be read."""
    return x_t + condition.tensors["shift"] + t[:, None]


def constant(value):
    return Counting(lambda x_t, t, condition: torch.full_like(x_t, value))


def test_classifier_free_by_hand():
    counted = Counting(shifted)
    found = classifier_free(counted, 3.0)(X, T, CONDITION)
    # negative + 3 (conditional - negative) of the shifts: 10 + 3 (1 - 10) and 20 + 3 (2 - 20)
    torch.testing.assert_close(found, X + 0.5 + torch.tensor([[-17.0], [-34.0]]))
    assert counted.evaluations == 4


def test_classifier_free_edges():
    assert classifier_free(shifted, 1.0) is shifted
    torch.testing.assert_close(classifier_free(shifted, 0.0)(X, T, CONDITION), X + 0.5 + CONDITION.negative["shift"])
    with pytest.raises(ValueError, match="needs the condition's `negative`"):
        classifier_free(shifted, 2.0)(X, T, Condition(CONDITION.tensors))


@pytest.mark.parametrize(
    "build", [classifier_free, lambda one, scale: adaptive_classifier_free(one, scale, Agreement(2))]
)
def test_every_step_of_a_batch_has_the_same_doubled_condition(build):
    """A model can keep what it computes from a condition by its identity."""
    seen = []

    def denoiser(x_t, t, condition):
        seen.append(condition.tensors)
        return shifted(x_t, t, condition)

    condition = CONDITION.numbered()
    for _ in range(3):
        build(denoiser, 3.0)(X, T, condition)
    assert seen[0]["shift"].flatten().tolist() == [10, 20, 1, 2]
    assert all(tensors is seen[0] for tensors in seen)


def test_guidance_blends_in_float32():
    def half(x_t, t, condition):
        return shifted(x_t, t, condition).bfloat16()

    assert classifier_free(half, 3.0)(X, T, CONDITION).dtype == torch.float32
    assert reinforcement_learning(half, half, 2.0)(X, T, CONDITION).dtype == torch.float32


@pytest.mark.parametrize(
    ("weight", "value", "evaluations"), [(0.0, 1.0, (2, 0)), (1.0, 5.0, (0, 2)), (1.5, 7.0, (2, 2))]
)
def test_rlg_weights_and_their_cost(weight, value, evaluations):
    base, tuned = constant(1.0), constant(5.0)
    found = reinforcement_learning(base, tuned, weight)(X, T, CONDITION)
    torch.testing.assert_close(found, torch.full_like(X, value))
    assert (base.evaluations, tuned.evaluations) == evaluations


def test_rlg_first_steps_are_the_tuned_model():
    grid = Grid(torch.linspace(1, 0, 5))
    base, tuned = constant(1.0), constant(5.0)
    guided = reinforcement_learning(base, tuned, 2.0, first_steps=2, grid=grid)
    # A float32 time must not fall on the other side of the switch.
    values = [guided(X, t.float().expand(2), CONDITION)[0, 0].item() for t in grid.times[:-1]]
    assert values == [5.0, 5.0, 9.0, 9.0]
    assert (base.evaluations, tuned.evaluations) == (4, 8)
    # Neither must one that a solver rounded to whole timesteps.
    values = [guided(X, torch.full((2,), t), CONDITION)[0, 0].item() for t in (0.9996, 0.7504, 0.5004, 0.2496)]
    assert values == [5.0, 5.0, 9.0, 9.0]
    mixed = guided(X, torch.tensor([1.0, 0.25]), CONDITION)
    assert mixed[:, 0].tolist() == [5.0, 9.0]
    assert reinforcement_learning(base, tuned, 0.0, first_steps=4, grid=grid) is tuned
    with pytest.raises(ValueError, match="`grid`"):
        reinforcement_learning(base, tuned, 2.0, first_steps=1)
    with pytest.raises(ValueError, match="0 or more"):
        reinforcement_learning(base, tuned, 2.0, first_steps=-1)


def test_guidance_composes():
    """RLG of two guided models is the affine combination of their guided outputs."""

    def doubled(x_t, t, condition):
        return 2 * shifted(x_t, t, condition)

    base, tuned = classifier_free(shifted, 2.0), classifier_free(doubled, 4.0)
    expected = base(X, T, CONDITION) + 1.5 * (tuned(X, T, CONDITION) - base(X, T, CONDITION))
    torch.testing.assert_close(reinforcement_learning(base, tuned, 1.5)(X, T, CONDITION), expected)


def test_condition_rows():
    condition = Condition({"a": torch.arange(3.0)[:, None], "ids": torch.arange(3)}, None)
    assert len(condition) == 3
    assert condition.select(torch.tensor([2, 0])).tensors["ids"].tolist() == [2, 0]
    assert condition.select(torch.tensor([True, False, True])).tensors["ids"].tolist() == [0, 2]
    assert condition.repeat_interleave(2).tensors["ids"].tolist() == [0, 0, 1, 1, 2, 2]
    moved = condition.to("cpu", torch.bfloat16)
    assert (moved.tensors["a"].dtype, moved.tensors["ids"].dtype) == (torch.bfloat16, torch.int64)
    both = Condition.cat([CONDITION, CONDITION.select([1])])
    assert both.tensors["shift"].flatten().tolist() == [1, 2, 2]
    assert both.negative["shift"].flatten().tolist() == [10, 20, 20]


def test_bad_conditions_are_refused():
    with pytest.raises(ValueError, match="same names"):
        Condition({"a": X}, {"b": X})
    with pytest.raises(ValueError, match="one batch size"):
        Condition({"a": X, "b": X[:1]})
    with pytest.raises(ValueError, match="at least one tensor"):
        Condition({})
    with pytest.raises(ValueError, match="1 of 2 conditions have a negative"):
        Condition.cat([CONDITION, Condition(CONDITION.tensors)])
    with pytest.raises(ValueError, match="no conditions"):
        Condition.cat([])


def test_rows_keep_the_number_of_their_sample():
    """Selection and repetition keep the numbers; the doubled batch of guidance counts two for each sample."""
    numbered = CONDITION.numbered()
    assert numbered.rows.tolist() == [0, 1]
    assert numbered.numbered() is numbered
    assert numbered.select([1]).repeat_interleave(2).rows.tolist() == [1, 1]
    counted = Counting(shifted)
    classifier_free(counted, 3.0)(X[1:], T[1:], numbered.select([1]))
    assert counted.per_sample.sums(3).tolist() == [0.0, 2.0, 0.0]
    both = with_negatives(numbered, torch.tensor([1]))
    assert both.tensors["shift"].flatten().tolist() == [20.0, 1.0, 2.0]
    assert get_rows(both).tolist() == [1, 0, 1]
    with pytest.raises(ValueError, match="one batch size"):
        Condition(CONDITION.tensors, rows=torch.arange(3))
