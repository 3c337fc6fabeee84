"""The record: checks, selection, concatenation, collapse."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from difrl.core import Decisions, Likelihoods, collapse

EVERY_FIELD = {
    "logp",
    "mask",
    "references/old",
    "references/base",
    "divergence/base",
    "divergence/old",
    "bias",
    "scale",
    "weight",
    "mixed/plus",
    "mixed/minus",
}


def test_the_fake_policy_fills_every_field(fake_policy: Any) -> None:
    flat = fake_policy.make(5, 3).likelihoods().tensors()
    assert flat.keys() == EVERY_FIELD
    again = Likelihoods.from_tensors(flat).tensors()
    assert all(again[name] is tensor for name, tensor in flat.items())


def test_select_then_cat_is_the_identity_on_every_field(fake_policy: Any) -> None:
    lik = fake_policy.make(5, 3).likelihoods()
    front = torch.tensor([True, True, False, False, False])
    parts = [lik.select(front), lik.select(torch.tensor([2])), lik.select(slice(3, 5))]
    assert [len(part) for part in parts] == [2, 1, 2]
    whole = Likelihoods.cat(parts)
    for name, tensor in lik.tensors().items():
        assert torch.equal(whole.tensors()[name], tensor), name
    assert whole.logp.requires_grad


def test_absent_fields_stay_absent() -> None:
    logp = torch.zeros(2, 3)
    lik = Likelihoods(logp, logp == 0, references={"old": logp})
    for same in (lik.select(slice(None)), Likelihoods.cat([lik, lik]), collapse(lik, "sum")):
        assert same.tensors().keys() == {"logp", "mask", "references/old"}
        assert same.bias is None
        assert same.mixed is None


@pytest.mark.parametrize(
    ("decisions", "logp", "scale"),
    [
        ("sum", [[3.0], [6.0], [0.0]], [[1.5], [7.0], [0.0]]),
        ("mean", [[1.5], [6.0], [0.0]], [[1.5], [7.0], [0.0]]),
    ],
)
def test_collapse_by_hand(decisions: Decisions, logp: list[list[float]], scale: list[list[float]]) -> None:
    """Row 0 keeps 1 and 2, row 1 keeps 6, row 2 keeps nothing; what is masked is NaN."""
    nan = torch.nan
    values = torch.tensor([[1.0, 2.0, nan], [nan, 6.0, nan], [nan, nan, nan]])
    factor = torch.tensor([[1.0, 2.0, nan], [nan, 7.0, nan], [nan, nan, nan]])
    lik = Likelihoods(
        values, ~values.isnan(), {"old": values}, {"base": values}, values, factor, factor, (values, -values)
    )
    found = collapse(lik, decisions)
    assert found.mask.tolist() == [[True], [True], [False]]
    for tensor in (found.logp, found.references["old"], found.divergence["base"], found.bias, found.mixed[0]):
        assert tensor.tolist() == logp
    assert (-found.mixed[1]).tolist() == logp
    assert found.scale.tolist() == found.weight.tolist() == scale
    assert collapse(lik, "each") is lik


def test_collapse_passes_the_gradient_to_what_counts() -> None:
    logp = torch.tensor([[1.0, 2.0, 3.0]], requires_grad=True)
    mask = torch.tensor([[True, True, False]])
    collapse(Likelihoods(logp, mask), "mean").logp.sum().backward()
    assert logp.grad.tolist() == [[0.5, 0.5, 0.0]]


def test_log_ratio_is_zero_where_masked() -> None:
    logp = torch.tensor([[1.0, torch.inf]], requires_grad=True)
    lik = Likelihoods(logp, torch.tensor([[True, False]]), {"old": torch.tensor([[0.25, torch.inf]])})
    assert lik.log_ratio().tolist() == [[0.75, 0.0]]
    lik.log_ratio().exp().sum().backward()
    assert torch.isfinite(logp.grad).all()


def test_errors_name_the_field() -> None:
    x, m = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"logp has shape \[2\], expected \[samples, decisions\]"):
        Likelihoods(x[:, 0], m)
    with pytest.raises(ValueError, match="mask is torch"):
        Likelihoods(x, x)
    with pytest.raises(ValueError, match=r"references/old has shape \[2, 1\], expected \[2, 3\]"):
        Likelihoods(x, m, references={"old": x[:, :1]})
    with pytest.raises(ValueError, match="references/base carries a gradient"):
        Likelihoods(x, m, references={"base": x.clone().requires_grad_()})
    for name in ("scale", "weight"):
        with pytest.raises(ValueError, match=f"{name} carries a gradient"):
            Likelihoods(x, m, **{name: x.clone().requires_grad_()})
    with pytest.raises(ValueError, match=r"mixed/minus has shape"):
        Likelihoods(x, m, mixed=(x, x[:1]))
    with pytest.raises(ValueError, match=r"needs \['references/old'\].*hold only \['logp', 'mask'\]"):
        Likelihoods(x, m).log_ratio()
    with pytest.raises(ValueError, match="cannot concatenate"):
        Likelihoods.cat([Likelihoods(x, m), Likelihoods(x[:, :2], m[:, :2])])
    with pytest.raises(ValueError, match="cannot concatenate"):
        Likelihoods.cat([])
    with pytest.raises(ValueError, match="expected 'each', 'mean' or 'sum'"):
        collapse(Likelihoods(x, m), "median")
