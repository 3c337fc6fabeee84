from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from samplers import gumbel, sample_keys
from samplers.gumbel import _STRIDE, _mix

WORD = (1 << 64) - 1
STRIDE = 0x9E3779B97F4A7C15


def mixed(word: int) -> int:
    """Apply SplitMix64's finaliser in Python's unbounded integers."""
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & WORD
    return word ^ (word >> 31)


def keys(count: int, use: str = "token") -> torch.Tensor:
    return sample_keys(seed=0, step=0, samples=range(count), use=use)


def test_splitmix64_by_its_published_numbers():
    """The first numbers of seed 1234567, from published reference outputs of SplitMix64."""
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    places = [(1234567 + STRIDE * i) & WORD for i in (1, 2, 3)]
    assert [mixed(place) for place in places] == published
    states = 1234567 + torch.tensor([1, 2, 3]) * _STRIDE
    assert [word & WORD for word in _mix(states).tolist()] == published


@settings(max_examples=50)
@given(key=st.integers(-(2**63), 2**63 - 1), position=st.integers(0, 2**20), token=st.integers(0, 300))
def test_noise_is_a_function_of_its_key(key, position, token):
    """Compared with integers without wrap-around and a float64 logarithm; float32 rounds by 1.2e-7 relatively at each step."""
    stream = mixed((key + STRIDE * (position + 1)) & WORD)
    uniform = (mixed((stream + STRIDE * (token + 1)) & WORD) >> 1) / 2**63
    expected = -math.log(-math.log1p(-min(uniform, 1 - 2**-24)))
    found = gumbel(torch.tensor([key]), position, token + 1)
    assert found.dtype == torch.float32
    assert found[0, token].item() == pytest.approx(expected, abs=4e-6, rel=1e-6)


def test_keys_and_noise_are_stable():
    """Golden values: if they change, no old run can be reproduced."""
    assert keys(2).tolist() == [6563562019891626142, 2721276860206785432]
    assert gumbel(keys(1), 0, 3)[0].tolist() == pytest.approx([1.360832, 1.649125, -0.698137], abs=1e-6)


def test_every_part_of_the_key_matters():
    base = {"seed": 1, "step": 2, "samples": [3], "use": "token"}
    first = sample_keys(**base)
    assert first.dtype == torch.int64
    for change in ({"seed": 2}, {"step": 3}, {"samples": torch.tensor([4])}, {"use": "other"}):
        assert not torch.equal(sample_keys(**base | change), first)
    assert sample_keys(seed=1, step=2, samples=[], use="token").shape == (0,)


def test_noise_does_not_depend_on_the_batch_nor_on_the_vocabulary():
    whole, order = gumbel(keys(6), 5, 40), [4, 1, 5, 0, 3, 2]
    assert torch.equal(gumbel(keys(6)[order], 5, 40), whole[order])
    assert torch.equal(gumbel(keys(6)[2:3], 5, 40), whole[2:3])
    assert torch.equal(gumbel(keys(6), 5, 17), whole[:, :17])
    assert not torch.equal(gumbel(keys(6), 6, 40), whole)


def test_keys_stay_as_they_are():
    before = keys(3)
    after = before.clone()
    gumbel(after, 1, 4)
    assert torch.equal(before, after)


def test_noise_is_gumbel():
    noise = gumbel(keys(256), 3, 1000).flatten()
    assert noise.isfinite().all()
    # Keyed, so the p-value is a constant; a mean or scale wrong by 0.5 % would bring it below 1e-3 at this size.
    assert stats.kstest(noise.double().numpy(), "gumbel_r").pvalue > 0.01


def test_the_largest_noise_is_finely_resolved_and_none_is_infinite():
    noise = gumbel(torch.cat([keys(60), torch.tensor([0, -1, 2**63 - 1, -(2**63)])]), 0, 50_000)
    assert noise.isfinite().all()
    # The 1000 largest of 3.2 million. Uniforms of 24 bits would have about 5,000 values in their range, and so about 100
    # ties; only the rounding of results between 8 and 16 to 1e-6 remains.
    assert len(noise.flatten().topk(1000).values.unique()) > 990


def unmixed(word: int) -> int:
    """Invert `mixed`."""

    def unshifted(word: int, bits: int) -> int:
        found = word
        for _ in range(64 // bits):
            found = word ^ (found >> bits)
        return found

    word = (unshifted(word, 31) * pow(0x94D049BB133111EB, -1, 1 << 64)) & WORD
    word = (unshifted(word, 27) * pow(0xBF58476D1CE4E5B9, -1, 1 << 64)) & WORD
    return unshifted(word, 30)


@pytest.mark.parametrize(("word", "uniform"), [(0, 2.0**-64), (WORD, 1 - 2.0**-24), (WORD - (1 << 37), 1 - 2.0**-24)])
def test_the_ends_of_the_uniform_are_finite(word, uniform):
    """Keys whose first token hashes to all zeros, to all ones, and to what float32 rounds to 1."""
    key = (unmixed((unmixed(word) - STRIDE) & WORD) - STRIDE) & WORD
    assert mixed((mixed((key + STRIDE) & WORD) + STRIDE) & WORD) == word
    found = gumbel(torch.tensor([key - (1 << 64) if key >> 63 else key]), 0, 1)
    assert found.item() == pytest.approx(-math.log(-math.log1p(-uniform)), rel=1e-6)


@pytest.mark.parametrize("raw", [False, True], ids=["hashed keys", "keys 0, 1, 2, ..."])
def test_neighbours_are_independent(raw):
    """Tokens, positions and samples, in eight bins each, so that any dependence would be seen, not only correlation."""
    rows = torch.arange(200) if raw else keys(200)
    here, later = gumbel(rows, 7, 400), gumbel(rows, 8, 400)
    pairs = {
        "tokens": (here[:, 1:], here[:, :-1]),
        "positions": (here, later),
        "samples": (here[1:], here[:-1]),
        "the next token of the next position": (here[:, 1:], later[:, :-1]),
    }
    edges = stats.gumbel_r.ppf([i / 8 for i in range(1, 8)])
    for name, (one, other) in pairs.items():
        bins = [torch.bucketize(part.flatten().double(), torch.tensor(edges)) for part in (one, other)]
        table = torch.bincount(bins[0] * 8 + bins[1], minlength=64).reshape(8, 8)
        assert stats.chi2_contingency(table.numpy()).pvalue > 0.005, name


def test_the_argmax_is_a_sample_of_the_softmax():
    logits = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -3.0])
    for position in (0, 11):
        chosen = (logits + gumbel(keys(20_000), position, 6)).argmax(dim=1)
        expected = logits.double().softmax(dim=0) * 20_000
        assert stats.chisquare(torch.bincount(chosen, minlength=6).numpy(), expected.numpy()).pvalue > 0.01
