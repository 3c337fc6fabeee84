"""The model that is trained, and its use of memory."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from difrl.config.schema.base import PathText, Section
from difrl.runtime.launcher import Shard


class LoraConfig(Section):
    """Low-rank adapters (PEFT)."""

    rank: int | None = Field(None, gt=0, description="rank; default: 16, or that of warm_start")
    alpha: float | None = Field(None, gt=0, description="scale numerator; default: the rank, or that of warm_start")
    targets: list[str] | None = Field(
        None,
        min_length=1,
        description="module names, or their ends after a dot; default: the family's attention layers, or those of warm_start",
    )
    warm_start: PathText | None = Field(
        None, description="folder or hub id of a LoRA to continue from, with its rank, alpha and targets"
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_in_rank(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("warm_start") is None and data.get("rank") is None:
            return {**data, "rank": 16}
        return data


class ModelConfig(Section):
    """The model that is trained, and its use of memory."""

    path: PathText = Field(description="hub id, local folder, or the name of a shipped model (tiny-sd3, tiny-sd)")
    revision: str | None = Field(None, description="revision of a hub model")
    train: Literal["lora", "full"] = "lora"
    lora: LoraConfig = LoraConfig()
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="type of frozen weights and of the forward pass; trained weights and transitions are float32",
    )
    quantize: Literal["none", "int8", "float8", "nf4"] = Field(
        "none",
        description="format of the linear layers' frozen weights under LoRA: int8 and float8 by torchao, nf4 (4 bits) by "
        "bitsandbytes on a GPU. Results are in dtype",
    )
    compile: bool = Field(
        False,
        description="torch.compile of the repeated blocks: a slow start, then faster passes; on a CPU it needs a C++ compiler",
    )
    offload: Literal["none", "encoders", "weights"] = Field(
        "none",
        description="encoders: encoders of prompts are on the GPU only while they encode (a training run drops them in any case "
        "when its prompts are encoded); weights: frozen weights of the denoiser lie in CPU memory too, and each layer is copied "
        "to the GPU when it runs",
    )
    gradient_checkpointing: bool = Field(False, description="recompute activations in the backward pass")
    copies: Literal["device", "cpu"] = Field(
        "device", description="location of unused snapshots, and of the pretrained weights under full training"
    )
    shard: Shard = Field(
        "none",
        description="what the processes share out by FSDP2: nothing; gradients, moments and idle weights (each gathers the "
        "weights for a whole pass); or weights too (each gathers one block at a time)",
    )
    attention: str = Field(
        "sdpa",
        description="sdpa, or a backend of diffusers such as xformers, flash, sage; for language models one of transformers: "
        "eager, flash_attention_2, flash_attention_3, flex_attention",
    )
    embeddings_mb: int = Field(
        1024,
        ge=0,
        description="MiB of prompt embeddings kept in CPU memory; further ones are read from the disk at each use, or encoded "
        "again without a cache on the disk",
    )
    tiling: bool = Field(
        False,
        description="let the autoencoder work on overlapping tiles of large images or videos, which need less memory and "
        "differ slightly",
    )
    inputs: dict[str, float | int | bool | str] = Field(
        default_factory=dict,
        description="inputs of the pipeline that differ from its defaults, such as guidance_scale of a model that takes its "
        "guidance as a number (FLUX.1 dev)",
    )
    max_sequence_length: int | None = Field(
        None,
        ge=0,
        description="T5 tokens, or zeros in their place without a T5 encoder; default: 256, and 0 for models pretrained "
        "without T5 (_pretrained_without_t5: true in model_index.json, as tiny-sd3 has)",
    )
