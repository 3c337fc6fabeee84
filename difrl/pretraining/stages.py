"""A stage of pretraining: a resumable loop with a moving average of the weights and a learning-rate warm-up.

A stage is a list of trainable modules and a function that returns the loss of one step. Its data depend only on the seed and
the step, so a killed stage continues from its last checkpoint and ends with the same weights.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from difrl.runtime.files import atomic_write
from difrl.runtime.progress import phase

log = logging.getLogger(__name__)


class StageConfig(BaseModel):
    """Settings of one stage of pretraining."""

    model_config = ConfigDict(extra="forbid")

    steps: int = Field(gt=0, description="optimizer steps")
    batch: int = Field(gt=0, description="drawings, or texts, per step")
    lr: float = Field(gt=0, description="AdamW learning rate after the warm-up")
    final_lr: float = Field(1.0, ge=0, le=1, description="fraction of lr that a cosine reaches at the last step")
    warmup: int = Field(100, ge=0, description="steps of linear warm-up")
    weight_decay: float = Field(0.01, ge=0)
    ema: float = Field(0.998, ge=0, lt=1, description="decay of the moving average that is kept as the result")
    precision: str = Field("float32", pattern="^(float32|bfloat16)$", description="autocast of the forward pass")
    checkpoint_every: int = Field(500, gt=0)


def _lr_factor(config: StageConfig, step: int) -> float:
    warm = min(1.0, (step + 1) / max(1, config.warmup))
    cosine = 0.5 * (1 + torch.cos(torch.tensor(torch.pi * step / config.steps)).item())
    return warm * (config.final_lr + (1 - config.final_lr) * cosine)


class Stage:
    """Training of modules for `config.steps` steps. At the end they hold the moving average of their weights."""

    def __init__(self, name: str, config: StageConfig, modules: Sequence[nn.Module], work: Path) -> None:
        self.name, self.config, self.modules, self.path = name, config, list(modules), work / f"{name}.pt"
        self.parameters = [p for m in modules for p in m.parameters()]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=config.lr, weight_decay=config.weight_decay)
        self.average = [p.detach().clone() for p in self.parameters]
        self.step = 0
        if self.path.exists():
            self._load()

    def run(self, compute_loss: Callable[[int], Tensor], evaluate: Callable[[], str] | None = None) -> None:
        """Run the remaining steps. `evaluate` reports on the averaged weights at every checkpoint."""
        started, first = time.monotonic(), self.step
        total = torch.zeros(())
        with phase(self.name, self.config.steps, self.step) as shown:
            while self.step < self.config.steps:
                for group in self.optimizer.param_groups:
                    group["lr"] = self.config.lr * _lr_factor(self.config, self.step)
                with torch.autocast("cpu", torch.bfloat16, enabled=self.config.precision == "bfloat16"):
                    loss = compute_loss(self.step)
                self.optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(self.parameters, 1.0)
                self.optimizer.step()
                # A short average at first, so that it forgets the random initial weights.
                decay = min(self.config.ema, (1 + self.step) / (10 + self.step))
                torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1 - decay)
                total = total + loss.detach()
                self.step += 1
                shown.done = self.step
                if self.step % self.config.checkpoint_every == 0 or self.step == self.config.steps:
                    self._save()
                    rate = (self.step - first) / (time.monotonic() - started)
                    mean = total.item() / self.config.checkpoint_every
                    self._swap()
                    with phase("evaluation"):
                        report = evaluate() if evaluate else ""
                    self._swap()
                    log.info(
                        "%s %d/%d loss %.4f %.2f steps/s %s",
                        self.name,
                        self.step,
                        self.config.steps,
                        mean,
                        rate,
                        report,
                    )
                    total = torch.zeros(())
        self._swap()

    def _swap(self) -> None:
        """Exchange the weights with their moving average."""
        for p, a in zip(self.parameters, self.average, strict=True):
            p.data, a.data = a.data, p.data

    def _save(self) -> None:
        state = {
            "step": self.step,
            "parameters": [p.data for p in self.parameters],
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
        }
        with atomic_write(self.path) as aside:
            torch.save(state, aside)

    def _load(self) -> None:
        state = torch.load(self.path, weights_only=True)
        self.step = state["step"]
        with torch.no_grad():
            for p, saved in zip(self.parameters, state["parameters"], strict=True):
                p.copy_(saved)
        self.average = state["average"]
        self.optimizer.load_state_dict(state["optimizer"])
        log.info("%s continues at step %d", self.name, self.step)
