"""Settings of `accelerate launch` about engines that shard a model, read from the environment that it makes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from difrl.runtime.errors import UserError

Shard = Literal["none", "gradients", "weights"]
"""Values of `model.shard`."""
FSDP = "ACCELERATE_USE_FSDP"
ENGINES = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "another form of parallelism",
}
"""Variables of engines that take over a training loop, and their names."""
STRATEGIES: Mapping[str, Shard] = {
    "true": "weights",
    "full_shard": "weights",
    "1": "weights",
    "false": "gradients",
    "shard_grad_op": "gradients",
    "2": "gradients",
    "no_shard": "none",
    "3": "none",
}
"""FSDP_RESHARD_AFTER_FORWARD, or FSDP_SHARDING_STRATEGY of version 1, in lower case -> `model.shard`."""


class LauncherError(UserError):
    """A setting of the launcher that difrl does not follow."""


def read_shard(environment: Mapping[str, str]) -> Shard | None:
    """Return the value of `model.shard` that the launcher asks for, None if it asks for nothing.

    Raise LauncherError for a setting that difrl does not follow.
    """

    def is_set(name: str) -> bool:
        return environment.get(name, "false").lower() in ("true", "1")

    for variable, engine in ENGINES.items():
        if is_set(variable):
            raise LauncherError(
                f"accelerate launch: found settings of {engine}, which owns the optimizer and the backward pass, so snapshots, "
                "anchors and adapters could not be exchanged under it; use --use_fsdp --fsdp_version 2, or model.shard: weights"
            )
    if not is_set(FSDP):
        return None
    if is_set("FSDP_OFFLOAD_PARAMS"):
        raise LauncherError(
            "accelerate launch: found --fsdp_offload_params true, and sharded weights stay on their devices; set it to false, "
            "and model.copies: cpu keeps snapshots in the memory of the CPU"
        )
    if is_set("FSDP_ACTIVATION_CHECKPOINTING"):
        raise LauncherError(
            "accelerate launch: found --fsdp_activation_checkpointing true; set it to false, and model.gradient_checkpointing: "
            "true in the recipe"
        )
    given = environment.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower()
    if environment.get("FSDP_VERSION", "1") == "1" and given in ("true", "false"):
        given = environment.get("FSDP_SHARDING_STRATEGY", "full_shard").lower()
    if given not in STRATEGIES:
        raise LauncherError(
            f"accelerate launch: found the sharding strategy {given.upper()}, expected FULL_SHARD (model.shard: weights) or "
            "SHARD_GRAD_OP (gradients): every weight is sharded over all processes"
        )
    return STRATEGIES[given]
