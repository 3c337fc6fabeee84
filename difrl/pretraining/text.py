"""Pretraining of the shipped language model: a decoder on solved problems of the arithmetic task.

The corpus has all training problems equally often. Some solutions are worked out, and those are right. The others are answers
at once, of which a share is careless and therefore wrong wherever there is a carry or a borrow. A model of such texts is mostly
careless but can do better, and reinforcement learning has to find out when.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from difrl.config.schema.base import FolderPath
from difrl.pretraining import tiny_lm
from difrl.pretraining.solve_rate import SolveRateSettings, check_answers, generate_completions, summarise_accuracy
from difrl.pretraining.stages import Stage, StageConfig
from difrl.tasks import arithmetic

log = logging.getLogger(__name__)

IGNORE_INDEX = -100
"""Label of tokens without a loss, as in transformers and torch."""


class DecoderConfig(StageConfig):
    """The decoder: cross-entropy of solutions, a mean over their tokens."""

    worked: float = Field(ge=0, le=1, description="share of solutions that are worked out")
    careless: float = Field(ge=0, le=1, description="share of the others that forget carry and borrow")
    evaluate_problems: int = Field(256, ge=0, description="held-out problems that are solved at each checkpoint")
    evaluate_samples: int = Field(8, gt=0, description="samples of each of them")


class TextConfig(BaseModel):
    """A language model of the arithmetic task."""

    model_config = ConfigDict(extra="forbid")

    architecture: Literal["tiny-lm"] = Field(description="which tiny model is made")
    output: FolderPath = Field(description="folder of the finished model and its tokenizer")
    work: FolderPath = Field(description="folder of checkpoints")
    seed: int = 0
    decoder: DecoderConfig


@dataclass(frozen=True)
class Corpus:
    """Every problem answered at once, carelessly, and worked out: token ids and labels [problems, 3, L], padded at the end."""

    tokens: Tensor
    labels: Tensor

    @classmethod
    def build(cls, problems: Sequence[arithmetic.Problem], tokenizer: PreTrainedTokenizerBase) -> Corpus:
        """Tokenize the three solutions of every problem. Prompts and padding get no loss."""
        prompts = tokenizer([p.text for p in problems for _ in range(3)]).input_ids
        solutions = [text for p in problems for text in (str(p.answer), str(p.careless), p.worked)]
        endings = [[*ids, tokenizer.eos_token_id] for ids in tokenizer(solutions, add_special_tokens=False).input_ids]
        tokens = [torch.tensor(prompt + ending) for prompt, ending in zip(prompts, endings, strict=True)]
        labels = [torch.tensor([IGNORE_INDEX] * len(p) + e) for p, e in zip(prompts, endings, strict=True)]
        pad = torch.nn.utils.rnn.pad_sequence
        return cls(
            pad(tokens, batch_first=True, padding_value=tokenizer.pad_token_id).unflatten(0, (-1, 3)),
            pad(labels, batch_first=True, padding_value=IGNORE_INDEX).unflatten(0, (-1, 3)),
        )

    def batch(self, config: DecoderConfig, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw token ids and labels [batch, L] of random problems, without columns that hold only padding."""
        rows = torch.randint(len(self.tokens), (config.batch,), generator=generator)
        worked = torch.rand(config.batch, generator=generator) < config.worked
        careless = torch.rand(config.batch, generator=generator) < config.careless
        solution = torch.where(worked, 2, careless.long())
        tokens, labels = self.tokens[rows, solution], self.labels[rows, solution]
        length = int((labels != IGNORE_INDEX).any(0).nonzero().max()) + 1
        return tokens[:, :length], labels[:, :length]


def solution_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross-entropy of each labelled token given those before it, for logits [B, L, V] and labels [B, L]."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORE_INDEX)


def evaluate_decoder(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: DecoderConfig) -> str:
    """Return accuracies on a fixed random choice of held-out problems, as text."""
    held_out = arithmetic.list_problems("eval")
    order = torch.randperm(len(held_out), generator=torch.Generator().manual_seed(0))
    problems = [held_out[i] for i in order[: config.evaluate_problems].tolist()]
    prompts, metadata = [p.text for p in problems], [p.metadata for p in problems]
    greedy, sampled = (
        check_answers(
            generate_completions(
                model, tokenizer, prompts, count, SolveRateSettings(arithmetic.LONGEST + 1, temperature)
            ),
            metadata,
        )
        for count, temperature in ((1, 0.0), (config.evaluate_samples, 1.0))
    )
    rates = summarise_accuracy(greedy, sampled, (config.evaluate_samples,))
    return ", ".join(f"{name} {mean:.3f} ± {stderr:.3f}" for name, (mean, stderr) in rates.items())


def pretrain_text(config: TextConfig) -> None:
    """Train the decoder, and write it and its tokenizer in the format of transformers."""
    config.work.mkdir(parents=True, exist_ok=True)
    tokenizer = tiny_lm.build_tokenizer()
    model = tiny_lm.build_model(tokenizer, config.seed)
    corpus = Corpus.build(arithmetic.list_problems("train"), tokenizer)

    def compute_loss(step: int) -> Tensor:
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
        tokens, labels = corpus.batch(config.decoder, generator)
        return solution_loss(model(input_ids=tokens).logits, labels)

    def evaluate() -> str:
        return evaluate_decoder(model, tokenizer, config.decoder)

    stage = Stage("decoder", config.decoder, [model], config.work)
    stage.run(compute_loss, evaluate if config.decoder.evaluate_problems else None)
    model.save_pretrained(config.output)
    tiny_lm.build_tokenizer().save_pretrained(config.output)  # a used tokenizer keeps the padding of its last batch
    log.info("wrote %s", config.output)
