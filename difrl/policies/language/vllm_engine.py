"""Completions drawn by vLLM, in this process and on this device, from the current weights of the model.

vLLM samples with a generator of its own, so noise is not keyed by token. Each request is seeded by the key of its sample
instead, so its completion does not depend on the other requests of its batch, as far as vLLM's logits do not
(VLLM_BATCH_INVARIANT).
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from difrl.config import GenerationConfig, ModelConfig
from difrl.policies.base import NoiseKey
from difrl.policies.errors import ModelError
from difrl.policies.language.lm_head import CausalLM
from difrl.policies.language.merge_lora import compute_fingerprint, plain_weights
from difrl.policies.trainable import describe_shared_adapter
from samplers import Completions, Decoding, Processing, check_prompts, sample_keys

ENGINE_SETTINGS: Mapping[str, Any] = {
    # Log-probabilities of the sampled distribution; the default, raw, is before the temperature.
    "logprobs_mode": "processed_logprobs",
    "worker_extension_cls": "difrl.policies.language.vllm_worker.Receiver",
    # Prompts and completions are token ids here.
    "skip_tokenizer_init": True,
    "disable_log_stats": True,
}


class Vllm:
    """An Engine (difrl/policies/language/engines.py)."""

    def __init__(self, vllm: Any, llm: Any, network: CausalLM, decoding: Decoding, *, sleep: bool) -> None:
        self.vllm, self.llm, self.network, self.decoding, self.sleep = vllm, llm, network, decoding, sleep
        self._sent: Tensor | None = None
        self._rest()

    def __call__(
        self,
        prompts: Sequence[Sequence[int]],
        samples: Tensor,
        key: NoiseKey,
        temperature: float,
        processors: Sequence[Processing] = (),
    ) -> Completions:
        assert not processors, "vLLM draws the samples of training, which are not guided"
        check_prompts(self.network.model, prompts, self.decoding.max_new_tokens)
        keys = sample_keys(seed=key.seed, step=key.step, samples=samples, use=f"{key.purpose}/tokens")
        self._wake()
        self._send()
        requests = [self.vllm.TokensPrompt(prompt_token_ids=list(prompt)) for prompt in prompts]
        settings = [self._settings(number, temperature) for number in keys.tolist()]
        outputs = self.llm.generate(requests, settings, use_tqdm=False)
        self._rest()
        return _completions([output.outputs[0] for output in outputs], self.decoding, self.network.model.device)

    def _settings(self, key: int, temperature: float) -> Any:
        return self.vllm.SamplingParams(
            n=1,
            temperature=temperature,
            top_p=1.0,
            top_k=0,
            max_tokens=self.decoding.max_new_tokens,
            stop_token_ids=list(self.decoding.eos),
            ignore_eos=True,  # the model's own; the tokens that end a completion are in the line above
            logprobs=0,  # those of the drawn tokens only
            seed=key & (2**63 - 1),  # a seed may not be negative
            detokenize=False,
        )

    def _send(self) -> None:
        """Send the weights of the model to vLLM, unless they are those that were sent last."""
        mark = compute_fingerprint(self.network.model)
        if self._sent is None or not torch.equal(mark, self._sent):
            self.llm.collective_rpc("receive_weights", args=(plain_weights(self.network.model),))
            self.llm.reset_prefix_cache()  # other weights filled it
            self._sent = mark

    def _wake(self) -> None:
        if self.sleep:
            torch.cuda.empty_cache()  # memory that training has freed and torch still holds
            self.llm.wake_up()

    def _rest(self) -> None:
        if self.sleep:
            self.llm.sleep(level=1)


def start_vllm(
    path: str, model: ModelConfig, generation: GenerationConfig, network: CausalLM, decoding: Decoding, batch: int
) -> Vllm:
    """Start vLLM with the pretrained weights. Raise ModelError if it is not installed, or if there are several processes."""
    # In one process weights are passed on without a copy, and scheduling is deterministic.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    vllm = _installed()
    if torch.distributed.is_initialized() and (count := torch.distributed.get_world_size()) > 1:
        raise ModelError(
            f"generation.engine: found {count} processes, and vllm draws in one; start one, or set "
            "generation.engine: transformers"
        )
    if problem := describe_shared_adapter(network.model):
        raise ModelError(f"model.lora.targets: {problem}; leave it out, or set generation.engine: transformers")
    llm = vllm.LLM(
        model=path,
        revision=model.revision,
        dtype=model.dtype,
        max_num_seqs=batch,
        gpu_memory_utilization=generation.gpu_memory,
        enable_sleep_mode=generation.sleep,
        **ENGINE_SETTINGS,
    )
    return Vllm(vllm, llm, network, decoding, sleep=generation.sleep)


def _installed() -> Any:
    try:
        return importlib.import_module("vllm")
    except ImportError as error:
        raise ModelError(
            f"generation.engine: vllm cannot be imported ({error}); install it (`pip install vllm`, which needs a GPU), or "
            "set generation.engine: transformers"
        ) from error


def _completions(outputs: Iterable[Any], decoding: Decoding, device: torch.device) -> Completions:
    """Collect vLLM's CompletionOutput of each prompt. Its `logprobs` are one mapping from token to Logprob a position."""
    shape = (len(found := list(outputs)), decoding.max_new_tokens)
    tokens, logp, mask = torch.full(shape, decoding.pad), torch.zeros(shape), torch.zeros(shape, dtype=torch.bool)
    for row, output in enumerate(found):
        ids = list(output.token_ids)
        tokens[row, : len(ids)] = torch.tensor(ids)
        logp[row, : len(ids)] = torch.tensor([at[i].logprob for i, at in zip(ids, output.logprobs, strict=True)])
        mask[row, : len(ids)] = True
    return Completions(tokens.to(device), mask.to(device), logp.to(device))
