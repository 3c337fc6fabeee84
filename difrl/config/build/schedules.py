"""From what a recipe writes to the coefficient the core understands: of anchors, rewards, learning rates and snapshots."""

from __future__ import annotations

from difrl.config import (
    AnchorCoefficient,
    ConstantSchedule,
    CosineSchedule,
    DecaySnapshot,
    LinearSchedule,
    ResetSnapshot,
    RewardAdaptiveCoefficient,
    RewardWeight,
    SnapshotConfig,
    SoupSnapshot,
    TargetKLCoefficient,
    ThresholdWeight,
    TrainConfig,
)
from difrl.core import (
    Coefficient,
    Constant,
    Cosine,
    InUpdates,
    Linear,
    Multiplier,
    Reset,
    RewardAdaptive,
    Soup,
    TargetKL,
)


def coefficient(schedule: AnchorCoefficient | RewardWeight, total: int) -> Coefficient:
    """The coefficient of a schedule; where it names no length it spans the run, `total` of what it counts."""
    match schedule:
        case ConstantSchedule(value=value, warmup=warmup):
            return Constant(value, warmup)
        case LinearSchedule(start=start, end=end, steps=steps, warmup=warmup, hold=hold):
            return Linear(start, end, steps or total, warmup, hold)
        case CosineSchedule(start=start, end=end, steps=steps, warmup=warmup, hold=hold):
            return Cosine(start, end, steps or total, warmup, hold)
        case TargetKLCoefficient(start=start, target=target, gain=gain, bound=bound):
            return TargetKL(start, target, gain, bound)
        case ThresholdWeight(threshold=threshold, at_least=at_least, start=start, rate=rate, highest=highest):
            return Multiplier(start, threshold, at_least is not None, rate, highest)
        case RewardAdaptiveCoefficient(value=value, floor=floor, limit=limit):
            return RewardAdaptive(coefficient(value, total), floor, limit)
        case _:
            return Constant(float(schedule))


def decay(snapshot: SnapshotConfig, train: TrainConfig) -> Coefficient:
    """The decay of a snapshot at each step. Its own schedules count optimizer updates."""
    match snapshot:
        case SoupSnapshot(every=every):
            return Soup(every)
        case ResetSnapshot(every=every):
            return Reset(every)
        case DecaySnapshot(decay=schedule):
            updates = train.updates_per_step
            return InUpdates(coefficient(schedule, train.steps * updates), updates)
