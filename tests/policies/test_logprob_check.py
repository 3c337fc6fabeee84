"""The first-update check against deviations computed by hand."""

from __future__ import annotations

import math

import pytest
import torch

from difrl.policies.logprob_check import FirstUpdateError, check_first_update

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
