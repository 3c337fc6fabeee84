"""Distance to a reference along a run: by hand, and without evaluating anything twice."""

from __future__ import annotations

import pytest
import torch

from samplers import Condition, Counting, Distance, Remembering, reinforcement_learning

X = torch.arange(6.0).reshape(2, 3)
CONDITION = Condition({"none": torch.zeros(2, 0)})


def constant(value):
    return Counting(lambda x_t, t, condition: torch.full_like(x_t, value) * t[:, None].float())


def run(denoiser, times=(1.0, 0.5)):
    for t in times:
        denoiser(X, torch.tensor([t, t / 2]), CONDITION)


@pytest.mark.parametrize(
    ("weight", "evaluations"), [(0.0, (4, 0, 0)), (1.0, (0, 4, 4)), (1.5, (4, 4, 0))], ids=lambda v: str(v)
)
def test_rlg_moves_by_w_times_the_difference(weight, evaluations):
    """Base t, tuned 3 t: ‖out − base‖² = (2 w t)², at t = 1 and 0.5 for the first sample, half of it for the second."""
    base, tuned, other = constant(1.0), constant(3.0), constant(1.0)
    remembered = Remembering(base)
    measured = Distance(reinforcement_learning(remembered, tuned, weight), other, remembered)
    run(measured)
    expected = 4 * weight**2 * (1 + 0.25) / 2
    assert measured.means(2).tolist() == pytest.approx([expected, expected / 4])
    # The blend's own base is not evaluated again; without one, there is one more evaluation a state.
    assert (base.evaluations, tuned.evaluations, other.evaluations) == evaluations


def test_half_precision_is_raised_before_subtracting():
    """256 - 0.5 is 256 in bfloat16."""
    base, tuned = (lambda x_t, t, condition, v=v: torch.full_like(x_t, v).bfloat16() for v in (0.5, 256.0))
    measured = Distance(tuned, base, Remembering(base))
    run(measured, (1.0,))
    assert measured.means(2).tolist() == [255.5**2] * 2


def test_rows_assign_states_to_samples():
    base, tuned = constant(1.0), constant(3.0)
    measured = Distance(tuned, base, Remembering(base))
    measured(X[1:], torch.ones(1), CONDITION.numbered().select([1]))
    found = measured.means(2)
    assert found[0].isnan()
    assert found[1] == 4.0
