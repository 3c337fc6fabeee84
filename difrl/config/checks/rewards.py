"""What shapes, ensembles and weights of rewards ask of the other parts of a recipe."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from difrl.config.checks.conflict import ConfigConflict

if TYPE_CHECKING:
    from difrl.config.schema.run import RunSections as RunConfig

Path = tuple[str | int, ...]
COMPARING = ("par", "log_sigmoid")


def check_rewards(config: RunConfig) -> Iterator[ConfigConflict]:
    """All that does not go with the rewards."""
    yield from _references_are_compared_with(config)
    yield from _references_stay(config)
    yield from _compared_are_on_one_scale(config)
    yield from _recorded_rewards_stay(config)
    yield from _watched_are_as_they_are(config)
    yield from _verifiers_are_single(config)
    yield from _shapes_act(config)
    yield from _shapes_stay_in_range(config)
    yield from _multipliers_have_a_mean(config)


def _references_are_compared_with(config: RunConfig) -> Iterator[ConfigConflict]:
    compared = [(path, kind) for path, kind in _shapes(config) if kind in COMPARING]
    if config.references is None:
        for path, kind in compared:
            problem = f"{kind} compares with reference samples of each prompt; set references: {{count: 5}}"
            yield ConfigConflict(path, problem)
    elif not compared:
        problem = "no reward compares with reference samples; remove it, or set shape: {kind: par} of one"
        yield ConfigConflict(("references",), problem)


def _references_stay(config: RunConfig) -> Iterator[ConfigConflict]:
    """Rewards of the trained model are compared with one and the same thing from the first step to the last."""
    if config.references is None or config.references.snapshot == "base":
        return
    name = config.references.snapshot
    still = [key for key, s in config.snapshots.items() if s.kind == "decay" and s.decay == 1.0]
    if name not in still:
        known = " or ".join(["base", *still])
        problem = (
            f"{name!r} is no snapshot that stays what it is; expected {known}, or snapshots: {{{name}: {{decay: 1.0}}}}"
        )
        yield ConfigConflict(("references", "snapshot"), problem)


def _compared_are_on_one_scale(config: RunConfig) -> Iterator[ConfigConflict]:
    for index, reward in enumerate(config.rewards):
        if reward.shape is None or reward.shape.kind not in COMPARING:
            continue
        for place, member in enumerate(reward.ensemble or []):
            if member.shape is not None and member.shape.kind == "min_max" and member.shape.low is None:
                problem = (
                    "without bounds the samples of a group are put on a range of their own, and its reference samples on "
                    f"another, which {reward.shape.kind} then cannot compare; give min_max low and high"
                )
                yield ConfigConflict(("rewards", index, "ensemble", place, "shape"), problem)


def _recorded_rewards_stay(config: RunConfig) -> Iterator[ConfigConflict]:
    rows = config.data.rows
    if rows == "prompts":
        return
    said: list[Path] = [path for path, _ in _shapes(config)]
    said += [("rewards", i, "weight") for i, reward in enumerate(config.rewards) if reward.varies]
    for path in said:
        problem = f"data.rows: {rows} bring the rewards that are learnt from, which it would not change; remove it"
        yield ConfigConflict(path, problem)
    if config.references is not None:
        yield ConfigConflict(("references",), f"the rewards of data.rows: {rows} are compared with nothing; remove it")


def _watched_are_as_they_are(config: RunConfig) -> Iterator[ConfigConflict]:
    for index, reward in enumerate(config.watch):
        if reward.shapes:
            yield ConfigConflict(
                ("watch", index), "a watched reward is reported as it is, and it or a member has a shape; remove it"
            )
        if reward.varies:
            yield ConfigConflict(
                ("watch", index, "weight"), "a watched reward is in no sum, so a weight does nothing; remove it"
            )


def _verifiers_are_single(config: RunConfig) -> Iterator[ConfigConflict]:
    for index, reward in enumerate(config.rewards):
        if reward.ensemble is not None and reward.shape is not None and reward.shape.kind == "noise":
            problem = "noise corrects a verifier that says 0 or 1, which an ensemble does not; give it to the members"
            yield ConfigConflict(("rewards", index, "shape"), problem)


def _shapes_act(config: RunConfig) -> Iterator[ConfigConflict]:
    """An affine map of the only reward cancels in a centred advantage that a standard deviation divides."""
    advantage, loud = config.advantage, [reward for reward in config.rewards if not reward.silent]
    divided = advantage.std in ("group", "global") and advantage.baseline != "none"
    alone = len(loud) == 1 and not any(anchor.place == "reward" for anchor in config.anchors)
    for index, reward in enumerate(config.rewards):
        shape = reward.shape
        if shape is None or shape.kind not in ("noise", "min_max") or reward.silent or reward.varies or not divided:
            continue
        if shape.kind == "min_max" and shape.low is None and advantage.std == "global":
            continue  # every group has a map of its own
        if alone or advantage.normalise == "each":
            problem = (
                f"{shape.kind} is affine, and advantages that are centred and divided by a standard deviation do not see it; "
                "set advantage.std: none, or remove the shape"
            )
            yield ConfigConflict(("rewards", index, "shape"), problem)


def _shapes_stay_in_range(config: RunConfig) -> Iterator[ConfigConflict]:
    for path, kind in _shapes(config):
        if config.advantage.std == "beta" and kind in ("noise", "log_sigmoid"):
            yield ConfigConflict(
                path, f"advantage.std: beta is for rewards in [0, 1], which {kind} leaves; set another std"
            )


def _multipliers_have_a_mean(config: RunConfig) -> Iterator[ConfigConflict]:
    for index, reward in enumerate(config.rewards):
        if not reward.adapts:
            continue
        path = ("rewards", index, "weight", "kind")
        if config.advantage.normalise == "each":
            problem = (
                "a multiplier weighs a reward against the others in their own units, which advantage.normalise: each "
                "divides out; set total"
            )
            yield ConfigConflict(path, problem)
        elif len(config.rewards) == 1 and not config.anchors:
            problem = "a multiplier weighs a reward against others, or an anchor, and there is none; give a number"
            yield ConfigConflict(path, problem)


def _shapes(config: RunConfig) -> Iterator[tuple[Path, str]]:
    """Every shape of an optimised reward: where it stands, and its kind."""
    for index, reward in enumerate(config.rewards):
        if reward.shape is not None:
            yield ("rewards", index, "shape"), reward.shape.kind
        for place, member in enumerate(reward.ensemble or []):
            if member.shape is not None:
                yield ("rewards", index, "ensemble", place, "shape"), member.shape.kind
