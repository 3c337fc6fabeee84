"""Conflicts of the settings between rewards and loss: totals, baselines, dynamic sampling."""

from __future__ import annotations

from collections.abc import Iterator

from difrl.config.checks.conflict import ConfigConflict
from difrl.config.schema.run import RunSections


def check_advantages(config: RunSections) -> Iterator[ConfigConflict]:
    """Yield the conflicts of this part of a config."""
    yield from _rewards_have_a_total(config)
    yield from _advantages_are_defined(config)
    yield from _groups_can_be_compared(config)
    yield from _draws_differ_by_a_reward(config)
    yield from _something_is_learnt(config)


def _rewards_have_a_total(config: RunSections) -> Iterator[ConfigConflict]:
    for index, anchor in enumerate(config.anchors):
        if anchor.place == "reward" and config.advantage.normalise == "each":
            problem = (
                "advantage.normalise: each normalises every reward separately, so there is no total to subtract a divergence "
                "from; set place: loss, or advantage.normalise: total"
            )
            yield ConfigConflict(("anchors", index, "place"), problem)


def _advantages_are_defined(config: RunSections) -> Iterator[ConfigConflict]:
    advantage = config.advantage
    if advantage.std == "beta" and advantage.baseline == "none":
        problem = (
            "std: beta divides by the density of the group's mean, which must be subtracted first; set baseline: mean"
        )
        yield ConfigConflict(("advantage", "baseline"), problem)
    if advantage.normalise == "each" and advantage.baseline == "none":
        yield ConfigConflict(
            ("advantage", "baseline"), "normalise: each centres every reward within its group; set baseline: mean"
        )
    if advantage.normalise == "each" and advantage.std != "group":
        yield ConfigConflict(
            ("advantage", "std"), "normalise: each divides every reward by its spread in the group; set std: group"
        )
    if advantage.std == "beta" and any(anchor.place == "reward" for anchor in config.anchors):
        problem = "std: beta is for rewards in [0, 1], and subtracting an anchor leaves this range"
        yield ConfigConflict(("advantage", "std"), f"{problem}; set another std, or place: loss")
    if advantage.positive == advantage.negative == 0:
        yield ConfigConflict(
            ("advantage", "positive"), "positive and negative are both 0, so nothing would be learnt; raise one of them"
        )


def _groups_can_be_compared(config: RunSections) -> Iterator[ConfigConflict]:
    """A group of one sample has no baseline. It is allowed where none is needed."""
    if config.data.group_size > 1 or config.data.rows == "pairs":
        return
    advantage = config.advantage
    plain = advantage.baseline == "none" and advantage.std in ("global", "none")
    silent = config.data.rows == "prompts" and all(reward.silent for reward in config.rewards)
    penalised = any(anchor.place == "reward" for anchor in config.anchors)
    if config.objective.compares:
        reason = f"{config.objective.kind} compares the samples of a prompt"
    elif plain or (silent and not penalised):
        return
    else:
        reason = "advantages compare the samples of a prompt"
    yield ConfigConflict(
        ("data", "group_size"),
        f"found 1, and {reason}; set 2 or more (1 is for rewards of weight 0, learning from anchors alone, or for "
        "advantage: {baseline: none, std: none})",
    )


def _draws_differ_by_a_reward(config: RunSections) -> Iterator[ConfigConflict]:
    by = config.collect.by
    if by is None:
        return
    known = [reward.label for reward in config.rewards if not reward.silent]
    if by not in known:
        problem = f"{by!r} is not a reward with a weight (found {', '.join(known) or 'none'})"
        yield ConfigConflict(
            ("collect", "by"), f"{problem}; name one, or remove by: then groups must differ in the weighted sum"
        )
    elif config.collect.max_draws == 1:
        yield ConfigConflict(("collect", "by"), "groups are drawn once; set collect.max_draws above 1, or remove by")


def _something_is_learnt(config: RunSections) -> Iterator[ConfigConflict]:
    """A run whose rewards have weight 0 can still learn from anchors to other weights than the initial θ."""
    if config.data.rows != "prompts" or not all(reward.silent for reward in config.rewards):
        return
    begins_elsewhere = config.model.train == "lora" and config.model.lora.warm_start is not None
    if not (begins_elsewhere and config.anchors) and not any(a.to in config.teachers for a in config.anchors):
        problem = "every reward has weight 0, and every anchor is at the initial θ, so there is nothing to learn from"
        yield ConfigConflict(("rewards", 0, "weight"), f"{problem}; raise one, or add an anchor to a teacher")
    if config.collect.max_draws > 1:
        problem = "groups are drawn again until their rewards differ, and rewards of weight 0 never differ; set 1"
        yield ConfigConflict(("collect", "max_draws"), problem)
