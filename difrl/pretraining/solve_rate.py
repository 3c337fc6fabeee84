"""Solve rates of a causal language model: of its greedy answer, of its samples, and of the best of k samples.

pass@k bounds the gain of reinforcement learning, which makes answers likely that the model already gives now and then.
Completions come from transformers' own `generate`, and the reward `math` checks them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from difrl.core.groups import mean_and_stderr
from rewards import make, score


def pass_at_k(correct: Tensor, k: int) -> Tensor:
    """Return the unbiased probability that at least one of k samples is right (arXiv:2107.03374, eq. 1).

    It is 1 − C(n − c, k) / C(n, k) for correct [problems, n] bool, of which c are true in a row: [problems] float64.
    """
    n = correct.shape[1]
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} of {n} samples a problem, expected k from 1 to the number of samples")
    chances = [1 - math.comb(n - c, k) / math.comb(n, k) for c in correct.sum(1).tolist()]
    return torch.tensor(chances, dtype=torch.float64)


@dataclass(frozen=True)
class SolveRateSettings:
    """Settings of generation. Temperature 0 is greedy, and `batch` is the number of completions drawn together."""

    max_new_tokens: int
    temperature: float = 1.0
    batch: int = 256
    seed: int = 0


@torch.no_grad()
def generate_completions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    count: int,
    decoding: SolveRateSettings,
) -> list[list[str]]:
    """Return `count` completions of every prompt, without special tokens."""
    sampling: dict[str, Any] = {"do_sample": False}
    if decoding.temperature > 0:
        sampling = {"do_sample": True, "temperature": decoding.temperature, "top_k": 0, "top_p": 1.0}
    settings = GenerationConfig(
        max_new_tokens=decoding.max_new_tokens,
        num_return_sequences=count,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **sampling,
    )
    texts: list[str] = []
    together = max(1, decoding.batch // count)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(decoding.seed)
        for start in range(0, len(prompts), together):
            batch = tokenizer(list(prompts[start : start + together]), return_tensors="pt", padding=True)
            ids, mask = batch.input_ids.to(model.device), batch.attention_mask.to(model.device)
            tokens = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)
            texts += tokenizer.batch_decode(tokens[:, ids.shape[1] :], skip_special_tokens=True)
    return [texts[i : i + count] for i in range(0, len(texts), count)]


def check_answers(answers: Sequence[Sequence[str]], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
    """Return whether each completion is right, [problems, completions] bool."""
    texts = [text for own in answers for text in own]
    rows = [row for row, own in zip(metadata, answers, strict=True) for _ in own]
    scores = score(make("math"), texts, [""] * len(texts), rows)
    if not scores.valid.all():
        row = int((~scores.valid).nonzero()[0])
        raise ValueError(f"a problem has no answer that can be verified, its metadata are {dict(rows[row])}")
    return (scores.values > 0).reshape(len(answers), -1)


def summarise_accuracy(greedy: Tensor, sampled: Tensor, ks: Sequence[int]) -> dict[str, tuple[float, float]]:
    """Return name -> mean and standard error over problems, given which greedy [P, 1] and sampled [P, n] answers are right."""
    columns = {"greedy": greedy[:, 0].double(), "sampled": sampled.double().mean(1)}
    columns |= {f"pass@{k}": pass_at_k(sampled, k) for k in ks}
    return {name: mean_and_stderr(values) for name, values in columns.items()}
