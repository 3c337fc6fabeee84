"""The first-update check against deviations computed by hand."""

from __future__ import annotations

import math

import pytest
import torch

from difrl.policies.logprob_check import ClipRange, Close, FirstUpdateError, check_first_update

MASK = torch.tensor([[True, True], [True, False]])


def test_deviation_is_relative_to_one_plus_the_size() -> None:
    logp = torch.tensor([[0.00002, -3.0001], [99.005, 7.0]], requires_grad=True)
    recorded = torch.tensor([[0.0, -3.0], [99.0, -7.0]])
    # 2e-5 of 1, 1e-4 of 4, 0.005 of 100; the masked 14 of 8 does not count
    assert check_first_update(logp, recorded, MASK, torch.float32) == pytest.approx(5e-5, rel=1e-1)
    with pytest.raises(FirstUpdateError, match=r"1\.75e\+00 of 1 \+ \|ℓ\| \(float error for torch\.float32"):
        check_first_update(logp, recorded, torch.ones_like(MASK), torch.float32)


def test_tolerance_is_that_of_the_precision() -> None:
    logp, recorded = torch.full((1, 1), -1.01), torch.full((1, 1), -1.0)
    mask = torch.ones(1, 1, dtype=torch.bool)
    check_first_update(logp, recorded, mask, torch.bfloat16)
    with pytest.raises(FirstUpdateError):
        check_first_update(logp, recorded, mask, torch.float32)


def test_what_is_not_a_number_never_passes() -> None:
    for value in (math.nan, math.inf):
        with pytest.raises(FirstUpdateError):
            check_first_update(
                torch.full((1, 1), value), torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool), torch.bfloat16
            )


def test_nothing_to_compare_is_no_deviation() -> None:
    assert check_first_update(torch.ones(2, 2), torch.zeros(2, 2), torch.zeros_like(MASK), torch.float32) == 0


def mean_ratio(size: float) -> ClipRange:
    """Return the range of an objective of a sample's mean ratio, as GSPO's."""
    return ClipRange(size, lambda one, other: float((one - other).mean(dim=1).expm1().abs().max()), "Set old.")


@pytest.mark.parametrize(("size", "passes"), [(3e-4, False), (1.0e-3, False), (1.3e-3, True), (0.2, True)])
def test_float_error_may_take_up_a_quarter_of_the_range_at_which_the_objective_clips(size: float, passes: bool) -> None:
    """Two tokens of bfloat16 are off by 2e-4 and 4e-4: the ratio of the sample by 3e-4. The tolerance of a token is 0.02."""
    logp, recorded = torch.tensor([[-0.9998, -1.9996]]), torch.tensor([[-1.0, -2.0]])
    mask = torch.ones(1, 2, dtype=torch.bool)
    if passes:
        check_first_update(logp, recorded, mask, torch.bfloat16, clip_range=mean_ratio(size))
        return
    message = (
        rf"off by 3\.00e-04, and the objective clips at {size:.2e}, of which float error may take up 25%.*Set old\."
    )
    with pytest.raises(FirstUpdateError, match=message):
        check_first_update(logp, recorded, mask, torch.bfloat16, clip_range=mean_ratio(size))


def test_the_search_for_a_cause_uses_the_same_range() -> None:
    """Evaluations agree for the search if they would have passed."""
    seen = list[bool]()

    def diagnose(recorded: torch.Tensor, close: Close) -> str:
        seen.extend(close(recorded + off, recorded) for off in (0.0, 5e-5, 2e-4))
        return "Found: rounding"

    with pytest.raises(FirstUpdateError, match=r"wrong\. Found: rounding\. Set old\."):
        check_first_update(
            torch.full((1, 1), 1e-3),
            torch.zeros(1, 1),
            MASK[:1, :1],
            torch.bfloat16,
            diagnose,
            clip_range=mean_ratio(3e-4),
        )
    assert seen == [True, True, False]
