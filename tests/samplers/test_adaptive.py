"""Adaptive guidance: the step at which it ends for a sample, the evaluations saved, and independence of the batch."""

from __future__ import annotations

import pytest
import torch

from samplers import (
    Agreement,
    Condition,
    Counting,
    FlowMatching,
    Grid,
    Window,
    adaptive_classifier_free,
    adaptive_reinforcement_learning,
    classifier_free,
    ode,
    reinforcement_learning,
    rollout,
)

GRID = Grid(torch.linspace(1, 0, 5))
TIMES = [float(t) for t in GRID.times[:-1]]


def turning(x_t, t, condition):
    """Return unit vectors of the angle `rate` t. For the prompts' rates 1 and 0 the cosine is cos(t), which rises in a run."""
    angle = condition.tensors["rate"][:, 0].double() * t.double()
    return torch.stack([angle.cos(), angle.sin()], 1)


def fixed(*outputs):
    return Counting(lambda x_t, t, condition: torch.tensor(outputs).double().expand(len(x_t), -1))


def condition_of(rates):
    rates = torch.tensor(rates).double()[:, None]
    return Condition({"rate": rates}, {"rate": torch.zeros_like(rates)})


def run(guided, condition, times=TIMES):
    x = torch.zeros(len(condition), 2, dtype=torch.float64)
    return torch.stack([guided(x, torch.full((len(condition),), t), condition) for t in times], 1)


def test_guidance_ends_after_the_step_at_which_the_outputs_agree():
    """cos(t) at t = 1, 0.75, 0.5, 0.25 is 0.540, 0.732, 0.878, 0.969; at 0.8 the third step is the last guided one."""
    agreement, counted = Agreement(0.8), Counting(turning)
    condition = condition_of([1.0])
    found = run(adaptive_classifier_free(counted, 3.0, agreement), condition)
    plain = run(classifier_free(turning, 3.0), condition)
    alone = run(turning, condition)
    torch.testing.assert_close(found, torch.cat([plain[:, :3], alone[:, 3:]], 1), rtol=0, atol=1e-15)
    assert counted.evaluations == 7
    assert agreement.saved.sums(1).tolist() == [1.0]


def test_guidance_ends_for_each_sample_separately():
    """Rates 1, 0.1 and 4 against 0: cos(4 t) is negative at t = 0.5 and 0.54 at 0.25, so that sample is always guided."""
    agreement, counted = Agreement(0.8), Counting(turning)
    rates = [1.0, 0.1, 4.0]
    found = run(adaptive_classifier_free(counted, 3.0, agreement), condition_of(rates))
    assert agreement.saved.sums(3).tolist() == [1.0, 3.0, 0.0]
    assert counted.evaluations == 2 * 4 * 3 - 4
    assert counted.per_sample.sums(3).tolist() == [7.0, 5.0, 8.0]
    for row, rate in enumerate(rates):
        alone = run(adaptive_classifier_free(turning, 3.0, Agreement(0.8)), condition_of([rate]))
        assert torch.equal(found[row], alone[0])


@pytest.mark.parametrize(("threshold", "saved"), [(1.1, 0), (-1.1, 3)])
def test_the_limits_of_the_threshold(threshold, saved):
    """Above 1 guidance never ends; below -1 it ends after one step."""
    agreement, condition = Agreement(threshold), condition_of([1.0, 0.3])
    found = run(adaptive_classifier_free(turning, 3.0, agreement), condition)
    plain = run(classifier_free(turning, 3.0), condition)
    guided = 4 - saved
    torch.testing.assert_close(found[:, :guided], plain[:, :guided], rtol=0, atol=1e-15)
    torch.testing.assert_close(found[:, guided:], run(turning, condition)[:, guided:], rtol=0, atol=1e-15)
    assert agreement.saved.sums(2).tolist() == [saved, saved]


def test_equal_outputs_have_cosine_1():
    agreement = Agreement(1.0)
    run(adaptive_reinforcement_learning(fixed(1.0, 0.0), fixed(1.0, 0.0), 2.0, agreement), condition_of([1.0]))
    assert agreement.saved.sums(1).tolist() == [3.0]


def test_rounding_does_not_decide():
    """(3, 4) and (1, 0) in float32: cos = 0.6, whose nearest float32 is 2e-8 above."""

    def single(*outputs):
        return lambda x_t, t, condition: torch.tensor(outputs).expand(len(x_t), -1)

    agreement = Agreement(0.6 + 1e-9)
    run(adaptive_reinforcement_learning(single(1.0, 0.0), single(3.0, 4.0), 2.0, agreement), condition_of([1.0]))
    assert agreement.saved.sums(1).tolist() == [0.0]


def test_a_new_run_is_guided_again():
    """A wrapper may be used again, also in the middle of another sample's run."""
    agreement = Agreement(0.8)
    guided = adaptive_classifier_free(turning, 3.0, agreement)
    first, second = run(guided, condition_of([1.0])), run(guided, condition_of([1.0]))
    assert torch.equal(first, second)
    assert agreement.saved.sums(1).tolist() == [2.0]
    # A solver that evaluates a time twice does not begin a new run by that.
    twice = Agreement(-1.1)
    run(adaptive_classifier_free(turning, 3.0, twice), condition_of([1.0]), [1.0, 0.5, 0.5, 0.25, 0.25])
    assert twice.saved.sums(1).tolist() == [4.0]


