"""Generation of texts, and further language models that a run compares with."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from difrl.config.schema.base import PathText, Section


class GenerationConfig(Section):
    """Sampling of completions. There is no top-k or top-p: the likelihood is that of the full distribution."""

    max_new_tokens: int = Field(
        64, gt=0, description="maximal number of tokens of a completion, its end token included"
    )
    temperature: float = Field(1.0, gt=0, description="temperature of sampling, and of the likelihood")
    cache: Literal["dynamic", "static"] = Field("dynamic", description="cache of keys and values in transformers")
    engine: Literal["transformers", "vllm"] = Field(
        "transformers", description="sampler of training; evaluations always use transformers"
    )
    correction: float = Field(
        2.0,
        gt=0,
        description="with another engine or rollout.precision: upper bound of a token's importance weight "
        "exp(ℓ_here − ℓ_engine), as in truncated importance sampling (Yao et al. 2025, difrl/policies/importance_sampling.py)",
    )
    gpu_memory: float = Field(0.4, gt=0, lt=1, description="with vllm: share of the GPU's memory that it reserves")
    sleep: bool = Field(True, description="with vllm: release that memory between rollouts")
    chat: bool | None = Field(
        None, description="apply the tokenizer's chat template to prompts; default: if it has one"
    )
    system: str | None = Field(None, description="system message of the chat template")
    eos: list[str] | None = Field(
        None, description="tokens that end a completion; default: the tokenizer's and the model's own"
    )
    pad: str | None = Field(None, description="padding token; default: the tokenizer's own")


class TeacherConfig(Section):
    """Another language model with the same vocabulary, for anchors."""

    path: PathText = Field(description="hub id, local folder, or the name of a shipped model")
    revision: str | None = Field(None, description="revision of a hub model")
