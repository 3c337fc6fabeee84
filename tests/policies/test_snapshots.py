"""Snapshots: their weights after updates computed by hand, and no trace of a snapshot that was used."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch import nn

import difrl.policies.snapshots
from difrl.core import Coefficient, Constant, Linear, Reset, Soup
from difrl.policies.layout import Layout
from difrl.policies.snapshots import Copy, Snapshots


def snapshots(value: float = 0.0, **decays: Coefficient) -> tuple[nn.Parameter, Snapshots]:
    """Snapshots of one parameter, whose base value is −1."""
    weight = nn.Parameter(torch.full((2,), value))

    @contextmanager
    def base() -> Iterator[None]:
        kept, weight.data = weight.data, torch.full((2,), -1.0)
        try:
            yield
        finally:
            weight.data = kept

    return weight, Snapshots(Layout({"w": weight}), decays, base)


def under(weight: nn.Parameter, found: Snapshots, name: str) -> float:
    with found.use(name):
        return float(weight.detach()[0])


def test_decay_0_copies_1_freezes_and_between_follows() -> None:
    weight, found = snapshots(old=Constant(0.0), frozen=Constant(1.0), ema=Constant(0.75))
    for number, value in enumerate((4.0, 8.0)):
        weight.data.fill_(value)
        found.update(number)
    # ema: 0 → 0.75·0 + 0.25·4 = 1 → 0.75·1 + 0.25·8 = 2.75
    assert [under(weight, found, name) for name in ("old", "frozen", "ema")] == [8.0, 0.0, 2.75]
    assert under(weight, found, "current") == 8.0
    assert under(weight, found, "base") == -1.0
    assert found.names == ["current", "base", "old", "frozen", "ema"]


def test_decay_follows_its_schedule() -> None:
    weight, found = snapshots(ema=Linear(0.0, 1.0, 2))
    for number, expected in enumerate((4.0, 6.0, 6.0)):  # decays 0, 1/2, 1 towards 4, 8, 12
        weight.data.fill_(4.0 * (number + 1))
        found.update(number)
        assert under(weight, found, "ema") == expected


def test_weights_come_back_also_after_an_error() -> None:
    weight, found = snapshots(3.0, old=Constant(0.0))
    weight.data.fill_(5.0)
    storage = weight.data_ptr()
    for name in ("old", "base"):
        with pytest.raises(KeyError), found.use(name):
            raise KeyError
    assert weight.tolist() == [5.0, 5.0]
    assert weight.data_ptr() == storage
    assert under(weight, found, "old") == 3.0


def test_gradient_and_optimizer_see_the_trained_weights_only() -> None:
    """A pass under a snapshot before the differentiable pass changes neither the gradient nor the update of Adam."""
    weight, found = snapshots(2.0, old=Constant(0.0))
    weight.data.fill_(3.0)
    optimizer = torch.optim.AdamW([weight], lr=0.5, weight_decay=0.0)
    with found.use("old"), torch.no_grad():
        assert float((weight**2).sum()) == 8.0
    (weight**2).sum().backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [6.0, 6.0]
    optimizer.step()
    torch.testing.assert_close(weight.data, torch.full((2,), 2.5))
    assert under(weight, found, "old") == 2.0


def test_the_state_is_that_of_every_copy() -> None:
    weight, found = snapshots(old=Constant(0.0), ema=Constant(0.5))
    weight.data.fill_(4.0)
    found.update(0)
    assert {name: value.tolist() for name, value in found.state().items()} == {"old/w": [4.0, 4.0], "ema/w": [2.0, 2.0]}
    found.state()["ema/w"].fill_(9.0)  # no copies, so that they can be restored in place
    assert under(weight, found, "ema") == 9.0


def test_unknown_name_lists_the_known() -> None:
    _, found = snapshots(old=Constant(0.0))
    with (
        pytest.raises(ValueError, match=r"no snapshot 'ema'; expected one of \['current', 'base', 'old'\]"),
        found.use("ema"),
    ):
        pass


def test_a_snapshot_in_use_may_be_asked_for_again_and_no_other() -> None:
    weight, found = snapshots(1.0, old=Constant(0.0))
    weight.data.fill_(2.0)
    with found.use("old"), found.use("old"):
        assert float(weight.detach()[0]) == 1.0
    for other in ("current", "base"):
        with (
            pytest.raises(RuntimeError, match=f"{other!r} cannot be used while 'old' is in use"),
            found.use("old"),
            found.use(other),
        ):
            pass
    assert float(weight.detach()[0]) == 2.0


class Breaking(torch.Tensor):
    """A copy that cannot be written, as if memory were short."""

    def copy_(self, *args: object, **kwargs: object) -> torch.Tensor:
        raise RuntimeError("out of memory")


class Away(torch.Tensor):
    """A copy that has to be moved to the device of the model, as a copy in CPU memory for a model on a GPU."""

    def to(self, *args: object, **kwargs: object) -> torch.Tensor:
        return self.as_subclass(torch.Tensor).clone()


def test_a_copy_that_has_to_be_fetched_holds_the_same_bits() -> None:
    """A copy on another device gives the parameters the bits, and is updated to the bits, of a copy beside them."""
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(100, generator=generator))
    near, far = Copy(Layout({"w": weight})), Copy(Layout({"w": weight}))
    far.tensors["w"] = far.tensors["w"].as_subclass(Away)
    for share in (0.3, 0.0, 0.9, 1.0, 0.4):
        weight.data = torch.randn(100, generator=generator)
        for copy in (near, far):
            copy.move_towards(share)
        assert torch.equal(near.tensors["w"], far.tensors["w"])
    seen = []
    for copy in (near, far):
        with copy.swapped_in():
            seen.append(weight.detach().clone())
    assert torch.equal(*seen)
    assert torch.equal(near.tensors["w"], far.tensors["w"])


def test_an_exchange_that_fails_halfway_changes_nothing() -> None:
    first, second = nn.Parameter(torch.tensor([1.0])), nn.Parameter(torch.tensor([2.0]))
    copy = Copy(Layout({"first": first, "second": second}))
    copy.tensors["second"] = torch.tensor([9.0]).as_subclass(Breaking)
    copy.tensors["first"] = torch.tensor([8.0])
    with pytest.raises(RuntimeError, match="out of memory"), copy.swapped_in():
        pass
    assert (first.item(), second.item()) == (1.0, 2.0)
    assert [copy.tensors[name].item() for name in ("first", "second")] == [8.0, 9.0]


def test_soup_and_reset_through_snapshots() -> None:
    weight, found = snapshots(0.0, soup=Soup(1), ref=Reset(2))
    seen = []
    for number, value in enumerate((6.0, 3.0, 9.0)):
        weight.data.fill_(value)
        found.update(number)
        seen.append((under(weight, found, "soup"), under(weight, found, "ref")))
    assert seen == [(3.0, 0.0), (3.0, 3.0), (4.5, 3.0)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_where_copies_stay_does_not_show() -> None:
    """On a GPU, copies in pinned CPU memory hold the bits that copies on the GPU hold."""
    generator = torch.Generator().manual_seed(0)
    start, moves = torch.randn(1000, generator=generator), torch.randn(5, 1000, generator=generator)
    results = []
    for device in (None, "cpu"):
        weight = nn.Parameter(start.cuda())
        found = Snapshots(Layout({"w": weight}), {"ema": Constant(0.7), "soup": Soup(2)}, lambda: nullcontext(), device)
        for number, move in enumerate(moves):
            weight.data += move.cuda()
            found.update(number)
        with found.use("ema"):
            assert weight.is_cuda
            results.append(weight.detach().cpu())
        results.append(found.state()["soup/w"].cpu())
        assert found.copies["ema"].tensors["w"].is_pinned() == (device == "cpu")
    assert torch.equal(results[0], results[2])
    assert torch.equal(results[1], results[3])


def test_the_fingerprint_is_the_sum_of_all_weights_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces that divide no tensor evenly, a tensor with strided memory, and values that float32 would round off."""
    monkeypatch.setattr(difrl.policies.snapshots, "SUMMED", 4)
    weights = {"a": nn.Parameter(torch.arange(15.0).reshape(3, 5).T), "b": nn.Parameter(torch.tensor([2.0**24, 1.0]))}
    found = Snapshots(Layout(weights), {"old": Constant(0.0)}, nullcontext)
    with torch.no_grad():
        weights["b"][1] = 3.0
    assert found.fingerprint("current").tolist() == [105 + 2**24 + 3]
    assert found.fingerprint("old").tolist() == [105 + 2**24 + 1]


def test_a_backward_pass_across_an_exchange_is_refused() -> None:
    """The gradient would be that of other weights."""
    weight, found = snapshots(2.0, old=Constant(0.0))
    loss = (weight**2).sum()
    with found.use("old"), pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_snapshot_as_current_is_in_use_wherever_it_is_asked_for() -> None:
    weight, found = snapshots(1.0, old=Constant(0.0), ema=Constant(0.5))
    weight.data.fill_(3.0)
    found.update(0)
    weight.data.fill_(5.0)
    with found.as_current("ema"):
        values = [under(weight, found, name) for name in ("current", "ema", "old", "base")]
    assert values == [2.0, 2.0, 3.0, -1.0]
    assert under(weight, found, "current") == 5.0
