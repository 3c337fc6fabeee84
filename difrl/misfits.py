"""What must hold between the parts of a run's config: each check finds settings that exclude each other.

A check yields the key to change and a sentence that says what was found, what was expected and what to do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

from difrl.levels import levels_of
from difrl.misfit import Misfit
from difrl.objective_misfits import ignores_old, objective_misfits
from difrl.rehearsal_misfits import rehearsal_misfits
from difrl.reward_misfits import reward_misfits
from difrl.text_misfits import text_misfits

if TYPE_CHECKING:
    from difrl.config import RunConfig


class MisfitError(ValueError):
    """Every misfit of a config."""

    def __init__(self, misfits: list[Misfit]) -> None:
        super().__init__("; ".join(f"{'.'.join(map(str, m.path))}: {m.problem}" for m in misfits))
        self.misfits = misfits


def misfits(config: RunConfig) -> list[Misfit]:
    """All that does not go together, in the order of the checks below."""
    return [misfit for check in _CHECKS for misfit in check(config)]


# As in samplers.kernels.KERNELS, which a test compares: importing it here would bring in diffusers.
_HIGHEST_NOISE = {"ode": 0.0, "ddim": 1.0, "cps": 1.0}


def _kernel_takes_noise_level(config: RunConfig) -> Iterator[Misfit]:
    kernel, noise_level = config.rollout.kernel, config.rollout.noise_level
    highest = _HIGHEST_NOISE.get(kernel)
    if highest is not None and noise_level > highest:
        advice = "has no noise; set 0, or another kernel" if highest == 0 else f"takes at most {highest:g}"
        yield Misfit(("rollout", "noise_level"), f"found {noise_level:g}, and the kernel {kernel} {advice}")


def _solver_or_kernel(config: RunConfig) -> Iterator[Misfit]:
    solver, kernel = config.rollout.solver, config.rollout.kernel
    if solver is not None and config.likelihood.kind == "reverse":
        problem = f"a reverse likelihood needs a stochastic kernel, found the solver {solver}"
        yield Misfit(("rollout", "solver"), f"{problem}; remove it, or set likelihood.kind: forward")
    elif solver is not None and kernel != "ode":
        problem = f"{solver} would take the place of rollout.kernel: {kernel}"
        yield Misfit(("rollout", "solver"), f"{problem}; remove it, or set kernel: ode and noise_level: 0")


def _reverse_has_noise(config: RunConfig) -> Iterator[Misfit]:
    rollout = config.rollout
    if config.likelihood.kind == "reverse" and rollout.silent and rollout.solver is None:
        found = f"kernel: {rollout.kernel} with noise_level: {rollout.noise_level:g}"
        advice = "set e.g. kernel: flow_sde and noise_level: 0.7"
        key = "kernel" if rollout.kernel == "ode" else "noise_level"
        yield Misfit(("rollout", key), f"a reverse likelihood needs noise, found {found}; {advice}")


def _window_fits(config: RunConfig) -> Iterator[Misfit]:
    window, steps = config.rollout.window, config.rollout.steps
    if window.kind == "all":
        return
    if config.rollout.silent:
        problem = (
            f"kind: {window.kind} chooses among steps with noise, and the sampler has none; set kind: all, or a kernel"
        )
        yield Misfit(("rollout", "window", "kind"), f"{problem} such as flow_sde with a noise_level")
    elif window.kind == "progressive":
        yield from _progressive_window_fits(window.first, window.last or steps - 1, steps)
    elif window.kind == "fixed":
        yield from _placed_window_fits(window.start, window.size, steps - 1, steps)
    else:
        yield from _placed_window_fits(window.start, window.size, window.end or steps - 1, steps)


def _placed_window_fits(start: int, size: int, end: int, steps: int) -> Iterator[Misfit]:
    if end > steps - 1:
        problem = (
            f"found {end}, and of rollout.steps: {steps} all but the last can be stochastic; set at most {steps - 1}"
        )
        yield Misfit(("rollout", "window", "end"), problem)
    elif start + size > end:
        problem = (
            f"{size} step(s) from step {start} do not end before step {end} of rollout.steps: {steps}, whose last step is "
            "never stochastic; make the window smaller, or start it earlier"
        )
        yield Misfit(("rollout", "window"), problem)


def _inversion_fits(config: RunConfig) -> Iterator[Misfit]:
    likelihood = config.likelihood
    if likelihood.kind != "forward" or likelihood.noise.kind != "inversion":
        return
    if likelihood.times.kind != "grid":
        problem = (
            f"inversion visits the times of the sampler's grid alone, found {likelihood.times.kind}; set kind: grid"
        )
        yield Misfit(("likelihood", "times", "kind"), problem)
    if "noise" in likelihood.share:
        problem = "inversion gives every sample a noise of its own, which cannot be shared; set [] or [t]"
        yield Misfit(("likelihood", "share"), problem)


def _progressive_window_fits(first: int, last: int, steps: int) -> Iterator[Misfit]:
    if last > steps - 1:
        problem = (
            f"found {last}, and of rollout.steps: {steps} all but the last can be stochastic; set at most {steps - 1}"
        )
        yield Misfit(("rollout", "window", "last"), problem)
    elif first > last:
        problem = f"found {first}, and the window grows to {last}; set first below last, or kind: fixed"
        yield Misfit(("rollout", "window", "first"), problem)


def _branches_differ(config: RunConfig) -> Iterator[Misfit]:
    branch, rollout, size = config.rollout.branch, config.rollout, config.data.group_size
    if branch is None:
        return
    if rollout.silent:
        problem = "samples of a branch differ by the noise after the prefix, and there is none; set e.g. kernel: cps"
        yield Misfit(("rollout", "branch"), f"{problem} and noise_level: 0.8, or remove branch")
    if size % branch.count or size // branch.count < 2:
        problem = f"data.group_size: {size} samples make no {branch.count} equal branches of two or more"
        yield Misfit(("rollout", "branch", "count"), f"{problem}; change one of them")


def _recorded_rows_are_evaluated(config: RunConfig) -> Iterator[Misfit]:
    rows = config.data.rows
    if rows == "prompts":
        return
    if config.likelihood.kind == "reverse":
        problem = f"the images of data.rows: {rows} have no recorded denoising steps to evaluate; set kind: forward"
        yield Misfit(("likelihood", "kind"), problem)
    if config.collect.max_draws > 1:
        problem = f"data.rows: {rows} are read, not drawn, so drawing again changes nothing; set 1"
        yield Misfit(("collect", "max_draws"), problem)
    if config.advantage.normalise == "each":
        problem = f"data.rows: {rows} hold one reward a sample, and each wants those of the recipe; set total"
        yield Misfit(("advantage", "normalise"), problem)
    if config.rollout.snapshot != "current":
        problem = f"data.rows: {rows} are not sampled, so no snapshot draws them; set current"
        yield Misfit(("rollout", "snapshot"), problem)
    if config.rollout.branch is not None:
        yield Misfit(("rollout", "branch"), f"data.rows: {rows} are not sampled and share no steps; remove branch")
    if rows == "pairs" and config.data.group_size != 2:
        problem = f"found {config.data.group_size}, and a pair is a group of two; set data.group_size: 2"
        yield Misfit(("data", "group_size"), problem)


def _estimates_are_of_own_samples(config: RunConfig) -> Iterator[Misfit]:
    rows = config.data.rows
    if rows == "prompts":
        return
    for index, anchor in enumerate(config.anchors):
        if anchor.samples != "own" or config.likelihood.kind == "forward":
            continue
        drawn = f"the samples of data.rows: {rows} are not drawn by θ"
        if anchor.place != "loss":
            yield Misfit(("anchors", index, "place"), f"{drawn}, so their k1 is no KL; set loss and a full divergence")
        elif anchor.divergence in ("k2", "k3") or anchor.vocabulary == "sampled":
            key = "vocabulary" if anchor.vocabulary == "sampled" else "divergence"
            yield Misfit(("anchors", index, key), f"{drawn}, which an estimate assumes; set e.g. reverse_kl, in full")


def _anchor_settings_act(config: RunConfig) -> Iterator[Misfit]:
    for index, anchor in enumerate(config.anchors):
        if anchor.alpha != 0.5 and anchor.divergence != "alpha":
            problem = f"{anchor.divergence} has no alpha; set divergence: alpha, or remove it"
            yield Misfit(("anchors", index, "alpha"), problem)
        if anchor.vocabulary != "full" and anchor.divergence not in _OF_DISTRIBUTIONS:
            problem = f"{anchor.divergence} is no divergence of distributions over a vocabulary; remove vocabulary"
            yield Misfit(("anchors", index, "vocabulary"), problem)


def _times_in_order(config: RunConfig) -> Iterator[Misfit]:
    likelihood = config.likelihood
    if likelihood.kind == "forward" and likelihood.times.kind == "uniform":
        low, high = likelihood.times.low, likelihood.times.high
        if low >= high:
            problem = f"found low: {low:g} and high: {high:g}; low must be below high"
            yield Misfit(("likelihood", "times", "low"), problem)


def _elbo_is_defined(config: RunConfig) -> Iterator[Misfit]:
    likelihood = config.likelihood
    if likelihood.kind != "forward" or likelihood.weighting != "elbo":
        return
    if likelihood.times.kind == "grid":
        problem = "weighting: elbo divides by the density of the times, and times on a grid have none"
        yield Misfit(("likelihood", "times", "kind"), f"{problem}; set uniform or logit_normal")
    if likelihood.error != "output":
        problem = f"weighting: elbo is the error of the noise, whatever the model predicts; found {likelihood.error}"
        yield Misfit(("likelihood", "error"), f"{problem}, set output")


def _levels_are_in_range(config: RunConfig) -> Iterator[Misfit]:
    ranged: list[tuple[tuple[str | int, ...], tuple[float, ...], float]] = [
        (("train", "lr"), levels_of(config.train.lr), math.inf),
        *(
            (("anchors", i, "coefficient"), levels_of(a.coefficient), math.inf)
            for i, a in enumerate(config.anchors)
            if a.place
            != "decision"  # where one anchor may be left for another, further than it goes itself (2602.12125)
        ),
        *((("snapshots", name, "decay"), s.levels, 1.0) for name, s in config.snapshots.items()),
    ]
    for path, levels, highest in ranged:
        for level in levels:
            if not 0 <= level <= highest:
                expected = "0 or more" if highest == math.inf else f"a number from 0 to {highest:g}"
                yield Misfit(path, f"found {level:g}, expected {expected}")


_OF_DISTRIBUTIONS = (
    "reverse_kl",
    "forward_kl",
    "jensen_shannon",
    "alpha",
    "hellinger",
    "total_variation",
    "chi_squared",
)
_DIVERGENCES: Mapping[str, tuple[str, ...]] = {
    "forward": ("velocity", "weighted"),
    "reverse": ("gaussian", "velocity", "k1", "k2", "k3"),
    "tokens": ("k1", "k2", "k3", *_OF_DISTRIBUTIONS),
}
"""By likelihood, the one to advise first."""


def _divergences_exist(config: RunConfig) -> Iterator[Misfit]:
    kind = config.likelihood.kind
    for index, anchor in enumerate(config.anchors):
        if kind == "forward" and anchor.place != "loss":
            problem = (
                "a forward likelihood is a surrogate at fresh times, not the log-probability of a sample, so it cannot "
                "be taken off the reward; set place: loss and divergence: velocity, or likelihood.kind: reverse"
            )
            yield Misfit(("anchors", index, "place"), problem)
        elif anchor.divergence not in (known := _DIVERGENCES[kind]):
            problem = f"a {kind} likelihood has no {anchor.divergence} divergence; set divergence: {' or '.join(known)}"
            yield Misfit(("anchors", index, "divergence"), problem)


def _divergences_are_in_their_place(config: RunConfig) -> Iterator[Misfit]:
    if config.likelihood.kind == "forward":
        return  # which has none of these divergences
    for index, anchor in enumerate(config.anchors):
        if anchor.place == "loss" and anchor.divergence == "k1":
            exact = "gaussian" if config.likelihood.kind == "reverse" else "reverse_kl"
            problem = (
                "k1 as a loss has no expected gradient, so it would hold nothing; set place: reward, or k2 (the gradient of "
                f"KL(θ‖anchor)), k3 (of KL(anchor‖θ)) or {exact}"
            )
            yield Misfit(("anchors", index, "divergence"), problem)
        elif anchor.place != "loss" and anchor.divergence != "k1":
            problem = (
                f"found {anchor.divergence}, and only k1 in the reward has the gradient of KL(θ‖anchor): of any other the "
                "reward would miss the part that runs through its own value; set divergence: k1, or place: loss"
            )
            yield Misfit(("anchors", index, "divergence"), problem)


def _rewards_have_a_total(config: RunConfig) -> Iterator[Misfit]:
    for index, anchor in enumerate(config.anchors):
        if anchor.place == "reward" and config.advantage.normalise == "each":
            problem = (
                "advantage.normalise: each takes every reward by itself, so there is no total to take a divergence off; set "
                "place: loss, or advantage.normalise: total"
            )
            yield Misfit(("anchors", index, "place"), problem)


def _advantages_are_defined(config: RunConfig) -> Iterator[Misfit]:
    advantage = config.advantage
    if advantage.std == "beta" and advantage.baseline == "none":
        problem = (
            "std: beta divides by the density of the group's mean, which has to be taken off first; set baseline: mean"
        )
        yield Misfit(("advantage", "baseline"), problem)
    if advantage.normalise == "each" and advantage.baseline == "none":
        yield Misfit(("advantage", "baseline"), "normalise: each centres every reward in its group; set baseline: mean")
    if advantage.normalise == "each" and advantage.std != "group":
        yield Misfit(
            ("advantage", "std"), "normalise: each divides every reward by its spread in the group; set std: group"
        )
    if advantage.std == "beta" and any(anchor.place == "reward" for anchor in config.anchors):
        problem = "std: beta is for rewards in [0, 1], which they leave where an anchor is taken off them"
        yield Misfit(("advantage", "std"), f"{problem}; set another std, or place: loss")
    if advantage.positive == advantage.negative == 0:
        yield Misfit(
            ("advantage", "positive"), "positive and negative are both 0, so nothing would be learnt; raise one"
        )


def _updates_divide_groups(config: RunConfig) -> Iterator[Misfit]:
    updates, groups = config.train.updates_per_step, config.groups
    if groups % updates:
        found = f"data.prompts_per_step: {config.data.prompts_per_step}"
        branches = f" with {config.branches} branches each" if config.branches > 1 else ""
        problem = f"an update takes whole groups, and {found}{branches} is no multiple of {updates}"
        yield Misfit(("train", "updates_per_step"), problem)


def _old_stays_old(config: RunConfig) -> Iterator[Misfit]:
    likelihood, updates = config.likelihood, config.train.updates_per_step
    if updates > 1 and likelihood.old == "detach" and not ignores_old(config):
        better = "recompute and snapshots: {old: {decay: 0.0}}" if likelihood.kind == "forward" else "recorded"
        problem = f"detach moves ℓ_old with each of the {updates} updates of a step; set {better}"
        yield Misfit(("likelihood", "old"), problem)
    if likelihood.old == "recompute" and "old" not in config.snapshots:
        problem = "recompute needs a snapshot named old; add snapshots: {old: {decay: 0.0}}"
        yield Misfit(("likelihood", "old"), problem)


def _snapshots_exist(config: RunConfig) -> Iterator[Misfit]:
    known = list(dict.fromkeys(["base", *config.snapshots]))
    uses: list[tuple[tuple[str | int, ...], str, list[str]]] = [
        (("rollout", "snapshot"), config.rollout.snapshot, ["current", *known]),
        *((("anchors", i, "to"), anchor.to, [*known, *config.teachers]) for i, anchor in enumerate(config.anchors)),
    ]
    if config.likelihood.kind == "forward" and config.likelihood.noise.kind == "inversion":
        uses.append((("likelihood", "noise", "snapshot"), config.likelihood.noise.snapshot, ["current", *known]))
    for path, name, expected in uses:
        if name not in expected:
            problem = f"{name!r} is no snapshot; expected {' or '.join(expected)}, or declare it in snapshots"
            yield Misfit(path, problem)
    for name in ("base", "current"):
        if name in config.snapshots:
            yield Misfit(("snapshots", name), f"the name {name} is taken; choose another, such as ema")


def _one_anchor_a_target(config: RunConfig) -> Iterator[Misfit]:
    targets = [anchor.label for anchor in config.anchors]
    for index, target in enumerate(targets):
        if target in targets[:index]:
            problem = f"a second anchor to {config.anchors[index].to!r} under the same guidance; give each once"
            yield Misfit(("anchors", index, "to"), problem)


def _mixtures_have_old(config: RunConfig) -> Iterator[Misfit]:
    likelihood = config.likelihood
    if likelihood.kind == "forward" and likelihood.mix is not None and likelihood.old != "recompute":
        yield Misfit(("likelihood", "mix"), "mixtures are made with old weights; set likelihood.old: recompute")


def _groups_can_be_compared(config: RunConfig) -> Iterator[Misfit]:
    """A sample without others of its prompt has no baseline; where nothing asks for one, it may stand alone."""
    if config.data.group_size > 1 or config.data.rows == "pairs":
        return
    advantage = config.advantage
    plain = advantage.baseline == "none" and advantage.std in ("global", "none")
    silent = config.data.rows == "prompts" and all(reward.silent for reward in config.rewards)
    charged = any(anchor.place == "reward" for anchor in config.anchors)
    if config.objective.kind in ("centred", "preference", "anchored_preference"):
        reason = f"{config.objective.kind} compares the samples of a prompt"
    elif plain or (silent and not charged):
        return
    else:
        reason = "advantages compare the samples of a prompt"
    yield Misfit(
        ("data", "group_size"),
        f"found 1, and {reason}; set 2 or more (1 is for rewards of weight 0, learning from anchors alone, or for "
        "advantage: {baseline: none, std: none})",
    )


def _draws_differ_by_a_reward(config: RunConfig) -> Iterator[Misfit]:
    by = config.collect.by
    if by is None:
        return
    known = [reward.label for reward in config.rewards if not reward.silent]
    if by not in known:
        problem = f"{by!r} is no reward with a weight (found {', '.join(known) or 'none'})"
        yield Misfit(("collect", "by"), f"{problem}; name one, or remove by: groups then differ in the weighted sum")
    elif config.collect.max_draws == 1:
        yield Misfit(("collect", "by"), "groups are drawn once; set collect.max_draws above 1, or remove by")


def _something_is_learnt(config: RunConfig) -> Iterator[Misfit]:
    """Rewards of weight 0 are reported, and a run may learn from anchors alone: from those to weights θ does not begin with."""
    if config.data.rows != "prompts" or not all(reward.silent for reward in config.rewards):
        return
    begins_elsewhere = config.model.train == "lora" and config.model.lora.warm_start is not None
    if not (begins_elsewhere and config.anchors) and not any(a.to in config.teachers for a in config.anchors):
        problem = "every reward has weight 0, and θ begins where every anchor is, so there is nothing to learn from"
        yield Misfit(("rewards", 0, "weight"), f"{problem}; raise one, or add an anchor to a teacher")
    if config.collect.max_draws > 1:
        problem = "groups are drawn again until their rewards differ, which rewards of weight 0 never do; set 1"
        yield Misfit(("collect", "max_draws"), problem)


def _rewards_have_own_names(config: RunConfig) -> Iterator[Misfit]:
    seen: set[str] = set()
    for section, rewards in (("rewards", config.rewards), ("watch", config.watch)):
        for index, reward in enumerate(rewards):
            if reward.label in seen:
                problem = f"a second reward called {reward.label!r}; metrics could not tell them apart; set label"
                yield Misfit((section, index), problem)
            seen.add(reward.label)


def _guard_has_something_to_guard(config: RunConfig) -> Iterator[Misfit]:
    guard, watched = config.guard, [reward.label for reward in config.watch]
    if guard is None:
        return
    if config.data.evaluation is None or config.eval.every == 0:
        yield Misfit(("guard",), "it compares evaluations; set data.evaluation and an eval.every above 0")
    for index, name in enumerate(guard.rewards or []):
        if name not in watched:
            known = ", ".join(watched) or "none"
            problem = f"{name!r} is no watched reward (watched: {known}); add it to watch"
            yield Misfit(("guard", "rewards", index), problem)
    if guard.diversity is None and not (watched if guard.rewards is None else guard.rewards):
        yield Misfit(("guard",), "nothing is guarded; add a reward to watch, or set guard.diversity: 0.25")


_CHECKS: tuple[Callable[[RunConfig], Iterator[Misfit]], ...] = (
    _kernel_takes_noise_level,
    _solver_or_kernel,
    _reverse_has_noise,
    _window_fits,
    _branches_differ,
    _inversion_fits,
    _recorded_rows_are_evaluated,
    _estimates_are_of_own_samples,
    _anchor_settings_act,
    _times_in_order,
    _elbo_is_defined,
    _levels_are_in_range,
    _divergences_exist,
    _divergences_are_in_their_place,
    _rewards_have_a_total,
    _advantages_are_defined,
    _updates_divide_groups,
    _old_stays_old,
    _snapshots_exist,
    _one_anchor_a_target,
    _mixtures_have_old,
    objective_misfits,
    text_misfits,
    rehearsal_misfits,
    _groups_can_be_compared,
    _draws_differ_by_a_reward,
    reward_misfits,
    _something_is_learnt,
    _rewards_have_own_names,
    _guard_has_something_to_guard,
)
