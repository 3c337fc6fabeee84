"""The model that is trained, and its use of memory."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from difrl.config.schema.base import Section


class LoraConfig(Section):
    """Low-rank adapters (PEFT)."""

    rank: int = Field(16, gt=0)
    alpha: float | None = Field(None, gt=0, description="scale numerator; default: the rank")
    targets: list[str] | None = Field(None, description="module names; default: the family's attention layers")
    warm_start: str | None = Field(None, description="folder or hub id of a LoRA to continue from")


class ModelConfig(Section):
    """The model that is trained, and its use of memory."""

    path: str = Field(description="hub id, local folder, or the name of a shipped model (tiny-sd3, tiny-sd)")
    revision: str | None = Field(None, description="revision of a hub model")
    train: Literal["lora", "full"] = "lora"
    lora: LoraConfig = LoraConfig()
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="type of frozen weights and of the forward pass; trained weights and transitions are float32",
    )
    gradient_checkpointing: bool = Field(False, description="recompute activations in the backward pass")
    copies: Literal["device", "cpu"] = Field(
        "device", description="location of unused snapshots, and of the pretrained weights under full training"
    )
    attention: str = Field(
        "sdpa",
        description="sdpa, or a backend of diffusers such as xformers, flash, sage; for language models one of transformers: "
        "eager, flash_attention_2, flash_attention_3, flex_attention",
    )
    embeddings_mb: int = Field(
        1024,
        ge=0,
        description="MiB of prompt embeddings kept in CPU memory; further texts are encoded again at each use",
    )
    max_sequence_length: int | None = Field(
        None, ge=0, description="T5 tokens; default: 256 with a T5 encoder, 0 without one"
    )
