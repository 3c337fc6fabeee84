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
_HALF_STEP = 0.5 / 255  # of an 8-bit picture


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
    """A scorer of images, videos or texts. Rewards load lazily, split large inputs into batches and run without gradient."""

    @property
    def name(self) -> str:
        """The reward's name in error messages."""
        ...

    @property
    def needs(self) -> tuple[str, ...]:
        """The inputs: `images`, `videos` or `texts`, then `prompts` and `metadata` if the reward reads them."""
        ...

    def __call__(self, samples: Any, prompts: Sequence[str], metadata: Metadata) -> Answer:
        """Score ``samples``: images [B,3,H,W] or videos [B,F,3,H,W] in [0,1], or B texts. In a list None marks an invalid row."""
        ...

    def to(self, device: torch.device | str) -> Reward:
        """Move the reward's models to ``device``, and return the reward."""
        ...


@runtime_checkable
class Preloadable(Protocol):
    """A reward with a model that it loads at its first call, or before."""

    def preload(self) -> None:
        """Load the model now, if it is not loaded yet."""
        ...


def preload(reward: Reward) -> None:
    """Load the model of a reward before its first call, if it has one. Raise RewardError if it cannot be loaded."""
    if not isinstance(reward, Preloadable):
        return
    try:
        reward.preload()
    except RewardError:
        raise
    except (Exception, SystemExit) as error:
        raise RewardError(reward.name, describe_exception(error)) from error


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


class MetadataError(RewardError):
    """The metadata of a row are not those that a reward reads: the caller's fault, which a server answers with 422."""


def all_valid(values: Tensor) -> Scores:
    """Return scores whose rows are all valid."""
    values = values.to(torch.float32)
    return Scores(values, torch.ones(values.shape, dtype=torch.bool, device=values.device))


def check_images(images: Samples, name: str) -> Tensor:
    """Return ``images`` [B,3,H,W] as float32 in [0,1]. Raise ValueError for another shape, dtype or range.

    A value outside by less than half a step of 8 bits, which arithmetic leaves, is clamped: the picture is the same.
    """
    expected = f"reward '{name}' expects float images [B,3,H,W] in [0,1]"
    if not isinstance(images, Tensor):
        found = "texts" if all(isinstance(image, str) for image in images) else type(images).__name__
        raise ValueError(f"{expected}, found {found}")
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point() or 0 in images.shape[2:]:
        raise ValueError(f"{expected}, found {images.dtype} {tuple(images.shape)}{_advise_form(images)}")
    images = images.detach().float()
    if len(images) == 0:
        return images
    low, high = (float(value) for value in images.aminmax())
    if not (low >= -_HALF_STEP and high <= 1 + _HALF_STEP):  # NaN compares false
        raise ValueError(f"{expected}, found {_describe_range(images, low, high)}")
    return images.clamp(0.0, 1.0) if low < 0 or high > 1 else images


def check_videos(videos: Samples, name: str) -> Tensor:
    """Return ``videos`` [B,F,3,H,W] as float32 in [0,1]. Raise ValueError for another shape, dtype or range."""
    if not isinstance(videos, Tensor) or videos.ndim != 5 or 0 in videos.shape[1:]:
        found = f"{videos.dtype} {tuple(videos.shape)}" if isinstance(videos, Tensor) else type(videos).__name__
        raise ValueError(f"reward '{name}' expects float videos [B,F,3,H,W] in [0,1], found {found}")
    return check_images(videos.flatten(0, 1), name).view(videos.shape)


def _advise_form(images: Tensor) -> str:
    if images.ndim == 5 and images.shape[2] == 3:
        return "; a reward of images scores videos by their frames with rewards.PerFrame"
    if images.ndim == 4 and images.shape[1] != 3 and images.shape[3] == 3:
        return "; channels come second: images.permute(0, 3, 1, 2)"
    if images.ndim == 4 and images.shape[1] in (1, 4):
        return "; expand grey to three channels, and flatten alpha onto a background"
    if images.ndim == 3 and images.shape[0] == 3:
        return "; add the batch: images[None]"
    return "" if images.is_floating_point() else "; if they are in 0 to 255, divide them by 255"


def _describe_range(images: Tensor, low: float, high: float) -> str:
    broken = [row for row, image in enumerate(images) if not image.isfinite().all()]
    if broken:
        return f"NaN or infinite values in image {broken[0]} of {len(images)}; look for an overflow where they are made"
    if low < -_HALF_STEP:
        advice = "images in [-1, 1] are mapped by images / 2 + 0.5" if low >= -1.01 and high <= 1.01 else "scale them"
    else:
        advice = "divide images in 0 to 255 by 255" if high > 2 else "scale them"
    return f"values from {low:g} to {high:g}; {advice}, and clamp what a decoder overshoots by .clamp(0, 1)"


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
    if isinstance(samples, Tensor) and samples.numel() and not all(end.isfinite() for end in samples.aminmax()):
        row = int((~samples.flatten(1).isfinite()).any(1).nonzero()[0])
        raise RewardError(reward.name, "the sample has NaN or infinite values", row, prompts[row])
    try:
        with torch.no_grad():
            result = reward(samples, prompts, metadata)
    except RewardError:
        raise
    except (Exception, SystemExit) as error:  # a reward that calls sys.exit() must not end the run without a word
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
    if values.is_complex():
        raise RewardError(name, f"returned complex numbers, expected real ones ({_describe_batch(prompts)})")
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


def describe_exception(error: BaseException) -> str:
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
