"""Weights of decisions and the weighted mean, by hand."""

from __future__ import annotations

import pytest
import torch

from difrl.core import aggregation_weights, weighted_mean


def test_weighted_mean_by_hand() -> None:
    values = torch.tensor([[1.0, torch.nan], [3.0, 5.0]], requires_grad=True)
    mask = torch.tensor([[True, False], [True, True]])
    total = weighted_mean(values, mask, 3)
    assert total.item() == pytest.approx(3.0)
    total.backward()
    assert values.grad.tolist() == [[pytest.approx(1 / 3), 0.0], [pytest.approx(1 / 3)] * 2]
    with pytest.raises(ValueError, match=r"weights have shape \[2, 1\]"):
        weighted_mean(values, mask[:, :1], 3)


def test_aggregation_by_hand() -> None:
    values = torch.tensor([[2.0, 4.0], [9.0, torch.nan], [torch.nan, torch.nan]])
    mask = ~values.isnan()
    # One of three samples is masked; the longest has two decisions.
    for per, expected in (("decision", (2 + 4 + 9) / 3), ("sample", (3 + 9) / 2), ("length", (2 + 4 + 9) / 4)):
        weights, count = aggregation_weights(mask, per)
        assert weighted_mean(values, weights, count).item() == pytest.approx(expected)
    # J is the number of columns, also where every sample is shorter.
    assert aggregation_weights(torch.tensor([[True, False, False], [True, True, False]]), "length")[1] == 6
    with pytest.raises(ValueError, match="expected 'decision', 'sample' or 'length'"):
        aggregation_weights(mask, "prompt")
