"""Best-of-N by hand, and SVDD against the distributions that it should sample."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from samplers import (
    Condition,
    Counting,
    FlowMatching,
    Grid,
    Window,
    best_of,
    choose,
    keyed,
    keyed_uniform,
    make_kernel,
    ode,
    rollout,
    svdd,
)

FLOW = FlowMatching()
NAN = math.nan


def test_best_of_by_hand():
    """Ids in any order; ties go to the first; invalid and NaN rows are skipped unless there is nothing else."""
    groups = torch.tensor([7, 2, 7, 2, 7, 5, 5, 9, 9])
    values = torch.tensor([1.0, 3.0, 2.0, 3.0, 9.0, NAN, NAN, NAN, -8.0])
    valid = torch.tensor([1, 1, 1, 1, 0, 1, 0, 1, 1]).bool()
    assert best_of(values, valid, groups).tolist() == [1, 5, 2, 8]  # of 2, 5, 7, 9


def test_minus_infinity_is_a_value():
    """It is the worst value, but better than none."""
    values, valid = torch.tensor([NAN, -math.inf, 1.0]), torch.tensor([True, True, False])
    assert best_of(values, valid, torch.zeros(3)).tolist() == [1]


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(-2, 2), st.booleans()), min_size=1, max_size=12))
def test_best_of_equals_a_loop(rows):
    groups, values, valid = (torch.tensor(column) for column in zip(*rows, strict=True))
    expected = []
    for group in sorted(set(groups.tolist())):
        places = [i for i, row in enumerate(rows) if row[0] == group]
        usable = [i for i in places if rows[i][2]]
        expected.append(max(usable, key=lambda i: (rows[i][1], -i)) if usable else places[0])
    assert best_of(values.double(), valid, groups).tolist() == expected


def test_choose_by_hand():
    """Weights exp(0), exp(ln 2), exp(0) at temperature 1: cumulative 1/4, 3/4, 1. At 1/2 the weights are 1, 4, 1."""
    values = torch.tensor([[0.0, math.log(2), 0.0]]).repeat(5, 1)
    uniforms = torch.tensor([0.0, 0.24, 0.26, 0.74, 0.76])
    assert choose(values, 1.0, uniforms).tolist() == [0, 0, 1, 1, 2]
    assert choose(values, 0.5, torch.tensor([0.16, 0.17, 0.5, 0.83, 0.84])).tolist() == [0, 1, 1, 1, 2]
    assert choose(values, 0.0, uniforms).tolist() == [1] * 5


def test_choose_depends_on_differences():
    """exp(1000) overflows; ln 2 more is still twice the weight."""
    values = torch.tensor([[1000.0, 1000.0 + math.log(2), 1000.0]]).double().repeat(3, 1)
    assert choose(values, 1.0, torch.tensor([0.24, 0.26, 0.76])).tolist() == [0, 1, 2]


def test_choose_is_uniform_where_nothing_could_be_scored():
    values = torch.full((4, 4), NAN)
    assert choose(values, 1.0, torch.tensor([0.1, 0.3, 0.6, 0.9])).tolist() == [0, 1, 2, 3]


def test_choose_skips_candidates_that_could_not_be_scored():
    values = torch.tensor([[NAN, 1.0, NAN, 0.0], [NAN, NAN, NAN, NAN]])
    assert choose(values, 0.0, torch.zeros(2))[0] == 1
    for u in torch.linspace(0, 0.999, 9):
        assert choose(values, 1.0, u.expand(2))[0] in (1, 3)
        assert 0 <= choose(values, 1.0, u.expand(2))[1] < 4


def drawn(batch):
    """Return noise from one generator for all: a hash for every number is slow, and only the distribution counts here."""
    generator = torch.Generator().manual_seed(0)
    return lambda step, candidate: torch.randn(batch, 1, generator=generator, dtype=torch.float64)


def still(x_t, t, condition):
    """Return velocity 0: x0_hat is the state itself at every time."""
    return torch.zeros_like(x_t)


def searched(
    denoiser, value, *, batch, grid, kernel, window, candidates, temperature, samples=None, x_init=None, noise=None
):
    samples = torch.arange(batch) if samples is None else samples

    def keyed_noise(step, candidate):
        key = {"seed": 3, "step": 0, "samples": samples, "use": f"svdd/{candidate}", "index": step}
        return keyed((1,), **key, dtype=torch.float64)

    def uniform(step):
        return keyed_uniform((), seed=3, step=0, samples=samples, use="svdd/choice", index=step)

    return svdd(
        denoiser,
        FLOW,
        grid,
        kernel,
        torch.zeros(len(samples), 1).double() if x_init is None else x_init,
        Condition({"none": torch.zeros(len(samples), 0)}),
        window=window,
        candidates=candidates,
        temperature=temperature,
        value=value,
        noise=noise or keyed_noise,
        uniform=uniform,
    )


# One stochastic step 1 -> 0.5 and the empty ODE step after it: at velocity 0 the ODE stays where it is.
ONE = {"grid": Grid(torch.tensor([1.0, 0.5, 0.0])), "window": Window(0, 1)}
STD = 0.4
KERNEL = make_kernel("dance_sde", STD / math.sqrt(0.5), ONE["grid"])


def test_many_candidates_sample_the_tilted_gaussian():
    """N(m, s²) under exp(g x / α) is N(m + s² g / α, s²)."""
    slope, temperature, batch = 3.0, 1.5, 2000
    found = searched(
        still,
        lambda x0, rows: slope * x0[:, 0],
        batch=batch,
        candidates=60,
        temperature=temperature,
        kernel=KERNEL,
        noise=drawn(batch),
        **ONE,
    )
    # Euler-Maruyama at velocity 0: mean = x - g²/2 score dt with score = -x/t, and x = 0.
    shift = STD**2 * slope / temperature
    # Four standard errors, and O(1/M) for the candidates' own normaliser.
    assert found.mean().item() == pytest.approx(shift, abs=4 * STD / math.sqrt(batch) + shift / 60)
    assert found.std().item() == pytest.approx(STD, rel=4 / math.sqrt(2 * batch) + 2 / 60)


@pytest.mark.parametrize(("candidates", "mean"), [(1, 0.0), (2, 1 / math.sqrt(math.pi)), (3, 1.5 / math.sqrt(math.pi))])
def test_temperature_0_takes_the_best(candidates, mean):
    """The expected largest of M standard normals: 0, 1/√π, 3/(2√π)."""
    batch = 4000
    found = searched(
        still, lambda x0, rows: x0[:, 0], batch=batch, candidates=candidates, temperature=0.0, kernel=KERNEL, **ONE
    )
    assert found.mean().item() / STD == pytest.approx(mean, abs=4 / math.sqrt(batch))


def test_a_whole_run_samples_the_tilted_data(build_task):
    """Gaussian data and a linear value: the posterior mean's value is the soft value up to a constant."""
    data = build_task(FLOW)
    data.mean, data.cov = torch.zeros(1).double(), torch.eye(1).double() * 0.8
    steps, batch, slope = 40, 600, 1.0
    grid = Grid(torch.linspace(1, 0, steps + 1))
    found = searched(
        data.denoiser,
        lambda x0, rows: slope * x0[:, 0],
        batch=batch,
        grid=grid,
        kernel=make_kernel("ddim", 1.0, grid),
        window=Window.all(steps),
        candidates=30,
        temperature=1.0,
        noise=drawn(batch),
        x_init=keyed((1,), seed=5, step=0, samples=range(batch), use="init", dtype=torch.float64),
    )
    # p(x0) exp(x0): N(0.8, 0.8). Four standard errors (0.15), and a first-order sampler's 1/40.
    assert found.mean().item() == pytest.approx(0.8, abs=0.17)
    assert found.var().item() == pytest.approx(0.8, rel=0.25)


