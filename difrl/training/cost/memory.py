"""Memory of a process, from the counts of a model without weights and the settings of a recipe.

A process keeps its weights and copies throughout. Beside them it holds the encoders while prompts are encoded, before the first
step, and then gradients and moments with what a rollout or an update needs. The peak is that of the largest phase.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache

import torch
from torch import nn

from difrl.config import RunConfig
from difrl.policies.diffusion.policy import DiffusionPolicy
from difrl.policies.language.policy import LanguagePolicy
from difrl.policies.layout import find_blocks, networks
from difrl.policies.quantization import count_frozen_bytes
from difrl.policies.rollout_precision import quantizable
from difrl.runtime.dtypes import DTYPES
from difrl.training.cost.model_cost import ENCODING, ROLLOUT, UPDATE, ModelCost
from difrl.training.optimizers import build_optimizer, count_state_bytes

IN_USE = "copy of the weights in use"
"""The one copy on the device where the others are in CPU memory."""


@dataclass(frozen=True)
class Memory:
    """Bytes of a process by name."""

    kept: Mapping[str, int]
    """Bytes by name, from loading to the end."""
    state: Mapping[str, int]
    """Bytes of gradients and moments, from the first update to the end."""
    phases: Mapping[str, Mapping[str, int]]
    """Bytes within each phase. `encoding` comes before the first update."""

    @property
    def largest(self) -> str:
        """The phase with the peak."""
        return max(self.phases, key=lambda phase: sum(self._held(phase).values()))

    @property
    def peak(self) -> int:
        """Most bytes at a time."""
        return sum(self._held(self.largest).values())

    @property
    def by_name(self) -> Mapping[str, int]:
        """Bytes of all phases, by name."""
        return {name: size for phase in self.phases for name, size in self._held(phase).items()}

    def _held(self, phase: str) -> Mapping[str, int]:
        return {**self.kept, **({} if phase == ENCODING else self.state), **self.phases[phase]}


class MemoryCounts:
    """The counts of a model on the meta device from which the memory of any setting follows."""

    def __init__(
        self, config: RunConfig, policy: DiffusionPolicy | LanguagePolicy, model: ModelCost, least: int
    ) -> None:
        """config: the recipe with which the policy was built. least: evaluations of a micro-batch of one decision."""
        self.dtype, self.micro_batch = config.model.dtype, config.train.micro_batch
        self.model, self.policy, self.least = model, policy, least
        self.networks = networks(policy.module)
        self.trained = list(policy.parameters.values())
        self.frozen = cache(self._frozen)
        self.moments = cache(lambda optimizer: self._moments(config, optimizer))
        blocks = [block for network in self.networks for block in find_blocks(network)]
        in_blocks = {id(p): p.numel() for block in blocks for p in block.parameters()}
        self.weights = _numbers([p for network in self.networks for p in network.parameters()])
        self.root = self.weights - sum(in_blocks.values())
        self.block = max((_numbers(block.parameters()) for block in blocks), default=0)
        self.trained_block = max((_numbers(p for p in b.parameters() if p.requires_grad) for b in blocks), default=0)

    def count(self, config: RunConfig, processes: int) -> Memory:
        """Return the memory of each of some processes under other settings of the same recipe."""
        settings, train = config.model, config.train
        width, shared = DTYPES[settings.dtype].itemsize, processes if settings.shard != "none" else 1
        trained = 4 * _numbers(self.trained) // shared
        kept: dict[str, int] = defaultdict(int)
        for module in self.model.modules:
            if module in self.model.encoders or (module in self.networks and settings.offload == "weights"):
                continue  # on the device for prompts, and in CPU memory
            own = module in self.networks
            for name, size in self._formats(module, settings.quantize if own else "none", settings.dtype).items():
                kept[f"frozen weights, {name}"] += size // (shared if own else 1)
        if shared > 1:  # FSDP2 shards no buffers
            buffers = sum(b.numel() for n in self.networks for b in n.buffers() if b.is_floating_point()) * width
            kept[f"frozen weights, {settings.dtype}"] += buffers - buffers // shared
        kept["trained weights, float32"] = trained
        snapshots = self.policy.snapshots
        copies = [f"snapshot {name}" for name in snapshots.copies]
        copies += ["pretrained weights, kept"] * (snapshots.pretrained is not None)
        kept |= dict.fromkeys(copies if settings.copies == "device" else [IN_USE] * bool(copies), trained)
        for name, teacher in self.model.teachers.items():
            kept[f"teacher {name}"] = sum(self._formats(teacher, settings.quantize, settings.dtype).values()) // shared

        name = "AdamW's two moments" if train.optimizer == "adamw" else f"moments of {train.optimizer}"
        working = self.model.working_memory(config, self._together(config))
        phases = {phase: dict(sizes) for phase, sizes in working.items()}
        rollout, update = phases[ROLLOUT], phases[UPDATE]
        if config.rollout.precision != "same":
            layers = quantizable(self.policy.module)
            rollout[f"weights of rollouts, {config.rollout.precision}"] = sum(p.weight.numel() for p in layers)
        if shared > 1:
            # The next block is gathered while one computes. Gradients of a block are whole until they are summed.
            blocks = self.weights if settings.shard == "gradients" else self.root + 2 * self.block
            update["gathered weights"] = blocks * width + self.trained_block * (4 + width)
            alike = self.policy.even and config.collect.max_draws == 1 and config.references is None
            whole = self.weights + bool(copies) * _numbers(self.trained)
            rollout["gathered weights"] = width * (blocks if alike else whole)
        elif settings.dtype != "float32":
            cast = self.trained_block if settings.gradient_checkpointing else _numbers(self.trained)
            update[f"trained weights cast to {settings.dtype}"] = cast * width
        encoders = sum(sum(self._formats(part, "none", settings.dtype).values()) for part in self.model.encoders)
        return Memory(
            kept=dict(kept),
            state={"gradients": trained, name: self.moments(train.optimizer) // shared},
            phases={**({ENCODING: {"encoders": encoders}} if encoders else {}), **phases},
        )

    def _formats(self, module: nn.Module, quantize: str, dtype: str) -> Mapping[str, int]:
        """Return the bytes of the frozen weights of a module by format, those in the recipe's type in `dtype` instead."""
        found: dict[str, int] = defaultdict(int)
        for name, size in self.frozen(module, quantize).items():
            if name == self.dtype and module not in self.model.in_float32:
                found[dtype] += size * DTYPES[dtype].itemsize // DTYPES[name].itemsize
            else:
                found[name] += size
        return found

    @staticmethod
    def _frozen(module: nn.Module, quantize: str) -> Mapping[str, int]:
        return count_frozen_bytes(module, quantize)

    def _moments(self, config: RunConfig, optimizer: str) -> int:
        built = build_optimizer(self.trained, config.train.model_copy(update={"optimizer": optimizer}))
        for p in self.trained:
            p.grad = torch.empty_like(p)
        built.step()
        for p in self.trained:
            p.grad = None
        return count_state_bytes(built)

    def _together(self, config: RunConfig) -> int:
        """Return the number of evaluations with gradient in one pass, which `train.micro_batch` bounds."""
        tally, size = self.model.dry.tally, config.train.micro_batch
        return (
            tally.together if size == self.micro_batch else max(self.least, tally.together * size // self.micro_batch)
        )


def _numbers(parameters: Iterable[nn.Parameter]) -> int:
    return sum(p.numel() for p in {id(p): p for p in parameters}.values())
