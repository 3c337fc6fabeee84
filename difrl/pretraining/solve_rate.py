"""How well a causal language model solves problems: its greedy answer, its samples, and whether one of k samples is right.

pass@k says what there is to sharpen: reinforcement learning makes likely what the model can already do now and then. The
completions are transformers' own `generate`, the verdicts those of the reward `math`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from difrl.core.groups import mean_and_stderr
from rewards import make, score


def pass_at_k(correct: Tensor, k: int) -> Tensor:
    """The probability that at least one of k samples is right, unbiased: 1 − C(n − c, k) / C(n, k) (arXiv:2107.03374, eq. 1).

    correct [problems, n] bool, of which c are true -> [problems] float64.
    """
    n = correct.shape[1]
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} of {n} samples a problem, expected k from 1 to the number of samples")
    chances = [1 - math.comb(n - c, k) / math.comb(n, k) for c in correct.sum(1).tolist()]
    return torch.tensor(chances, dtype=torch.float64)


@dataclass(frozen=True)
class Decoding:
    """How completions are drawn; temperature 0 is greedy. `batch` counts completions that are drawn together."""

    max_new_tokens: int
    temperature: float = 1.0
    batch: int = 256
    seed: int = 0


@torch.no_grad()
def completions(model: Any, tokenizer: Any, prompts: Sequence[str], count: int, decoding: Decoding) -> list[list[str]]:
    """`count` completions of every prompt, special tokens left out."""
    sampled = decoding.temperature > 0
    drawn: dict[str, Any] = {"do_sample": True, "temperature": decoding.temperature, "top_k": 0, "top_p": 1.0}
    settings = GenerationConfig(
        max_new_tokens=decoding.max_new_tokens,
        num_return_sequences=count,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **(drawn if sampled else {"do_sample": False}),
    )
    texts: list[str] = []
    together = max(1, decoding.batch // count)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(decoding.seed)
        for start in range(0, len(prompts), together):
            asked = tokenizer(list(prompts[start : start + together]), return_tensors="pt", padding=True).to(
                model.device
            )
            tokens = model.generate(
                input_ids=asked.input_ids, attention_mask=asked.attention_mask, generation_config=settings
            )
            texts += tokenizer.batch_decode(tokens[:, asked.input_ids.shape[1] :], skip_special_tokens=True)
    return [texts[i : i + count] for i in range(0, len(texts), count)]


def judged(answers: Sequence[Sequence[str]], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
    """Whether the completions are right, [problems, completions] bool."""
    texts = [text for own in answers for text in own]
    rows = [row for row, own in zip(metadata, answers, strict=True) for _ in own]
    found = score(make("math"), texts, [""] * len(texts), rows)
    if not found.valid.all():
        row = int((~found.valid).nonzero()[0])
        raise ValueError(f"a problem has no answer that can be verified, its metadata are {dict(rows[row])}")
    return (found.values > 0).reshape(len(answers), -1)


def summary(greedy: Tensor, sampled: Tensor, ks: Sequence[int]) -> dict[str, tuple[float, float]]:
    """name -> mean and standard error over problems, of greedy [P, 1] and sampled [P, n] verdicts."""
    columns = {"greedy": greedy[:, 0].double(), "sampled": sampled.double().mean(1)}
    columns |= {f"pass@{k}": pass_at_k(sampled, k) for k in ks}
    return {name: mean_and_stderr(values) for name, values in columns.items()}
