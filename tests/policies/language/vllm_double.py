"""A replacement of the module `vllm` in tests: its names, arguments and results, around a model of transformers.

Like the real one it loads the model from its folder, draws with a generator for each request, cuts nothing off unless told to,
and learns of new weights through its worker alone.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, TypedDict

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM


class TokensPrompt(TypedDict):
    prompt_token_ids: list[int]


@dataclass
class SamplingParams:
    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    logprobs: int | None = None
    detokenize: bool = True

    def __post_init__(self) -> None:
        assert (self.n, self.top_p, self.top_k) == (1, 1.0, 0), "the whole distribution"
        assert self.seed is None or 0 <= self.seed < 2**63


@dataclass
class Logprob:
    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass
class CompletionOutput:
    index: int
    text: str
    token_ids: list[int]
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: str


@dataclass
class RequestOutput:
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]


class LLM:
    """Accept the arguments of the real one that difrl uses; any other raises an error."""

    def __init__(
        self,
        model: str,
        *,
        revision: str | None = None,
        dtype: str = "auto",
        max_num_seqs: int = 256,
        gpu_memory_utilization: float = 0.9,
        enable_sleep_mode: bool = False,
        logprobs_mode: str = "raw_logprobs",
        worker_extension_cls: str = "",
        skip_tokenizer_init: bool = False,
        disable_log_stats: bool = True,
    ) -> None:
        self.processed, self.sleeps = logprobs_mode == "processed_logprobs", enable_sleep_mode
        module, _, name = worker_extension_cls.rpartition(".")
        extension = getattr(importlib.import_module(module), name)
        network = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval()
        self.network, self.log = network, list[Any]()
        self.worker = type("Worker", (extension,), {})()
        self.worker.model_runner = SimpleNamespace(model=SimpleNamespace(load_weights=self._load))
        self.awake, self.size = True, (max_num_seqs, gpu_memory_utilization)

    def collective_rpc(self, method: str, args: tuple[Any, ...] = ()) -> list[Any]:
        assert self.awake
        self.log.append(method)
        return [getattr(self.worker, method)(*args)]

    def reset_prefix_cache(self) -> bool:
        self.log.append("reset_prefix_cache")
        return True

    def sleep(self, level: int = 1) -> None:
        assert self.sleeps
        self.awake = False

    def wake_up(self, tags: list[str] | None = None) -> None:
        self.awake = True

    def generate(
        self, prompts: Sequence[TokensPrompt], sampling_params: Sequence[SamplingParams], use_tqdm: bool = True
    ) -> list[RequestOutput]:
        assert self.awake
        pairs = zip(prompts, sampling_params, strict=True)
        return [RequestOutput(p["prompt_token_ids"], [self._complete(p["prompt_token_ids"], s)]) for p, s in pairs]

    @torch.no_grad()
    def _complete(self, prompt: list[int], settings: SamplingParams) -> CompletionOutput:
        assert settings.ignore_eos
        assert settings.logprobs == 0
        assert settings.seed is not None
        generator = torch.Generator().manual_seed(settings.seed)
        tokens: list[int] = []
        scores: list[dict[int, Logprob]] = []
        while len(tokens) < (settings.max_tokens or 16):
            logits = self.network(input_ids=torch.tensor([prompt + tokens])).logits[0, -1].float()
            processed = (logits / settings.temperature).log_softmax(dim=0)
            token = int(torch.multinomial(processed.exp(), 1, generator=generator))
            given = processed if self.processed else logits.log_softmax(dim=0)
            tokens.append(token)
            scores.append({token: Logprob(float(given[token]))})
            if token in (settings.stop_token_ids or []):
                break
        return CompletionOutput(0, "", tokens, scores, "stop")

    def _load(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        own, loaded = dict(self.network.named_parameters()), set()
        with torch.no_grad():
            for name, tensor in weights:
                own[name].copy_(tensor)
                loaded.add(name)
        return loaded
