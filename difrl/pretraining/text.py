"""Pretraining of the shipped language model: a decoder on solved problems of the arithmetic world.

The corpus is the training problems, each as often as the others. Some solutions are worked out, and those are right; the
others are answers at once, of which a share is careless and so wrong wherever something is carried or borrowed. A model of
such texts is mostly careless, and can do better: reinforcement learning has to find out when.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from difrl.pretraining import tiny_lm
from difrl.pretraining.solve_rate import Decoding, completions, judged, summary
from difrl.pretraining.stages import Stage, StageConfig
from difrl.tasks import arithmetic

log = logging.getLogger(__name__)

UNTRAINED = -100
"""The label of tokens that have no loss, transformers' and torch's own."""


class DecoderConfig(StageConfig):
    """The decoder: cross-entropy of solutions, a mean over their tokens."""

    worked: float = Field(ge=0, le=1, description="share of solutions that are worked out")
    careless: float = Field(ge=0, le=1, description="share of the others that forget what is carried or borrowed")
    evaluate_problems: int = Field(256, ge=0, description="held-out problems that are solved at each checkpoint")
    evaluate_samples: int = Field(8, gt=0, description="samples of each of them")


class TextConfig(BaseModel):
    """A language model of the arithmetic world."""

    model_config = ConfigDict(extra="forbid")

    architecture: Literal["tiny-lm"] = Field(description="which tiny model is made")
    output: Path = Field(description="folder of the finished model and its tokenizer")
    work: Path = Field(description="folder of checkpoints")
    seed: int = 0
    decoder: DecoderConfig


@dataclass(frozen=True)
class Corpus:
    """Every problem answered at once, carelessly, and worked out: token ids and labels, [problems, 3, L], padded at the end."""

    tokens: Tensor
    labels: Tensor

    @classmethod
    def of(cls, problems: Sequence[arithmetic.Problem], tokenizer: Any) -> Corpus:
        prompts = tokenizer([p.text for p in problems for _ in range(3)]).input_ids
        solutions = [text for p in problems for text in (str(p.answer), str(p.careless), p.worked)]
        endings = [[*ids, tokenizer.eos_token_id] for ids in tokenizer(solutions, add_special_tokens=False).input_ids]
        tokens = [torch.tensor(prompt + ending) for prompt, ending in zip(prompts, endings, strict=True)]
        labels = [torch.tensor([UNTRAINED] * len(p) + e) for p, e in zip(prompts, endings, strict=True)]
        pad = torch.nn.utils.rnn.pad_sequence
        return cls(
            pad(tokens, batch_first=True, padding_value=tokenizer.pad_token_id).unflatten(0, (-1, 3)),
            pad(labels, batch_first=True, padding_value=UNTRAINED).unflatten(0, (-1, 3)),
        )

    def batch(self, config: DecoderConfig, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Token ids and labels [batch, L] of random problems, with no column of padding alone."""
        rows = torch.randint(len(self.tokens), (config.batch,), generator=generator)
        worked = torch.rand(config.batch, generator=generator) < config.worked
        careless = torch.rand(config.batch, generator=generator) < config.careless
        which = torch.where(worked, 2, careless.long())
        tokens, labels = self.tokens[rows, which], self.labels[rows, which]
        length = int((labels != UNTRAINED).any(0).nonzero().max()) + 1
        return tokens[:, :length], labels[:, :length]


def solution_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each labelled token given those before it: logits [B, L, V], labels [B, L] -> a mean."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=UNTRAINED)


def evaluation(model: Any, tokenizer: Any, config: DecoderConfig) -> str:
    """Accuracies on the first held-out problems in an order of their own, in words."""
    held_out = arithmetic.problems("eval")
    order = torch.randperm(len(held_out), generator=torch.Generator().manual_seed(0))
    chosen = [held_out[i] for i in order[: config.evaluate_problems].tolist()]
    prompts, metadata = [p.text for p in chosen], [p.metadata for p in chosen]
    greedy, sampled = (
        judged(completions(model, tokenizer, prompts, count, Decoding(arithmetic.LONGEST + 1, temperature)), metadata)
        for count, temperature in ((1, 0.0), (config.evaluate_samples, 1.0))
    )
    found = summary(greedy, sampled, (config.evaluate_samples,))
    return ", ".join(f"{name} {mean:.3f} ± {stderr:.3f}" for name, (mean, stderr) in found.items())


def pretrain_text(config: TextConfig) -> None:
    """Trains the decoder and writes it and its tokenizer as transformers does."""
    config.work.mkdir(parents=True, exist_ok=True)
    tokenizer = tiny_lm.build_tokenizer()
    model = tiny_lm.build_model(tokenizer, config.seed)
    corpus = Corpus.of(arithmetic.problems("train"), tokenizer)

    def loss_of(step: int) -> Tensor:
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
        tokens, labels = corpus.batch(config.decoder, generator)
        return solution_loss(model(input_ids=tokens).logits, labels)

    def evaluate() -> str:
        return evaluation(model, tokenizer, config.decoder)

    stage = Stage("decoder", config.decoder, [model], config.work)
    stage.run(loss_of, evaluate if config.decoder.evaluate_problems else None)
    model.save_pretrained(config.output)
    tiny_lm.build_tokenizer().save_pretrained(config.output)  # a used one keeps the padding of its last batch
    log.info("wrote %s", config.output)
