"""What a reward is, and the one function through which rewards are called.

A reward is a callable ``(samples, prompts, metadata) -> Scores`` with a name and a list of what it needs. A
row that cannot be scored (no quoted text for an OCR reward, no metadata for GenEval) is *invalid*; it is
never scored 0, because a 0 would enter the group's baseline as if the sample were bad. A reward that breaks
raises; `score` says where.
"""

from __future__ import annotations

import sysconfig
import traceback
from collections.abc import Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

_NOT_THEIRS = [str(Path(__file__).parent), *map(sysconfig.get_path, ("stdlib", "purelib", "platlib"))]
Samples = Tensor | Sequence[str]
Metadata = Sequence[Mapping[str, Any]]


class Scores(NamedTuple):
    """The result of a reward for B samples."""

    values: Tensor  # [B] float32; what stands in an invalid row means nothing
    valid: Tensor  # [B] bool; False: this row could not be scored


Answer = Scores | Tensor | Sequence[float | None]
"""What a reward may return: scores, one number a sample, or a list in which None marks an invalid row."""


@runtime_checkable
class Reward(Protocol):
    """A scorer of images or texts. Rewards load lazily, batch themselves and run without gradient."""

    @property
    def name(self) -> str:
        """What errors call it."""
        ...

    @property
    def needs(self) -> tuple[str, ...]:
        """`images` or `texts`, then `prompts` and `metadata` where they are read."""
        ...

    def __call__(self, samples: Any, prompts: Sequence[str], metadata: Metadata) -> Answer:
        """Score ``samples``: images [B,3,H,W] in [0,1], or B texts. In a list None marks an invalid row."""
        ...

    def to(self, device: torch.device | str) -> Reward:
        """Move what the reward holds to ``device``; returns the reward."""
        ...


class RewardError(RuntimeError):
    """A reward broke. Carries the reward's name and, where one row is to blame, its index and prompt."""

    def __init__(self, name: str, problem: str, row: int | None = None, prompt: str | None = None) -> None:
        self.name, self.row, self.prompt = name, row, prompt
        where = "" if row is None else f" at row {row} (prompt {prompt!r})"
        super().__init__(f"reward '{name}' failed{where}: {problem}")


def all_valid(values: Tensor) -> Scores:
    """Scores in which every row counts."""
    values = values.to(torch.float32)
    return Scores(values, torch.ones(values.shape, dtype=torch.bool, device=values.device))


def check_images(images: Samples, name: str) -> Tensor:
    """Return ``images`` clamped to [0,1] if they are [B,3,H,W] floats, else raise."""
    if not isinstance(images, Tensor):
        found = "texts" if all(isinstance(one, str) for one in images) else type(images).__name__
        raise ValueError(f"reward '{name}' expects float images [B,3,H,W] in [0,1], found {found}")
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise ValueError(
            f"reward '{name}' expects float images [B,3,H,W] in [0,1], found {images.dtype} {tuple(images.shape)}"
        )
    return images.detach().float().clamp(0.0, 1.0)


def check_texts(samples: Samples, name: str) -> Sequence[str]:
    """Return ``samples`` if they are texts, else raise."""
    if isinstance(samples, str | Tensor) or not all(isinstance(text, str) for text in samples):
        raise ValueError(f"reward '{name}' expects a sequence of texts, found {type(samples).__name__}")
    return samples


def score(reward: Reward, samples: Samples, prompts: Sequence[str], metadata: Metadata) -> Scores:
    """Call ``reward`` and check its answer: for each of the B samples a finite value or the mark invalid.

    Everything that goes wrong, inside the reward or in what it returns, is a `RewardError` naming the reward,
    and the row and prompt where they are known. Invalid rows come back with value 0 so that no stray NaN can
    spread.
    """
    count = len(samples)
    if not count == len(prompts) == len(metadata):
        problem = f"{count} samples, {len(prompts)} prompts, {len(metadata)} metadata entries; give one per sample"
        raise RewardError(reward.name, problem)
    try:
        with torch.no_grad():
            result = reward(samples, prompts, metadata)
    except RewardError:
        raise
    except Exception as error:
        raise RewardError(reward.name, f"{type(error).__name__}: {error}{_place(error)} ({_batch(prompts)})") from error
    return _checked(reward.name, result, count, prompts)


def _checked(name: str, result: object, count: int, prompts: Sequence[str]) -> Scores:
    values, valid = result if isinstance(result, Scores) else _listed(name, result)
    if values.shape != (count,) or valid.shape != (count,):
        raise RewardError(
            name,
            f"returned values {tuple(values.shape)} and valid {tuple(valid.shape)} for {count} samples; "
            f"both must have shape ({count},) ({_batch(prompts)})",
        )
    values, valid = values.detach().to(torch.float32), valid.to(torch.bool)
    broken = (valid & ~torch.isfinite(values)).nonzero().flatten()
    if broken.numel() > 0:
        row = int(broken[0])
        problem = f"value {float(values[row])} is not finite; mark rows that cannot be scored as invalid"
        raise RewardError(name, problem, row, prompts[row])
    return Scores(torch.where(valid, values, torch.zeros_like(values)), valid)


def _listed(name: str, result: object) -> Scores:
    """Scores of numbers: a tensor, or a plain sequence in which None stands for a row that could not be scored."""
    if isinstance(result, Tensor):
        return Scores(result, torch.ones_like(result, dtype=torch.bool))
    if not isinstance(result, list | tuple) or not all(one is None or isinstance(one, Real) for one in result):
        found = (
            f"a {type(result).__name__} of other things" if isinstance(result, list | tuple) else type(result).__name__
        )
        raise RewardError(
            name,
            f"returned {found}, expected a list of numbers with None for invalid rows, a tensor [B], or "
            "rewards.Scores(values, valid)",
        )
    values = torch.tensor([0.0 if one is None else float(one) for one in result])
    return Scores(values, torch.tensor([one is not None for one in result], dtype=torch.bool))


def _place(error: Exception) -> str:
    """Where a reward of the user's own raised it: the last of the lines passed that is neither here nor installed."""
    passed = [(Path(frame.filename), frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    own = [f" in {file.name}, line {line}" for file, line in passed if file.is_file() and _is_theirs(file)]
    return own[-1] if own else ""


def _is_theirs(file: Path) -> bool:
    return not any(file.is_relative_to(folder) for folder in _NOT_THEIRS)


def _batch(prompts: Sequence[str]) -> str:
    """What was being scored, where no single row is to blame."""
    distinct = list(dict.fromkeys(prompts))
    shown = ", ".join(map(repr, distinct[:3])) + (", …" if len(distinct) > 3 else "")
    return f"in a batch of {len(prompts)} samples of {shown}" if prompts else "in an empty batch"
