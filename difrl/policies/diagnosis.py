"""Search for the cause of a failed first-update check (difrl/policies/logprob_check.py).

The decisions are evaluated again while one possible cause after the other is removed:

    in batches of the rollout's shape    differs from the recorded ℓ: a setting or the weights changed
    in one batch, as training does       differs from the line above: the result depends on the batch
    neither differs                      the differentiable pass itself differs
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from difrl.data.rollout import Rollout
from difrl.policies.base import Decisions
from difrl.policies.errors import ModelError
from difrl.policies.logprob_check import Close
from difrl.policies.quantization import is_composed
from difrl.policies.snapshots import Snapshots

SHOWN_NAMES = 3
"""Modules listed in a message."""


class Setting(NamedTuple):
    """A setting of sampling that likelihoods depend on too."""

    name: str
    key: str
    """The key in a recipe."""
    value: float
    """Value under which likelihoods are evaluated."""
    others: Sequence[float]
    """Further values under which the samples may have been drawn by mistake."""


class Diagnosable(ABC):
    """The parts of a policy that a diagnosis uses."""

    module_name: ClassVar[str]
    """Name of the trained module in messages."""
    dtype: torch.dtype
    """Precision of the model's passes."""
    snapshots: Snapshots

    @property
    @abstractmethod
    def module(self) -> nn.Module:
        """The module that is trained."""

    @property
    @abstractmethod
    def sampler(self) -> str:
        """Name of the snapshot whose samples are trained on."""

    @property
    @abstractmethod
    def setting(self) -> Setting:
        """The setting of sampling that likelihoods depend on: guidance of images, temperature of texts."""

    @abstractmethod
    def sampler_fingerprint(self) -> Tensor:
        """Return a number [1] that changes with the weights that draw samples."""

    @abstractmethod
    def in_precision(self, dtype: torch.dtype) -> AbstractContextManager[None]:
        """Run passes in another precision inside the block. For float32, narrower weights are widened."""

    @abstractmethod
    def recompute_logprobs(
        self,
        rollout: Rollout,
        decisions: Decisions,
        *,
        together: int | None = None,
        snapshot: str | None = None,
        setting: float | None = None,
    ) -> Tensor:
        """Return ℓ [B, J] evaluated again, without gradient.

        Args:
          together: samples in one pass, in the batch shapes of a rollout; default: all, as in training.
          snapshot: default: the one that drew the samples.
          setting: default: the policy's own.
        """


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """A search for the cause. `close` decides whether two evaluations of ℓ agree."""

    policy: Diagnosable
    rollout: Rollout
    decisions: Decisions
    recorded: Tensor
    close: Close

    def __call__(self) -> str:
        """Return the first cause found, with what to do; "" if there is none."""
        try:
            return next(self._causes(), "")
        except (RuntimeError, MemoryError) as error:  # a shortage of memory must not hide the failed check
            return f"The search for the cause failed: {error}"

    def _causes(self) -> Iterator[str]:
        yield from self._changed_weights()
        drawn, again = self._drawn(), self._drawn()
        if not self.close(again, drawn):
            yield self._randomness()
            return
        if not self.close(drawn, self.recorded):
            yield from self._changed_settings()
        whole = self._whole()
        if not self.close(whole, drawn):
            yield from self._batch_shape()
        elif self.close(drawn, self.recorded):
            yield (
                "Found: without gradient the samples evaluate as they were drawn, so only the differentiable pass differs. "
                "Switch model.gradient_checkpointing off, and remove hooks and contexts (autocast, compile) that "
                "only the update runs under"
            )

    def _drawn(self, snapshot: str | None = None, setting: float | None = None) -> Tensor:
        recorded = "log_prob" in self.decisions.tensors and "together" in self.rollout.replay_data
        together = int(self.rollout.replay_data["together"][0]) if recorded else 1
        return self.policy.recompute_logprobs(
            self.rollout, self.decisions, together=together, snapshot=snapshot, setting=setting
        )

    def _whole(self) -> Tensor:
        return self.policy.recompute_logprobs(self.rollout, self.decisions)

    def _changed_weights(self) -> Iterator[str]:
        before = self.rollout.replay_data.get("weights")
        if before is not None and (before != self.policy.sampler_fingerprint()).any():
            yield (
                "Found: the weights changed between rollout and update. Nothing but the optimizer's step and a snapshot's "
                "move at the end of a step may write to them: remove what does (a callback, a reward that trains)"
            )

    def _randomness(self) -> str:
        called = self.policy.module_name
        active = [name for name, module in self.policy.module.named_modules() if module.training]
        where = f" (in training mode: {_listed(active)})" if active else ""
        return (
            f"Found: dropout, or another layer that draws random numbers, is active: two equal evaluations differ{where}. Put "
            f"the {called} in evaluation mode ({called}.eval()) and set the dropout of the model and of the LoRA to 0"
        )

    def _changed_settings(self) -> Iterator[str]:
        yield from self._explains(lambda: self.close(self._drawn(), self.recorded))
        policy, setting = self.policy, self.policy.setting
        for other in setting.others:
            if self.close(self._drawn(setting=other), self.recorded):
                yield (
                    f"Found: {setting.name} differs between rollout and likelihood: the samples were drawn at {other:g} and "
                    f"are evaluated at {setting.value:g}. Evaluate the likelihood at the value of the rollout ({setting.key})"
                )
        for name in [n for n in policy.snapshots.names if n != policy.sampler]:
            try:
                agrees = self.close(self._drawn(snapshot=name), self.recorded)
            except ModelError:  # pretrained weights that were not kept
                continue
            if agrees:
                yield (
                    f"Found: the samples were drawn by the weights of {name!r}, not by {policy.sampler!r}. Set "
                    "rollout.snapshot to the weights that draw"
                )

    def _batch_shape(self) -> Iterator[str]:
        yield from self._explains(lambda: self.close(self._whole(), self._drawn()))
        yield (
            f"Found: the {self.policy.module_name}'s result depends on the batch shape: the same decisions agree when they are "
            "evaluated in the rollout's batches and differ in training's. Set model.attention: sdpa, and remove whatever mixes "
            "samples of a batch"
        )

    def _explains(self, agrees: Callable[[], bool]) -> Iterator[str]:
        """Yield layers in training mode, or the precision, if the evaluations agree without them."""
        module, own = self.policy.module, self.policy.dtype
        active = [name or type(module).__name__ for name, part in module.named_modules() if part.training]
        with evaluation_mode(module):
            if active and agrees():
                yield (
                    f"Found: layers in training mode ({_listed(active)}): in evaluation mode the deviation vanishes. Call "
                    f"{self.policy.module_name}.eval() after whatever called train()"
                )
        for dtype in {torch.float32, torch.bfloat16} - {own}:
            with self.policy.in_precision(dtype):
                vanishes = agrees()
            if vanishes:
                yield (
                    f"Found: precision: evaluated in {dtype} the deviation vanishes, in {own} it does not. Run rollout and "
                    "update in one precision (model.dtype, no autocast of your own), float32 if rounding alone is too much"
                )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN_NAMES} more" if len(names) > SHOWN_NAMES else ""
    return ", ".join(names[:SHOWN_NAMES]) + more


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Put every submodule into evaluation mode inside the block."""
    active = [m for m in module.modules() if m.training]
    module.eval()
    try:
        yield
    finally:
        for m in active:
            m.training = True


@contextmanager
def widened(module: nn.Module, device: torch.device | str | None = None) -> Iterator[None]:
    """Convert every floating-point tensor of the module to float32 inside the block. Afterwards each is restored.

    device: the place of the converted tensors; default: theirs.
    """
    tensors = [*module.parameters(), *module.buffers()]
    tensors = [x for x in tensors if x.is_floating_point() and x.dtype != torch.float32]
    # The data of a quantised tensor are several tensors, which only an exchange of the whole tensor replaces.
    composed = [x for x in tensors if is_composed(x)]
    narrow = [(x, x.data) for x in tensors if not is_composed(x)]
    others = [x.detach().dequantize().to(device, torch.float32) for x in composed]
    for x, other in zip(composed, others, strict=True):
        torch.utils.swap_tensors(x, other)
    for x, data in narrow:
        x.data = data.to(device, torch.float32)
    try:
        yield
    finally:
        for x, other in zip(composed, others, strict=True):
            torch.utils.swap_tensors(x, other)
        for x, data in narrow:
            x.data = data