def test_a_sample_does_not_depend_on_its_batch():
    """Each sample has its own noise and is selected by its own values."""
    options = {"batch": 5, "candidates": 4, "temperature": 0.7, "kernel": KERNEL, **ONE}
    every = searched(still, lambda x0, rows: x0[:, 0], **options)
    for one in (0, 3):
        alone = searched(still, lambda x0, rows: x0[:, 0], samples=torch.tensor([one]), **options)
        assert torch.equal(alone[0], every[one])


def test_values_depend_on_the_sample():
    """The value of sample 1 rises with x0, that of sample 0 falls."""
    sign = torch.tensor([-1.0, 1.0]).double()
    options = {"batch": 2, "candidates": 50, "temperature": 0.0, "kernel": KERNEL, **ONE}
    found = searched(still, lambda x0, rows: sign[rows] * x0[:, 0], **options)
    assert found[0] < -STD
    assert found[1] > STD


def test_number_of_evaluations():
    """One evaluation before the first step, M for each stochastic step (one of which serves the next step), one for others."""
    counted, grid = Counting(still), Grid(torch.linspace(1, 0, 6))
    searched(
        counted,
        lambda x0, rows: x0[:, 0],
        batch=2,
        grid=grid,
        kernel=make_kernel("ddim", 1.0, grid),
        window=Window(0, 2),
        candidates=3,
        temperature=0.0,
    )
    # Steps 0 and 1 with 3 candidates each; step 2 is served by the last of them; steps 3 and 4 are the ODE's.
    assert counted.evaluations == 2 * (1 + 3 + 3 + 0 + 1 + 1)


def test_one_candidate_is_the_plain_run():
    grid = Grid(torch.linspace(1, 0, 6))
    kernel, window = make_kernel("ddim", 0.8, grid), Window(1, 2)

    def denoiser(x_t, t, condition):
        return -x_t * t[:, None]

    x_init = keyed((1,), seed=1, step=0, samples=range(3), use="init", dtype=torch.float64)
    options = {"candidates": 1, "temperature": 1.0, "grid": grid, "kernel": kernel, "window": window, "batch": 3}
    found = searched(denoiser, lambda x0, rows: x0[:, 0], x_init=x_init, **options)
    plain = rollout(
        denoiser,
        FLOW,
        grid,
        kernel,
        x_init,
        Condition({"none": torch.zeros(3, 0)}),
        window=window,
        noise=lambda step: keyed((1,), seed=3, step=0, samples=range(3), use="svdd/0", index=step, dtype=torch.float64),
    )
    torch.testing.assert_close(found, plain.x0, rtol=0, atol=1e-14)


def test_refusals():
    options = {"batch": 1, "grid": ONE["grid"], "window": Window(0, 1)}
    with pytest.raises(ValueError, match=r"adds no noise .* at steps \[0\]"):
        searched(still, None, kernel=ode, candidates=2, temperature=0.0, **options)
    with pytest.raises(ValueError, match="1 candidate or more"):
        searched(still, None, kernel=KERNEL, candidates=0, temperature=0.0, **options)
    with pytest.raises(ValueError, match="temperature of 0 or more"):
        searched(still, None, kernel=KERNEL, candidates=2, temperature=-1.0, **options)
