"""A causal language model of transformers under training.

    rollout      prompts → tokens → samplers.generate → completions and their log-probabilities
    likelihoods  tokens → next-token distributions of old weights and anchors, without gradient → those of θ, with gradient

A decision is a generated token, with ℓ_ij = log π(y_ij | y_i<j, prompt) at the temperature of sampling. All tokens of a
sample are evaluated in one pass, so micro-batches never divide them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from difrl.data.modality import Item
from difrl.data.prompts import Prompt
from difrl.data.rollout import Content, Rollout
from difrl.data.videos import Videos
from difrl.policies.base import TRAINED, Decisions, GuidanceSettings, NoiseKey, batches
from difrl.policies.diagnosis import Setting
from difrl.policies.evaluation import StoredEvaluation
from difrl.policies.importance_sampling import correct_rollout
from difrl.policies.language.engines import Engines
from difrl.policies.language.guidance import build_text_guidance
from difrl.policies.language.likelihoods import TokenLogprobs
from difrl.policies.language.lm_head import CausalLM, ChunkedLogits, Head
from difrl.policies.language.tokenization import TextTokenizer, pad_right
from difrl.policies.references import ReferenceSet
from difrl.policies.snapshots import CURRENT, Snapshots
from difrl.policies.trained_policy import ModelFiles, TrainedPolicy
from samplers import Completions, get_context_length


@dataclass(frozen=True)
class GenerationSettings:
    """Settings of drawing and evaluating completions."""

    temperature: float
    evaluation_temperature: float
    snapshot: str
    """Name of the snapshot whose completions are trained on."""
    batch: int
    """Completions drawn, or evaluated without gradient, at once."""
    chunk: int
    """Tokens whose distributions over the vocabulary are in memory at once."""


@dataclass(frozen=True)
class TextInputs:
    """Texts as a model takes them, and the tokens that count."""

    flat: Mapping[str, Tensor]
    """`Decisions.flat`."""
    tokens: Tensor
    """[B, T], prompts with their completions."""
    attention: Tensor
    """[B, T] int64, 0 for padding."""
    places: tuple[Tensor, Tensor]
    """Row and column of the hidden state that predicts each token that counts."""


class LanguagePolicy(TrainedPolicy[TextInputs, TokenLogprobs]):
    """A policy over a causal language model. Built by difrl.policies.language.load."""

    module_name = "model"
    even = False

    def __init__(
        self,
        network: CausalLM,
        tokenizer: TextTokenizer,
        generation: GenerationSettings,
        engines: Engines,
        snapshots: Snapshots,
        reference_set: ReferenceSet,
        teachers: Mapping[str, CausalLM],
        files: ModelFiles,
    ) -> None:
        super().__init__(snapshots, reference_set, files)
        self.network, self.tokenizer, self.generation = network, tokenizer, generation
        self.engines, self.teachers = engines, teachers

    @property
    def module(self) -> nn.Module:
        module: nn.Module = self.network.model
        return module

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
    def holds_outputs(self) -> bool:
        """Whether outputs are hidden states. The logits of a whole update would take more memory than the model."""
        return not any(network.whole for network in (self.network, *self.teachers.values()))

    @property
    def setting(self) -> Setting:
        own = self.generation.temperature
        others = {1.0, self.generation.evaluation_temperature} - {own, 0.0}
        return Setting("the temperature", "generation.temperature", own, sorted(others))

    def validate_prompts(self, prompts: Sequence[Prompt]) -> None:
        self.tokenizer.validate_prompts(prompts, get_context_length(self.network.model))

    def encode_prompts(self, prompts: Sequence[Prompt], start: float = 0.0) -> None:
        """Do nothing: texts are tokens."""

    def validate_items(self, items: Sequence[Item], places: Sequence[str]) -> None:
        self.tokenizer.validate_completions([str(item) for item in items], places)

    def rollout(self, prompts: Sequence[Prompt], groups: Tensor, samples: Tensor, key: NoiseKey) -> Rollout:
        tokens = self.tokenizer.tokenize_prompts(prompts)
        with self.snapshots.use(self.sampler):
            drawn = self.engines.rollout(tokens, samples, key, self.generation.temperature)
        replay_data = {"tokens": drawn.tokens, "mask": drawn.mask, "log_prob": drawn.logp}
        replay_data["weights"] = self.sampler_fingerprint().expand(len(prompts))
        rollout = Rollout(tuple(prompts), groups, samples, replay_data, texts=self._count_and_decode(drawn))
        if self.engines.correction is None:
            return rollout
        decisions = self.decisions(rollout, key)
        logp = self.recompute_logprobs(rollout, decisions, together=self.generation.batch)
        return correct_rollout(rollout, decisions.mask, logp, self.engines.correction)

    def reference(self, prompts: Sequence[Prompt], samples: Tensor, key: NoiseKey, snapshot: str) -> Rollout:
        tokens = self.tokenizer.tokenize_prompts(prompts)
        with self.snapshots.use(snapshot):
            drawn = self.engines.rollout(tokens, samples, key, self.generation.temperature)
        return Rollout(tuple(prompts), samples, samples, {}, texts=self._count_and_decode(drawn))

    def evaluation(
        self, prompts: Sequence[Prompt], samples: Tensor, key: NoiseKey, guidance: GuidanceSettings = TRAINED
    ) -> Rollout:
        tokens = self.tokenizer.tokenize_prompts(prompts)
        guided = build_text_guidance(self.network, self.snapshots, guidance)
        with self.snapshots.use(guided.snapshot):
            temperature = self.generation.evaluation_temperature
            drawn = self.engines.evaluation(tokens, samples, key, temperature, guided.processors)
        texts, measures = self._count_and_decode(drawn), guided.measures(len(prompts))
        return Rollout(tuple(prompts), samples, samples, {}, texts=texts, measures=measures)

    def _count_and_decode(self, drawn: Completions) -> tuple[str, ...]:
        self.evaluations += int(drawn.mask.sum())
        return self.tokenizer.decode(drawn.tokens, drawn.mask)

    def replay_data(self, prompts: Sequence[Prompt], content: Content) -> dict[str, Tensor]:
        """Return the tokens of completions that `validate_items` accepts."""
        assert not isinstance(content, Tensor | Videos)
        completions = self.tokenizer.tokenize_completions(content)
        tokens, mask = pad_right(completions, self.tokenizer.max_new_tokens, self.tokenizer.pad)
        return {"tokens": tokens, "mask": mask}

    def decisions(self, rollout: Rollout, key: NoiseKey) -> Decisions:
        data = rollout.replay_data
        tensors = {name: data[name] for name in ("tokens", "log_prob", "correction") if name in data}
        return Decisions(tensors, data["mask"], whole=True)

    def prepare(self, rollout: Rollout, decisions: Decisions, settings: Iterable[float | None]) -> TextInputs:
        mask = decisions.mask
        # Every prompt with its completion up to the last token that counts.
        prompts, counts = self.tokenizer.tokenize_prompts(rollout.prompts), mask.sum(dim=1).tolist()
        completions = zip(prompts, decisions.tensors["tokens"].tolist(), counts, strict=True)
        sequences = [[*prompt, *completion[:count]] for prompt, completion, count in completions]
        tokens, attention = pad_right(sequences, max(map(len, sequences)), self.tokenizer.pad)
        tokens, attention = tokens.to(self.device), attention.long().to(self.device)
        # The hidden state before a token is the one that predicts it.
        starts = torch.tensor([len(prompt) for prompt in prompts], device=mask.device)
        rows, columns = mask.nonzero(as_tuple=True)
        return TextInputs(decisions.flat(), tokens, attention, (rows, starts[rows] + columns - 1))

    @contextmanager
    def using(self, snapshot: str) -> Iterator[Callable[[TextInputs, float | None], TokenLogprobs]]:
        network, heads = self.teachers.get(snapshot, self.network), list[Head]()

        def evaluate(inputs: TextInputs, temperature: float | None) -> TokenLogprobs:
            nonlocal heads
            hidden = network.hidden(inputs.tokens, inputs.attention)[inputs.places]
            if snapshot == CURRENT:
                heads = [network.head()]
            elif not heads:  # one for all evaluations, because it may be a copy of the layer
                heads = [network.head(fixed=True)]
            distributions = self._distributions(hidden, heads[0], temperature)
            return TokenLogprobs(distributions.logp(inputs.flat["tokens"]), inputs.flat, distributions)

        with nullcontext() if snapshot in self.teachers else self.snapshots.use(snapshot):
            yield evaluate

    def restore(self, stored: StoredEvaluation, inputs: TextInputs, setting: float | None) -> TokenLogprobs:
        assert stored.output is not None
        assert stored.head is not None
        distributions = self._distributions(stored.output.to(stored.logp.device), stored.head, setting)
        return TokenLogprobs(stored.logp, inputs.flat, distributions)

    def _distributions(self, hidden: Tensor, head: Head, temperature: float | None) -> ChunkedLogits:
        return ChunkedLogits(hidden, head, temperature or self.setting.value, self.generation.chunk)

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
            inputs = self.prepare(rollout.select(rows), part, [setting])
            with self.using(snapshot or self.sampler) as model:
                logp.append(part.unflat(model(inputs, setting).logp))
        return torch.cat(logp)
