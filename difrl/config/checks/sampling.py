"""Conflicts of sampling: kernels, solvers, windows, branches."""

from __future__ import annotations

from collections.abc import Iterator

from difrl.config.checks.conflict import ConfigConflict
from difrl.config.schema.kernels import KERNEL_ENTRIES
from difrl.config.schema.rollout import RolloutConfig
from difrl.config.schema.run import RunSections


def check_sampling(config: RunSections) -> Iterator[ConfigConflict]:
    """Yield the conflicts of this part of a config."""
    yield from _kernel_takes_noise_level(config)
    yield from _solver_or_kernel(config)
    yield from _reverse_has_noise(config)
    yield from _window_fits(config)
    yield from _branches_differ(config)
    yield from _precision_fits(config)
    yield from _correction_has_effect(config)


def _kernel_takes_noise_level(config: RunSections) -> Iterator[ConfigConflict]:
    kernel, noise_level = config.rollout.kernel, config.rollout.noise_level
    highest = KERNEL_ENTRIES[kernel].highest_noise
    if noise_level > highest:
        advice = "has no noise; set 0, or another kernel" if highest == 0 else f"takes at most {highest:g}"
        yield ConfigConflict(("rollout", "noise_level"), f"found {noise_level:g}, and the kernel {kernel} {advice}")


def _solver_or_kernel(config: RunSections) -> Iterator[ConfigConflict]:
    solver, kernel = config.rollout.solver, config.rollout.kernel
    if solver is not None and config.likelihood.kind == "reverse":
        problem = f"a reverse likelihood needs a stochastic kernel, found the solver {solver}"
        yield ConfigConflict(("rollout", "solver"), f"{problem}; remove it, or set likelihood.kind: forward")
    elif solver is not None and kernel != "ode":
        problem = f"{solver} would replace rollout.kernel: {kernel}"
        yield ConfigConflict(("rollout", "solver"), f"{problem}; remove it, or set kernel: ode and noise_level: 0")


def _reverse_has_noise(config: RunSections) -> Iterator[ConfigConflict]:
    rollout = config.rollout
    if config.likelihood.kind == "reverse" and rollout.silent and rollout.solver is None:
        found = f"kernel: {rollout.kernel} with noise_level: {rollout.noise_level:g}"
        advice = "set e.g. kernel: flow_sde and noise_level: 0.7"
        key = "kernel" if rollout.kernel == "ode" else "noise_level"
        yield ConfigConflict(("rollout", key), f"a reverse likelihood needs noise, found {found}; {advice}")


def _window_fits(config: RunSections) -> Iterator[ConfigConflict]:
    window, steps = config.rollout.window, config.rollout.steps
    if window.kind == "all":
        return
    if config.rollout.silent:
        problem = f"kind: {window.kind} selects steps with noise, and the sampler has none; set kind: all, or a kernel"
        yield ConfigConflict(("rollout", "window", "kind"), f"{problem} such as flow_sde with a noise_level")
    elif window.kind == "progressive":
        yield from _progressive_window_fits(window.first, window.last or steps - 1, steps)
    elif window.kind == "fixed":
        yield from _placed_window_fits(window.start, window.size, steps - 1, steps)
    else:
        yield from _placed_window_fits(window.start, window.size, window.end or steps - 1, steps)


def _placed_window_fits(start: int, size: int, end: int, steps: int) -> Iterator[ConfigConflict]:
    if end > steps - 1:
        problem = f"found {end}, and the last of rollout.steps: {steps} is never stochastic; set at most {steps - 1}"
        yield ConfigConflict(("rollout", "window", "end"), problem)
    elif start + size > end:
        problem = (
            f"{size} step(s) from step {start} do not end before step {end} of rollout.steps: {steps}, whose last step is "
            "never stochastic; make the window smaller, or start it earlier"
        )
        yield ConfigConflict(("rollout", "window"), problem)


def _progressive_window_fits(first: int, last: int, steps: int) -> Iterator[ConfigConflict]:
    if last > steps - 1:
        problem = f"found {last}, and the last of rollout.steps: {steps} is never stochastic; set at most {steps - 1}"
        yield ConfigConflict(("rollout", "window", "last"), problem)
    elif first > last:
        problem = f"found {first}, and the window grows to {last}; set first below last, or kind: fixed"
        yield ConfigConflict(("rollout", "window", "first"), problem)


def _branches_differ(config: RunSections) -> Iterator[ConfigConflict]:
    branch, rollout, size = config.rollout.branch, config.rollout, config.data.group_size
    if branch is None:
        return
    if rollout.silent:
        problem = (
            "samples of a branch differ by the noise after the prefix, and the sampler has none; set e.g. kernel: cps"
        )
        yield ConfigConflict(("rollout", "branch"), f"{problem} and noise_level: 0.8, or remove branch")
    if size % branch.count or size // branch.count < 2:
        problem = f"data.group_size: {size} samples cannot form {branch.count} equal branches of two or more"
        yield ConfigConflict(("rollout", "branch", "count"), f"{problem}; change one of them")


def _precision_fits(config: RunSections) -> Iterator[ConfigConflict]:
    path, kind, decisions = ("rollout", "precision"), config.likelihood.kind, config.objective.reduction
    if config.rollout.precision == "same":
        return
    if config.data.rows != "prompts":
        problem = f"the samples of data.rows: {config.data.rows} are read from a file, so none are drawn; set same"
        yield ConfigConflict(path, problem)
    elif kind != "forward" and decisions != "each":
        problem = f"importance weights of decisions do not apply to the {decisions} over those of a sample; set same"
        yield ConfigConflict(path, f"{problem}, or objective.decisions: each")
    if config.model.shard != "none":
        problem = f"found model.shard: {config.model.shard}, and FSDP2 cannot gather quantised weights; set same, or shard: none"
        yield ConfigConflict(path, problem)


def _correction_has_effect(config: RunSections) -> Iterator[ConfigConflict]:
    rollout, kind = config.rollout, config.likelihood.kind
    if kind == "tokens" or rollout.correction == RolloutConfig.model_fields["correction"].default:
        return
    if kind == "forward":
        problem = "a forward likelihood uses no density of the sampler, so there is nothing to correct by; remove it"
        yield ConfigConflict(("rollout", "correction"), problem)
    elif rollout.precision == "same":
        problem = "the samples are drawn in the precision of the update, so nothing is corrected; remove it"
        yield ConfigConflict(("rollout", "correction"), f"{problem}, or set rollout.precision: int8")