def test_rlg_continues_with_the_tuned_model():
    """Base (1, 0) and tuned (3, 4): cos = 0.6. At w = 2 the blend is (5, 8); the first step always evaluates both."""
    base, tuned, passes = fixed(1.0, 0.0), fixed(3.0, 4.0), []

    def followed(x_t, t, condition):
        passes.append(len(x_t))
        return base(x_t, t, condition)

    agreement = Agreement(0.6 - 1e-9)
    guided = adaptive_reinforcement_learning(followed, tuned, 2.0, agreement)
    assert run(guided, condition_of([1.0, 1.0]))[0].tolist() == [[5.0, 8.0], *[[3.0, 4.0]] * 3]
    assert (base.evaluations, tuned.evaluations) == (2, 8)
    assert passes == [2]  # and no pass over an empty batch
    assert agreement.saved.sums(2).tolist() == [3.0, 3.0]
    never = adaptive_reinforcement_learning(base, tuned, 2.0, Agreement(0.6 + 1e-9))
    assert run(never, condition_of([1.0]))[0].tolist() == [[5.0, 8.0]] * 4


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_rlg_weights_0_and_1_still_cost_one_evaluation(weight):
    base, tuned, agreement = fixed(1.0, 0.0), fixed(3.0, 4.0), Agreement(1.1)
    run(adaptive_reinforcement_learning(base, tuned, weight, agreement), condition_of([1.0]))
    assert (base.evaluations, tuned.evaluations) == ((4, 0), (0, 4))[int(weight)]
    assert agreement.saved.sums(1).tolist() == [0.0]


def test_first_steps_come_before_any_comparison():
    """Two steps of the tuned model, then one of the blend, at which guidance ends."""
    base, tuned, agreement = fixed(1.0, 0.0), fixed(3.0, 4.0), Agreement(0.5)
    guided = adaptive_reinforcement_learning(base, tuned, 2.0, agreement, first_steps=2, grid=GRID)
    assert run(guided, condition_of([1.0]))[0].tolist() == [[3.0, 4.0], [3.0, 4.0], [5.0, 8.0], [3.0, 4.0]]
    assert (base.evaluations, agreement.saved.sums(1).tolist()) == (1, [1.0])


def test_rlg_over_guided_models_counts_what_it_saves():
    """Base and tuned are each under their own adaptive guidance: evaluations made and saved add up to those of plain guidance.

    The base is evaluated for the guided samples only, and keeps its state for the right ones.
    """

    def tilted(x_t, t, condition):
        return turning(x_t, t, condition) + torch.tensor([0.0, 0.5])

    condition = condition_of([1.0, 0.1, 4.0, 0.5])
    counted = [Counting(turning), Counting(tilted)]
    inner = [Agreement(0.8), Agreement(0.8)]
    outer = Agreement(0.93, cost=2)
    base, tuned = (adaptive_classifier_free(c, 3.0, a) for c, a in zip(counted, inner, strict=True))
    guided = adaptive_reinforcement_learning(base, tuned, 1.5, outer)
    found = run(guided, condition)
    made = sum(c.per_sample.sums(4) for c in counted)
    saved = sum(a.saved.sums(4) for a in (*inner, outer))
    assert (made + saved).tolist() == [16.0] * 4
    assert (
        len(set(outer.saved.sums(4).tolist())) > 1
    )  # guidance ends at different steps, so the base is evaluated for some samples
    for row in range(4):
        base, tuned = (adaptive_classifier_free(d, 3.0, Agreement(0.8)) for d in (turning, tilted))
        one = adaptive_reinforcement_learning(base, tuned, 1.5, Agreement(0.93, cost=2))
        assert torch.equal(run(one, condition.select([row]))[0], found[row])


def test_a_run_with_a_threshold_above_1_is_the_plain_run():
    process, x = FlowMatching(), torch.randn(3, 2, generator=torch.Generator().manual_seed(0)).double()
    condition = condition_of([1.0, 0.1, 4.0])

    def end(denoiser):
        return rollout(
            denoiser, process, GRID, ode, x, condition, window=Window(0, 0), noise=lambda step: torch.empty(0)
        ).x0

    plain = reinforcement_learning(turning, classifier_free(turning, 3.0), 1.7)
    guided = adaptive_classifier_free(turning, 3.0, Agreement(1.1))
    adaptive = adaptive_reinforcement_learning(turning, guided, 1.7, Agreement(1.1))
    torch.testing.assert_close(end(adaptive), end(plain), rtol=0, atol=1e-14)


def test_guidance_needs_a_negative():
    with pytest.raises(ValueError, match="needs the condition's `negative`"):
        run(adaptive_classifier_free(turning, 3.0, Agreement(0.9)), Condition({"rate": torch.ones(1, 1)}))
    assert adaptive_classifier_free(turning, 1.0, Agreement(0.9)) is turning
