"""Conflicts of shapes, ensembles and weights of rewards with the other parts of a recipe."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from difrl.config.checks.conflict import ConfigConflict
from difrl.config.schema.base import KeyPath
from difrl.config.schema.rewards import SampledFrames
from difrl.config.schema.run import RunSections

COMPARING = ("par", "log_sigmoid")


def check_rewards(config: RunSections) -> Iterator[ConfigConflict]:
    """Yield the conflicts of this part of a config."""
    yield from _frames_are_of_videos(config)
    yield from _references_are_used(config)
    yield from _references_never_change(config)
    yield from _compared_rewards_share_a_scale(config)
    yield from _recorded_rewards_are_unchanged(config)
    yield from _watched_rewards_are_plain(config)
    yield from _noise_corrects_single_verifiers(config)
    yield from _shapes_have_effect(config)
    yield from _shapes_stay_in_range(config)
    yield from _multipliers_have_a_mean(config)


def _frames_are_of_videos(config: RunSections) -> Iterator[ConfigConflict]:
    for section, rewards in (("rewards", config.rewards), ("watch", config.watch)):
        for index, reward in enumerate(rewards):
            for place, member in enumerate(reward.members):
                path: KeyPath = (section, index) if reward.ensemble is None else (section, index, "ensemble", place)
                problem = _find_frames_problem(member.frames, config.rollout.frames)
                if problem is not None:
                    yield ConfigConflict((*path, "frames"), problem)


def _find_frames_problem(scored: Literal["mean", "worst"] | SampledFrames | None, drawn: int | None) -> str | None:
    if scored is None:
        return None
    if drawn is None:
        return "frames is for videos, and the samples of this run have none; remove it, or set rollout.frames"
    if isinstance(scored, SampledFrames) and scored.sample > drawn:
        return f"found {scored.sample} sampled frames, and videos have rollout.frames: {drawn}; sample at most {drawn}"
    return None


def _references_are_used(config: RunSections) -> Iterator[ConfigConflict]:
    compared = [(path, kind) for path, kind in _shapes(config) if kind in COMPARING]
    if config.references is None:
        for path, kind in compared:
            problem = f"{kind} compares with reference samples of each prompt; set references: {{count: 5}}"
            yield ConfigConflict(path, problem)
    elif not compared:
        problem = "no reward compares with reference samples; remove references, or set shape: {kind: par} of a reward"
        yield ConfigConflict(("references",), problem)


def _references_never_change(config: RunSections) -> Iterator[ConfigConflict]:
    """Rewards are compared with samples of the same weights from the first step to the last."""
    if config.references is None or config.references.snapshot == "base":
        return
    name = config.references.snapshot
    constant = [key for key, s in config.snapshots.items() if s.kind == "decay" and s.decay == 1.0]
    if name not in constant:
        known = " or ".join(["base", *constant])
        problem = (
            f"{name!r} is not a snapshot that never changes; expected {known}, or snapshots: {{{name}: {{decay: 1.0}}}}"
        )
        yield ConfigConflict(("references", "snapshot"), problem)


def _compared_rewards_share_a_scale(config: RunSections) -> Iterator[ConfigConflict]:
    for index, reward in enumerate(config.rewards):
        if reward.shape is None or reward.shape.kind not in COMPARING:
            continue
        for place, member in enumerate(reward.ensemble or []):
            if member.shape is not None and member.shape.kind == "min_max" and member.shape.low is None:
                problem = (
                    "without bounds the samples of a group and its reference samples are scaled differently, so "
                    f"{reward.shape.kind} cannot compare them; give min_max low and high"
                )
                yield ConfigConflict(("rewards", index, "ensemble", place, "shape"), problem)


def _recorded_rewards_are_unchanged(config: RunSections) -> Iterator[ConfigConflict]:
    rows = config.data.rows
    if rows == "prompts":
        return
    given: list[KeyPath] = [path for path, _ in _shapes(config)]
    given += [("rewards", i, "weight") for i, reward in enumerate(config.rewards) if reward.varies]
    for path in given:
        problem = f"data.rows: {rows} have recorded rewards, which this key would not change; remove it"
        yield ConfigConflict(path, problem)
    if config.references is not None:
        yield ConfigConflict(
            ("references",), f"the rewards of data.rows: {rows} are not compared with references; remove it"
        )


def _watched_rewards_are_plain(config: RunSections) -> Iterator[ConfigConflict]:
    for index, reward in enumerate(config.watch):
        if reward.shapes:
            yield ConfigConflict(
                ("watch", index),
                "a watched reward is reported without shapes, and the reward or a member has one; remove it",
            )
        if reward.varies:
            yield ConfigConflict(
                ("watch", index, "weight"),
                "a watched reward is not part of the sum, so its weight has no effect; remove it",
            )


def _noise_corrects_single_verifiers(config: RunSections) -> Iterator[ConfigConflict]:
    for index, reward in enumerate(config.rewards):
        if reward.ensemble is not None and reward.shape is not None and reward.shape.kind == "noise":
            problem = "noise corrects a binary verifier, which an ensemble is not; give the shape to the members"
            yield ConfigConflict(("rewards", index, "shape"), problem)


def _shapes_have_effect(config: RunSections) -> Iterator[ConfigConflict]:
    """An affine map of a single reward cancels in advantages that are centred and divided by a standard deviation."""
    advantage, weighted = config.advantage, [reward for reward in config.rewards if not reward.silent]
    divided = advantage.std in ("group", "global") and advantage.baseline != "none"
    alone = len(weighted) == 1 and not any(anchor.place == "reward" for anchor in config.anchors)
    for index, reward in enumerate(config.rewards):
        shape = reward.shape
        if shape is None or shape.kind not in ("noise", "min_max") or reward.silent or reward.varies or not divided:
            continue
        if shape.kind == "min_max" and shape.low is None and advantage.std == "global":
            continue  # every group has its own map
        if alone or advantage.normalise == "each":
            problem = (
                f"{shape.kind} is affine, and cancels in advantages that are centred and divided by a standard deviation; "
                "set advantage.std: none, or remove the shape"
            )
            yield ConfigConflict(("rewards", index, "shape"), problem)


def _shapes_stay_in_range(config: RunSections) -> Iterator[ConfigConflict]:
    for path, kind in _shapes(config):
        if config.advantage.std == "beta" and kind in ("noise", "log_sigmoid"):
            yield ConfigConflict(
                path, f"advantage.std: beta is for rewards in [0, 1], which {kind} leaves; set another std"
            )


def _multipliers_have_a_mean(config: RunSections) -> Iterator[ConfigConflict]:
    for index, reward in enumerate(config.rewards):
        if not reward.adapts:
            continue
        path = ("rewards", index, "weight", "kind")
        if config.advantage.normalise == "each":
            problem = (
                "a multiplier balances rewards in their own units, which advantage.normalise: each removes; set total"
            )
            yield ConfigConflict(path, problem)
        elif len(config.rewards) == 1 and not config.anchors:
            problem = (
                "a multiplier balances a reward against other rewards or anchors, and there are none; give a number"
            )
            yield ConfigConflict(path, problem)


def _shapes(config: RunSections) -> Iterator[tuple[KeyPath, str]]:
    """Yield the path and the kind of every shape of an optimised reward."""
    for index, reward in enumerate(config.rewards):
        if reward.shape is not None:
            yield ("rewards", index, "shape"), reward.shape.kind
        for place, member in enumerate(reward.ensemble or []):
            if member.shape is not None:
                yield ("rewards", index, "ensemble", place, "shape"), member.shape.kind
