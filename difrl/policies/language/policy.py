"""LanguagePolicy: a causal language model of transformers as something that can be sampled, evaluated and trained.

    rollout      prompts → tokens → samplers.generate → completions and tape
    likelihoods  tokens → next-token distributions of old weights and anchors, without gradient → those of θ, with gradient

A decision is a generated token, ℓ_ij = log π(y_ij | y_i<j, prompt) at the temperature of sampling. A sample's tokens are
evaluated in one pass, so they are never cut apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from difrl.data.modality import Item
from difrl.data.prompts import Prompt
from difrl.data.rollout import Rollout
from difrl.policies.base import TRAINED, Decisions, GuidanceSettings, NoiseKey, batches
from difrl.policies.diagnosis import Setting
from difrl.policies.language.engines import Engines
from difrl.policies.language.guidance import build_text_guidance
from difrl.policies.language.importance_sampling import correct_rollout
from difrl.policies.language.likelihoods import TokenLogprobs
from difrl.policies.language.lm_head import CausalLM, ChunkedLogits
from difrl.policies.language.tokenization import TextTokenizer, pad_right
from difrl.policies.references import ReferenceSet
from difrl.policies.snapshots import CURRENT, Snapshots
from difrl.policies.trained_policy import TrainedPolicy
from samplers import context_of


@dataclass(frozen=True)
class GenerationSettings:
    """How completions are drawn and scored."""

    temperature: float
    evaluation_temperature: float
    snapshot: str
    """Whose completions are trained on."""
    batch: int
    """Completions drawn, or scored without gradient, at once."""
    chunk: int
    """Tokens whose vocabulary is spelled out at once."""


class LanguagePolicy(TrainedPolicy[TokenLogprobs]):
    """A policy over a causal language model. Built by difrl.policies.language.load."""

    module_name = "model"

    def __init__(
        self,
        network: CausalLM,
        tokenizer: TextTokenizer,
        generation: GenerationSettings,
        engines: Engines,
        snapshots: Snapshots,
        reference_set: ReferenceSet,
        teachers: Mapping[str, CausalLM],
        save: Callable[[Path], None],
    ) -> None:
        super().__init__(snapshots, reference_set, save)
        self.network, self.tokenizer, self.generation, self.engines, self.teachers = (
            network,
            tokenizer,
            generation,
            engines,
            teachers,
        )

    @property
    def module(self) -> nn.Module:
        return self.network.model

    @property
    def dtype(self) -> torch.dtype:
        return self.network.dtype

    @dtype.setter
    def dtype(self, dtype: torch.dtype) -> None:
        self.network = replace(self.network, dtype=dtype)

    @property
    def sampler(self) -> str:
        return self.generation.snapshot

    @property
    def setting(self) -> Setting:
        own = self.generation.temperature
        others = {1.0, self.generation.evaluation_temperature} - {own, 0.0}
        return Setting("the temperature", "generation.temperature", own, sorted(others))

    def validate_prompts(self, prompts: Sequence[Prompt]) -> None:
        self.tokenizer.validate_prompts(prompts, context_of(self.network.model))

    def validate_items(self, items: Sequence[Item], places: Sequence[str]) -> None:
        self.tokenizer.validate_completions([str(item) for item in items], places)

    def rollout(self, prompts: Sequence[Prompt], groups: Tensor, samples: Tensor, key: NoiseKey) -> Rollout:
        ids = self.tokenizer.tokenize_prompts(prompts)
        with self.snapshots.use(self.generation.snapshot):
            drawn = self.engines.rollout(ids, samples, key, self.generation.temperature)
        tape = {"tokens": drawn.tokens, "mask": drawn.mask, "log_prob": drawn.logp}
        tape["weights"] = self.sampler_fingerprint().expand(len(prompts))
        self.evaluations += int(drawn.mask.sum())
        texts = self.tokenizer.decode(drawn.tokens, drawn.mask)
        rollout = Rollout(tuple(prompts), groups, samples, tape, texts=texts)
        return rollout if self.engines.correction is None else self._corrected(rollout, key, self.engines.correction)

    def _corrected(self, rollout: Rollout, key: NoiseKey, most: float) -> Rollout:
        """Scored again, since another engine has drawn it."""
        here = self.recompute_logprobs(rollout, self.decisions(rollout, key), together=self.generation.batch)
        return correct_rollout(rollout, here, most)

    def reference(self, prompts: Sequence[Prompt], samples: Tensor, key: NoiseKey, snapshot: str) -> Rollout:
        with self.snapshots.use(snapshot):
            drawn = self.engines.rollout(
                self.tokenizer.tokenize_prompts(prompts), samples, key, self.generation.temperature
            )
        self.evaluations += int(drawn.mask.sum())
        return Rollout(tuple(prompts), samples, samples, {}, texts=self.tokenizer.decode(drawn.tokens, drawn.mask))

    def replay_data(self, prompts: Sequence[Prompt], content: Tensor | Sequence[str]) -> dict[str, Tensor]:
        """The tokens of completions, which `validate_items` has let pass."""
        assert not isinstance(content, Tensor)
        rows = self.tokenizer.tokenize_completions(content)
        tokens, mask = pad_right(rows, self.tokenizer.max_new_tokens, self.tokenizer.pad)
        return {"tokens": tokens.to(self.device), "mask": mask.to(self.device)}

    def evaluation(
        self, prompts: Sequence[Prompt], samples: Tensor, key: NoiseKey, steering: GuidanceSettings = TRAINED
    ) -> Rollout:
        ids = self.tokenizer.tokenize_prompts(prompts)
        steered = build_text_guidance(self.network, self.snapshots, steering)
        with self.snapshots.use(steered.snapshot):
            drawn = self.engines.evaluation(
                ids, samples, key, self.generation.evaluation_temperature, steered.processors
            )
        self.evaluations += int(drawn.mask.sum())
        texts, measures = self.tokenizer.decode(drawn.tokens, drawn.mask), steered.measures(len(prompts))
        return Rollout(tuple(prompts), samples, samples, {}, texts=texts, measures=measures)

    def decisions(self, rollout: Rollout, key: NoiseKey) -> Decisions:
        tensors = {
            name: value for name, value in rollout.replay_data.items() if name in ("tokens", "log_prob", "correction")
        }
        return Decisions(tensors, rollout.replay_data["mask"], whole=True)

    def evaluator(
        self, rollout: Rollout, decisions: Decisions, settings: Iterable[float | None]
    ) -> Callable[[str, float | None], TokenLogprobs]:
        flat, mask = decisions.flat(), decisions.mask
        # Every prompt with its completion up to the last token that counts.
        prompts, counts = self.tokenizer.tokenize_prompts(rollout.prompts), mask.sum(dim=1).tolist()
        completions = zip(prompts, decisions.tensors["tokens"].tolist(), counts, strict=True)
        sequences = [[*prompt, *completion[:count]] for prompt, completion, count in completions]
        tokens, attention = pad_right(sequences, max(map(len, sequences)), self.tokenizer.pad)
        tokens, attention = tokens.to(self.device), attention.long().to(self.device)
        # The hidden state before a token is the one that predicts it.
        starts = torch.tensor([len(prompt) for prompt in prompts], device=mask.device)
        rows, columns = mask.nonzero(as_tuple=True)
        columns = starts[rows] + columns - 1

        def evaluate(snapshot: str, temperature: float | None) -> TokenLogprobs:
            network = self.teachers.get(snapshot, self.network)
            with nullcontext() if snapshot in self.teachers else self.snapshots.use(snapshot):
                hidden, head = network.hidden(tokens, attention)[rows, columns], network.head(fixed=snapshot != CURRENT)
                distributions = ChunkedLogits(hidden, head, temperature or self.setting.value, self.generation.chunk)
                return TokenLogprobs(distributions.logp(flat["tokens"]), flat, distributions)

        return evaluate

    @torch.no_grad()
    def recompute_logprobs(
        self,
        rollout: Rollout,
        decisions: Decisions,
        *,
        together: int | None = None,
        snapshot: str | None = None,
        setting: float | None = None,
    ) -> Tensor:
        logp = []
        for rows in batches(len(rollout), together or len(rollout)):
            part = decisions.select(rows, slice(None))
            evaluate = self.evaluator(rollout.select(rows), part, [setting])
            logp.append(part.unflat(evaluate(snapshot or self.sampler, setting).logp))
        return torch.cat(logp)
