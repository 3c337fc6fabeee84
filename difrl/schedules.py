"""From the schedule a recipe writes to the coefficient the core understands."""

from __future__ import annotations

from difrl.config import ConstantSchedule, CosineSchedule, LinearSchedule, Schedule
from difrl.core import Coefficient, Constant, Cosine, Linear


def coefficient(schedule: Schedule, total_steps: int) -> Coefficient:
    """The coefficient of a schedule; where it names no length it spans the run."""
    match schedule:
        case ConstantSchedule(value=value, warmup=warmup):
            return Constant(value, warmup)
        case LinearSchedule(start=start, end=end, steps=steps, warmup=warmup):
            return Linear(start, end, steps or total_steps, warmup)
        case CosineSchedule(start=start, end=end, steps=steps, warmup=warmup):
            return Cosine(start, end, steps or total_steps, warmup)
        case _:
            return Constant(float(schedule))
