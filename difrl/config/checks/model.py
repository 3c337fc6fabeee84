"""Conflicts of the model and its adapter."""

from __future__ import annotations

from collections.abc import Iterator

from difrl.config.checks.conflict import ConfigConflict
from difrl.config.schema.run import RunSections

_OF_BITSANDBYTES = frozenset({"paged_adamw", "paged_adamw8bit", "lion", "lion8bit", "paged_lion8bit"})


def check_model(config: RunSections) -> Iterator[ConfigConflict]:
    """Yield the conflicts of this part of a config."""
    model = config.model
    if model.train == "full" and model.lora.warm_start is not None:
        problem = (
            "train: full trains all weights and has no adapter to continue from; remove warm_start, or set train: lora"
        )
        yield ConfigConflict(("model", "lora", "warm_start"), problem)
    yield from _quantized_weights_are_frozen(config)
    yield from _offloaded_weights_are_frozen(config)
    yield from _shards_are_plain(config)
    if model.compile and config.rollout.precision != "same":
        problem = "blocks would be compiled again for the copies of every rollout; set same, or model.compile: false"
        yield ConfigConflict(("rollout", "precision"), problem)


def _quantized_weights_are_frozen(config: RunSections) -> Iterator[ConfigConflict]:
    model = config.model
    if model.quantize == "none":
        return
    if model.train == "full":
        problem = f"{model.quantize} weights cannot be trained, and train: full trains all of them; set train: lora"
        yield ConfigConflict(("model", "quantize"), f"{problem}, or quantize: none")
    if config.rollout.precision != "same":
        problem = f"samples are drawn with {model.quantize} weights already; set rollout.precision: same"
        yield ConfigConflict(("rollout", "precision"), problem)
    if config.generation.engine != "transformers":
        problem = f"{config.generation.engine} receives merged weights, and {model.quantize} ones are merged with loss"
        yield ConfigConflict(
            ("model", "quantize"), f"{problem}; set generation.engine: transformers, or quantize: none"
        )


def _offloaded_weights_are_frozen(config: RunSections) -> Iterator[ConfigConflict]:
    model = config.model
    if model.offload != "weights":
        return
    if model.train == "full":
        problem = "trained weights stay on the device, and train: full trains all of them; set train: lora"
        yield ConfigConflict(("model", "offload"), f"{problem}, or offload: none")
    if model.quantize != "none":
        problem = f"{model.quantize} weights are small and stay on the device; set quantize: none, or offload: none"
        yield ConfigConflict(("model", "offload"), problem)
    if model.lora.warm_start is not None:
        problem = "diffusers offloads an adapter that it loads too, and its weights are trained; set offload: none"
        yield ConfigConflict(("model", "offload"), problem)
    if config.rollout.precision != "same":
        problem = "another precision needs the weights on the device; set same, or model.offload: none"
        yield ConfigConflict(("rollout", "precision"), problem)
    if model.compile:
        problem = "layers that are copied to the device one by one interrupt every compiled block"
        yield ConfigConflict(("model", "compile"), f"{problem}; set compile: false, or offload: none")


def _shards_are_plain(config: RunSections) -> Iterator[ConfigConflict]:
    model = config.model
    if model.shard == "none":
        return
    if model.quantize != "none":
        problem = f"torchao and bitsandbytes cannot split {model.quantize} weights over processes; set shard: none (an adapter "
        yield ConfigConflict(("model", "shard"), f"{problem}and its moments are small), or quantize: none")
    if model.offload == "weights":
        problem = (
            "weights that are sharded are gathered on the device, and those that are offloaded are copied to it; choose"
        )
        yield ConfigConflict(("model", "offload"), f"{problem} one of the two: set offload: none, or shard: none")
    if model.compile:
        problem = (
            "the blocks of a sharded model gather their weights in between, which interrupts compiled code; set false"
        )
        yield ConfigConflict(("model", "compile"), f"{problem}, or shard: none")
    if config.train.optimizer in _OF_BITSANDBYTES:
        problem = (
            f"{config.train.optimizer} of bitsandbytes takes whole weights; set adamw or one of adamw8bit, adamw4bit"
        )
        yield ConfigConflict(("train", "optimizer"), f"{problem} and adamw_fp8 (torchao), or model.shard: none")
