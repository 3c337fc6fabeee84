"""How texts are drawn, and which other language models a run compares with."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from difrl.config.schema.base import Section


class GenerationConfig(Section):
    """How completions are drawn: from the whole distribution, so without top-k or top-p, whose cut no likelihood would know."""

    max_new_tokens: int = Field(64, gt=0, description="tokens of a completion at most, its end included")
    temperature: float = Field(1.0, gt=0, description="of sampling, and so of scoring")
    cache: Literal["dynamic", "static"] = Field("dynamic", description="of keys and values, as transformers has them")
    engine: Literal["transformers", "vllm"] = Field(
        "transformers", description="what draws the samples of training; evaluations are drawn by transformers"
    )
    correction: float = Field(
        2.0,
        gt=0,
        description="with another engine: most that a token's importance weight exp(ℓ_here − ℓ_engine) may be: truncated "
        "importance sampling (Yao et al. 2025, difrl/policies/language/importance_sampling.py)",
    )
    gpu_memory: float = Field(0.4, gt=0, lt=1, description="with vllm: share of the GPU's memory that it takes")
    sleep: bool = Field(True, description="with vllm: whether it gives that memory back between rollouts")
    chat: bool | None = Field(
        None, description="whether prompts go through the tokenizer's chat template; default: where it has one"
    )
    system: str | None = Field(None, description="system message of the chat template")
    eos: list[str] | None = Field(None, description="tokens that end a completion; default: the tokenizer's own")
    pad: str | None = Field(None, description="token that fills up short texts; default: the tokenizer's own")


class TeacherConfig(Section):
    """Another language model with the same vocabulary, that anchors may name."""

    path: str = Field(description="hub id, local folder, or the name of a shipped model")
    revision: str | None = Field(None, description="revision of a hub model")
