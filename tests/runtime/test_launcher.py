"""Settings of `accelerate launch`: those of FSDP become `model.shard`, and those of other engines are refused."""

from __future__ import annotations

import pytest

from difrl.config.yaml_source import ConfigError
from difrl.runtime.launcher import LauncherError, read_shard
from difrl.training.run import with_launcher
from tests.recipes import recipe

FSDP = {"ACCELERATE_USE_FSDP": "true"}


@pytest.mark.parametrize(
    ("environment", "shard"),
    [
        ({}, None),
        ({"ACCELERATE_USE_FSDP": "false", "FSDP_RESHARD_AFTER_FORWARD": "true"}, None),
        ({**FSDP, "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true"}, "weights"),
        ({**FSDP, "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "false"}, "gradients"),
        ({**FSDP, "FSDP_VERSION": "1", "FSDP_SHARDING_STRATEGY": "FULL_SHARD"}, "weights"),
        ({**FSDP, "FSDP_SHARDING_STRATEGY": "2", "FSDP_RESHARD_AFTER_FORWARD": "true"}, "gradients"),
        ({**FSDP, "FSDP_VERSION": "1", "FSDP_RESHARD_AFTER_FORWARD": "NO_SHARD"}, "none"),
    ],
)
def test_settings_of_fsdp(environment: dict[str, str], shard: str | None) -> None:
    assert read_shard(environment) == shard


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed, which owns the optimizer"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron-LM"),
        ({**FSDP, "FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params"),
        ({**FSDP, "FSDP_ACTIVATION_CHECKPOINTING": "true"}, "model.gradient_checkpointing: true"),
        ({**FSDP, "FSDP_SHARDING_STRATEGY": "HYBRID_SHARD"}, "found the sharding strategy HYBRID_SHARD"),
    ],
)
def test_settings_that_are_refused(environment: dict[str, str], message: str) -> None:
    with pytest.raises(LauncherError, match=message):
        read_shard(environment)


def test_the_launcher_fills_in_what_the_recipe_leaves_open() -> None:
    plain = recipe("tiny-sd3")
    assert with_launcher(plain, None) is plain
    assert with_launcher(plain, "weights").model.shard == "weights"
    sharded = recipe("tiny-sd3", model={"shard": "gradients"})
    assert with_launcher(sharded, "gradients") is sharded
    with pytest.raises(ConfigError, match=r"model\.shard: found gradients, and accelerate launch asks for weights"):
        with_launcher(sharded, "weights")
