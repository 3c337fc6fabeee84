"""The reward protocol, and `score`, the function through which rewards are called.

A reward is a callable ``(samples, prompts, metadata) -> Scores`` with a name and a list of its inputs. A row that
cannot be scored (no quoted text for an OCR reward, no metadata for GenEval) is *invalid*. It is never scored 0,
because a 0 would enter the group's baseline as if the sample were bad. A reward that fails raises an exception, and
`score` adds the reward's name, row and prompt to it.
"""

from __future__ import annotations

import sysconfig
import traceback
from collections.abc import Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self, runtime_checkable

import torch
from torch import Tensor

Samples = Tensor | Sequence[str]
Metadata = Sequence[Mapping[str, Any]]


class Scores(NamedTuple):
    """The result of a reward for B samples."""

    values: Tensor  # [B] float32; values of invalid rows have no meaning
    valid: Tensor  # [B] bool; False: this row could not be scored

    @classmethod
    def from_list(cls, values: Sequence[float | None]) -> Self:
        """Return scores on the CPU; None marks an invalid row, whose value is 0."""
        filled = [0.0 if value is None else float(value) for value in values]
        valid = [value is not None for value in values]
        return cls(torch.tensor(filled, dtype=torch.float32), torch.tensor(valid, dtype=torch.bool))

    def to(self, device: torch.device | str) -> Scores:
        """Return the scores on a device."""
        return Scores(self.values.to(device), self.valid.to(device))


Answer = Scores | Tensor | Sequence[float | None]
"""Return types of a reward: scores, one number a sample, or a list in which None marks an invalid row."""


@runtime_checkable
class Reward(Protocol):
    """A scorer of images or texts. Rewards load lazily, split large inputs into batches and run without gradient."""

    @property
    def name(self) -> str:
        """The reward's name in error messages."""
        ...

    @property
    def needs(self) -> tuple[str, ...]:
        """The inputs: `images` or `texts`, then `prompts` and `metadata` if the reward reads them."""
        ...

    def __call__(self, samples: Any, prompts: Sequence[str], metadata: Metadata) -> Answer:
        """Score ``samples``: images [B,3,H,W] in [0,1], or B texts. In a list None marks an invalid row."""
        ...

    def to(self, device: torch.device | str) -> Reward:
        """Move the reward's models to ``device``, and return the reward."""
        ...


class WithoutDevice:
    """Base class of rewards without tensors of their own: those that run on the CPU or on another machine."""

    def to(self, device: torch.device | str) -> Self:
        """Return the reward unchanged: there is nothing to move."""
        return self


class OnDevice:
    """Base class of rewards that move their model to the device at each use."""

    _device = torch.device("cpu")

    def to(self, device: torch.device | str) -> Self:
        """Choose the device of the model, and return the reward."""
        self._device = torch.device(device)
        return self


class RewardError(RuntimeError):
    """A reward failed. Holds the reward's name and, if one row is the cause, its index and prompt."""

    def __init__(self, name: str, problem: str, row: int | None = None, prompt: str | None = None) -> None:
        self.name, self.row, self.prompt = name, row, prompt
        where = "" if row is None else f" at row {row} (prompt {prompt!r})"
        super().__init__(f"reward '{name}' failed{where}: {problem}")


def all_valid(values: Tensor) -> Scores:
    """Return scores whose rows are all valid."""
    values = values.to(torch.float32)
    return Scores(values, torch.ones(values.shape, dtype=torch.bool, device=values.device))


def check_images(images: Samples, name: str) -> Tensor:
    """Return ``images`` clamped to [0,1]. Raise ValueError unless they are [B,3,H,W] floats."""
    if not isinstance(images, Tensor):
        found = "texts" if all(isinstance(image, str) for image in images) else type(images).__name__
        raise ValueError(f"reward '{name}' expects float images [B,3,H,W] in [0,1], found {found}")
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise ValueError(
            f"reward '{name}' expects float images [B,3,H,W] in [0,1], found {images.dtype} {tuple(images.shape)}"
        )
    return images.detach().float().clamp(0.0, 1.0)


def check_texts(samples: Samples, name: str) -> Sequence[str]:
    """Return ``samples``. Raise ValueError unless they are texts."""
    if isinstance(samples, str | Tensor) or not all(isinstance(text, str) for text in samples):
        raise ValueError(f"reward '{name}' expects a sequence of texts, found {type(samples).__name__}")
    return samples


def score(reward: Reward, samples: Samples, prompts: Sequence[str], metadata: Metadata) -> Scores:
    """Call ``reward`` on B samples and check its result: each row must be a finite value or marked invalid.

    Every failure, an exception in the reward or a malformed result, is raised as a `RewardError` with the reward's
    name, and with the row and prompt where they are known. Invalid rows get the value 0, so that no NaN can spread.
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
        raise RewardError(reward.name, f"{describe_exception(error)} ({_describe_batch(prompts)})") from error
    return _check_result(reward.name, result, prompts)


def _check_result(name: str, result: object, prompts: Sequence[str]) -> Scores:
    count = len(prompts)
    values, valid = result if isinstance(result, Scores) else _to_scores(name, result)
    if values.shape != (count,) or valid.shape != (count,):
        raise RewardError(
            name,
            f"returned values {tuple(values.shape)} and valid {tuple(valid.shape)} for {count} samples; "
            f"both must have shape ({count},) ({_describe_batch(prompts)})",
        )
    values, valid = values.detach().to(torch.float32), valid.to(torch.bool)
    broken = (valid & ~torch.isfinite(values)).nonzero().flatten()
    if broken.numel() > 0:
        row = int(broken[0])
        problem = f"value {float(values[row])} is not finite; mark rows that cannot be scored as invalid"
        raise RewardError(name, problem, row, prompts[row])
    return Scores(torch.where(valid, values, torch.zeros_like(values)), valid)


def _to_scores(name: str, result: object) -> Scores:
    """Return the scores of a tensor, or of a list of numbers in which None marks an invalid row."""
    if isinstance(result, Tensor):
        return Scores(result, torch.ones_like(result, dtype=torch.bool))
    if isinstance(result, list | tuple) and all(value is None or isinstance(value, Real) for value in result):
        return Scores.from_list(result)
    kind = type(result).__name__
    found = f"a {kind} of other things" if isinstance(result, list | tuple) else kind
    raise RewardError(
        name,
        f"returned {found}, expected a list of numbers with None for invalid rows, a tensor [B], or "
        "rewards.Scores(values, valid)",
    )


def describe_exception(error: Exception) -> str:
    """Return the type and message of an exception in somebody's reward, and the last line of their own code, if any."""
    frames = [(Path(frame.filename), frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    own = [f" in {file.name}, line {line}" for file, line in frames if file.is_file() and not _is_library(file)]
    return f"{type(error).__name__}: {error}{own[-1] if own else ''}"


def _is_library(file: Path) -> bool:
    """Whether a file belongs to this package, to the standard library or to an installed package."""
    folders = (Path(__file__).parent, sysconfig.get_path("stdlib"))
    installed = not {"site-packages", "dist-packages"}.isdisjoint(file.parts)
    return installed or any(file.is_relative_to(folder) for folder in folders)


def _describe_batch(prompts: Sequence[str]) -> str:
    distinct = list(dict.fromkeys(prompts))
    first = ", ".join(map(repr, distinct[:3])) + (", …" if len(distinct) > 3 else "")
    return f"in a batch of {len(prompts)} samples of {first}" if prompts else "in an empty batch"
