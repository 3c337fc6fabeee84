"""The record of likelihoods: validation, selection, concatenation, reduction over decisions."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from difrl.core import DecisionReduction, Likelihoods, reduce_over_decisions

EVERY_TERM = {
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


def assert_equal(found: Likelihoods, expected: Likelihoods) -> None:
    assert torch.equal(found.logp, expected.logp)
    assert torch.equal(found.mask, expected.mask)
    assert found.terms.keys() == expected.terms.keys()
    for name, term in expected.terms.items():
        assert torch.equal(found[name], term), name


def test_the_fake_policy_has_every_term(fake_policy: Any) -> None:
    assert fake_policy.make(5, 3).likelihoods().terms.keys() == EVERY_TERM


def test_select_then_cat_is_the_identity(fake_policy: Any) -> None:
    lik = fake_policy.make(5, 3).likelihoods()
    front = torch.tensor([True, True, False, False, False])
    parts = [lik.select(front), lik.select(torch.tensor([2])), lik.select(slice(3, 5))]
    assert [len(part) for part in parts] == [2, 1, 2]
    whole = Likelihoods.cat(parts)
    assert_equal(whole, lik)
    assert whole.logp.requires_grad


def test_decisions_are_cut_by_map_and_joined_by_cat(fake_policy: Any) -> None:
    lik = fake_policy.make(5, 3).likelihoods()
    assert_equal(Likelihoods.cat([lik.map(lambda x: x[:, :2]), lik.map(lambda x: x[:, 2:])], dim=1), lik)


def test_absent_terms_stay_absent() -> None:
    logp = torch.zeros(2, 3)
    lik = Likelihoods(logp, logp == 0, {"references/old": logp})
    for same in (lik.select(slice(None)), Likelihoods.cat([lik, lik]), reduce_over_decisions(lik, "sum")):
        assert same.terms.keys() == {"references/old"}


@pytest.mark.parametrize(
    ("decisions", "logp", "scale"),
    [
        ("sum", [[3.0], [6.0], [0.0]], [[1.5], [7.0], [0.0]]),
        ("mean", [[1.5], [6.0], [0.0]], [[1.5], [7.0], [0.0]]),
    ],
)
def test_reduce_over_decisions_by_hand(
    decisions: DecisionReduction, logp: list[list[float]], scale: list[list[float]]
) -> None:
    """Row 0 has 1 and 2 unmasked, row 1 has 6, row 2 nothing; masked values are NaN."""
    nan = torch.nan
    values = torch.tensor([[1.0, 2.0, nan], [nan, 6.0, nan], [nan, nan, nan]])
    factor = torch.tensor([[1.0, 2.0, nan], [nan, 7.0, nan], [nan, nan, nan]])
    summed = ("references/old", "divergence/base", "bias", "mixed/plus")
    terms = {**dict.fromkeys(summed, values), "mixed/minus": -values, "scale": factor, "weight": factor}
    lik = Likelihoods(values, ~values.isnan(), terms)
    found = reduce_over_decisions(lik, decisions)
    assert found.mask.tolist() == [[True], [True], [False]]
    for tensor in (found.logp, *(found[name] for name in summed), -found["mixed/minus"]):
        assert tensor.tolist() == logp
    assert found["scale"].tolist() == found["weight"].tolist() == scale
    assert reduce_over_decisions(lik, "each") is lik


def test_reduce_over_decisions_passes_the_gradient_to_unmasked_decisions() -> None:
    logp = torch.tensor([[1.0, 2.0, 3.0]], requires_grad=True)
    mask = torch.tensor([[True, True, False]])
    reduce_over_decisions(Likelihoods(logp, mask), "mean").logp.sum().backward()
    assert logp.grad.tolist() == [[0.5, 0.5, 0.0]]


def test_log_ratio_is_zero_where_masked() -> None:
    logp = torch.tensor([[1.0, torch.inf]], requires_grad=True)
    lik = Likelihoods(logp, torch.tensor([[True, False]]), {"references/old": torch.tensor([[0.25, torch.inf]])})
    assert lik.log_ratio().tolist() == [[0.75, 0.0]]
    lik.log_ratio().exp().sum().backward()
    assert torch.isfinite(logp.grad).all()


def test_errors_name_the_term() -> None:
    x, m = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"logp has shape \[2\], expected \[samples, decisions\]"):
        Likelihoods(x[:, 0], m)
    with pytest.raises(ValueError, match="mask is torch"):
        Likelihoods(x, x)
    with pytest.raises(ValueError, match=r"references/old has shape \[2, 1\], expected \[2, 3\]"):
        Likelihoods(x, m, {"references/old": x[:, :1]})
    with pytest.raises(ValueError, match="references/base carries a gradient"):
        Likelihoods(x, m, {"references/base": x.clone().requires_grad_()})
    for name in ("scale", "weight"):
        with pytest.raises(ValueError, match=f"{name} carries a gradient"):
            Likelihoods(x, m, {name: x.clone().requires_grad_()})
    with pytest.raises(ValueError, match=r"mixed/minus has shape"):
        Likelihoods(x, m, {"mixed/minus": x[:1]})
    for name in ("reference/old", "references/", "divergence", "biased", "mixed/plus/2", "weight/old"):
        with pytest.raises(ValueError, match=f"found a term '{name}'"):
            Likelihoods(x, m, {name: x})
    with pytest.raises(ValueError, match=r"needs \['references/old'\].*hold only \['logp', 'mask'\]"):
        Likelihoods(x, m).log_ratio()
    with pytest.raises(ValueError, match="cannot concatenate"):
        Likelihoods.cat([Likelihoods(x, m), Likelihoods(x[:, :2], m[:, :2])])
    with pytest.raises(ValueError, match="cannot concatenate"):
        Likelihoods.cat([Likelihoods(x, m), Likelihoods(x, m, {"bias": x})])
    with pytest.raises(ValueError, match="cannot concatenate"):
        Likelihoods.cat([])
    with pytest.raises(ValueError, match="expected 'each', 'mean' or 'sum'"):
        reduce_over_decisions(Likelihoods(x, m), "median")
