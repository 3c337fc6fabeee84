"""LanguagePolicy: a causal language model of transformers as something that can be sampled, evaluated and trained.

    rollout      prompts → tokens → samplers.generate → completions and tape
    likelihoods  tokens → next-token distributions of old weights and anchors, without gradient → those of θ, with gradient

A decision is a generated token, ℓ_ij = log π(y_ij | y_i<j, prompt) at the temperature of sampling. A sample's tokens are
evaluated in one pass, so they are never cut apart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from difrl.core import Likelihoods, k1
from difrl.data.modality import Item
from difrl.data.prompts import Prompt
from difrl.data.rollout import Rollout
from difrl.policies.base import TRAINED, Decisions, GuidanceSettings, NoiseKey, Penalty, batches
from difrl.policies.diagnosis import Diagnosis
from difrl.policies.language.diagnosis import examined
from difrl.policies.language.engines import Engines
from difrl.policies.language.guidance import steer_text
from difrl.policies.language.importance_sampling import corrected
from difrl.policies.language.likelihoods import OLD, TokenLogprobs, distance, kl_from, kl_to
from difrl.policies.language.lm_head import CausalLM, ChunkedLogits
from difrl.policies.language.tokenization import Texts, padded
from difrl.policies.logprob_check import Close
from difrl.policies.references import ReferenceSet
from difrl.policies.snapshots import CURRENT, Snapshots
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


@dataclass(frozen=True, eq=False)
class Sequences:
    """Prompts with their completions, padded on the right."""

    tokens: Tensor
    """[B, T]."""
    attention: Tensor
    """[B, T]."""
    rows: Tensor
    """Of the N tokens that count: the row of each, [N]."""
    places: Tensor
    """The position whose hidden state says what it is, [N]."""
    chosen: Tensor
    """The tokens themselves, [N]."""


class LanguagePolicy:
    """A policy over a causal language model. Built by difrl.policies.language.load."""

    def __init__(
        self,
        network: CausalLM,
        texts: Texts,
        speech: GenerationSettings,
        engines: Engines,
        snapshots: Snapshots,
        comparison: ReferenceSet,
        teachers: Mapping[str, CausalLM],
        save: Callable[[Path], None],
    ) -> None:
        self.network, self.texts, self.speech, self.engines = network, texts, speech, engines
        self.snapshots, self.comparison, self.teachers, self.save = snapshots, comparison, teachers, save
        self.evaluations = 0

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        return self.snapshots.parameters

    @property
    def device(self) -> torch.device:
        return next(iter(self.network.model.parameters())).device

    def refuse(self, prompts: Sequence[Prompt]) -> None:
        self.texts.refuse(prompts, context_of(self.network.model))

    def refuse_items(self, items: Sequence[Item], places: Sequence[str]) -> None:
        self.texts.refuse_completions([str(item) for item in items], places)

    def rollout(self, prompts: Sequence[Prompt], groups: Tensor, samples: Tensor, key: NoiseKey) -> Rollout:
        ids = self.texts.prompts(prompts)
        with self.snapshots.use(self.speech.snapshot):
            drawn = self.engines.rollout(ids, samples, key, self.speech.temperature)
        tape = {"tokens": drawn.tokens, "mask": drawn.mask, "log_prob": drawn.logp}
        tape["weights"] = self.weights_drawn_with().expand(len(prompts))
        self.evaluations += int(drawn.mask.sum())
        texts = self.texts.read(drawn.tokens, drawn.mask)
        rollout = Rollout(tuple(prompts), groups, samples, tape, texts=texts)
        return rollout if self.engines.correction is None else self._corrected(rollout, key, self.engines.correction)

    def _corrected(self, rollout: Rollout, key: NoiseKey, most: float) -> Rollout:
        """Scored again, since another engine has drawn it."""
        here = self.recompute_logprobs(rollout, self.decisions(rollout, key), together=self.speech.batch)
        return corrected(rollout, here, most)

    def reference(self, prompts: Sequence[Prompt], samples: Tensor, key: NoiseKey, snapshot: str) -> Rollout:
        with self.snapshots.use(snapshot):
            drawn = self.engines.rollout(self.texts.prompts(prompts), samples, key, self.speech.temperature)
        self.evaluations += int(drawn.mask.sum())
        return Rollout(tuple(prompts), samples, samples, {}, texts=self.texts.read(drawn.tokens, drawn.mask))

    def replay_data(self, prompts: Sequence[Prompt], content: Tensor | Sequence[str]) -> dict[str, Tensor]:
        """The tokens of completions, which `refuse_items` has let pass."""
        assert not isinstance(content, Tensor)
        rows = self.texts.completions(content)
        tokens, mask = padded(rows, self.texts.most, self.texts.pad)
        return {"tokens": tokens.to(self.device), "mask": mask.to(self.device)}

    def evaluation(
        self, prompts: Sequence[Prompt], samples: Tensor, key: NoiseKey, steering: GuidanceSettings = TRAINED
    ) -> Rollout:
        ids = self.texts.prompts(prompts)
        steered = steer_text(self.network, self.snapshots, steering)
        with self.snapshots.use(steered.snapshot):
            drawn = self.engines.evaluation(ids, samples, key, self.speech.evaluation_temperature, steered.processors)
        self.evaluations += int(drawn.mask.sum())
        texts, measures = self.texts.read(drawn.tokens, drawn.mask), steered.measures(len(prompts))
        return Rollout(tuple(prompts), samples, samples, {}, texts=texts, measures=measures)

    def decisions(self, rollout: Rollout, key: NoiseKey) -> Decisions:
        tensors = {
            name: value for name, value in rollout.replay_data.items() if name in ("tokens", "log_prob", "correction")
        }
        return Decisions(tensors, rollout.replay_data["mask"], whole=True)

    def likelihoods(self, rollout: Rollout, decisions: Decisions, needs: frozenset[str] | None = None) -> Likelihoods:
        needs = self.comparison.needs if needs is None else needs
        sequences, wanted = self._sequences(rollout, decisions), self.comparison.needed_for(needs)
        flat = {name: value[decisions.mask] for name, value in decisions.tensors.items()}
        # Weights are exchanged here, before the differentiable pass, and never again until its backward pass is over.
        with torch.no_grad():
            others = {name: self._token_logprobs(sequences, r.snapshot) for name, r in wanted.items()}
        theta = self._token_logprobs(sequences, CURRENT)
        fields = {"logp": theta.logp, **{f"references/{name}": other.logp for name, other in others.items()}}
        fields |= {
            f"divergence/{name}": distance(r)(theta, others[name])
            for name, r in wanted.items()
            if r.divergence is not None and f"divergence/{name}" in needs
        }
        source = OLD[self.comparison.old]
        if "references/old" in needs:
            fields["references/old"] = source.logp(theta, others, flat)
        if "bias" in needs:
            fields["bias"] = kl_from(theta, source.spoken(theta, others))
        if "scale" in needs:
            fields["scale"] = torch.ones_like(theta.logp)
        if "correction" in flat:
            fields["weight"] = flat["correction"]
        shaped = {name: _placed(value, decisions.mask) for name, value in fields.items()}
        return Likelihoods(shaped.pop("logp"), decisions.mask, shaped)

    @torch.no_grad()
    def penalties(self, rollout: Rollout, decisions: Decisions) -> dict[str, Penalty]:
        sequences, recorded = self._sequences(rollout, decisions), self.rollout_logprobs(rollout, decisions)
        anchors, found = self.comparison.reward_anchors, dict[str, Penalty]()
        centred = any(anchor.centred for anchor in anchors.values())
        drew = self._token_logprobs(sequences, self.speech.snapshot) if centred else None
        for name, anchor in anchors.items():
            spoken = self._token_logprobs(sequences, anchor.snapshot)
            found[name] = _penalty(recorded, drew if anchor.centred else None, spoken, decisions.mask)
        return found

    def rollout_logprobs(self, rollout: Rollout, decisions: Decisions) -> Tensor:
        if "log_prob" in decisions.tensors:
            return decisions.tensors["log_prob"]
        return self.recompute_logprobs(rollout, decisions, together=1)  # another batch shape than training's

    def recomputed_logprobs(self, rollout: Rollout, decisions: Decisions) -> Tensor:
        return self.recompute_logprobs(rollout, decisions)

    @torch.no_grad()
    def recompute_logprobs(
        self,
        rollout: Rollout,
        decisions: Decisions,
        *,
        together: int | None = None,
        snapshot: str | None = None,
        temperature: float | None = None,
    ) -> Tensor:
        """ℓ [B, J] evaluated again, `together` samples at a time, by the weights that drew unless a snapshot is named."""
        parts = []
        for rows in batches(len(rollout), together or len(rollout)):
            part = decisions.select(rows, slice(None))
            sequences = self._sequences(rollout.select(rows), part)
            spoken = self._token_logprobs(sequences, snapshot or self.speech.snapshot).distributions
            asked = replace(spoken, temperature=temperature or spoken.temperature)
            parts.append(_placed(asked.logp(sequences.chosen), part.mask))
        return torch.cat(parts)

    def references_equal_to_policy(self) -> list[str]:
        return [
            name
            for name, r in self.comparison.needed_for(self.comparison.needs).items()
            if self.snapshots.is_current(r.snapshot)
        ]

    def weights_drawn_with(self) -> Tensor:
        """A number [1] that changes with the weights that draw samples."""
        return self.snapshots.fingerprint(self.speech.snapshot)

    def diagnose(self, rollout: Rollout, decisions: Decisions, recorded: Tensor, close: Close) -> str:
        return Diagnosis(examined(self, rollout), rollout, decisions, recorded, close)()

    def _sequences(self, rollout: Rollout, decisions: Decisions) -> Sequences:
        """Every prompt with its completion up to the last token that counts."""
        mask, tokens = decisions.mask, decisions.tensors["tokens"]
        counts = mask.sum(dim=1).tolist()
        prompts = self.texts.prompts(rollout.prompts)
        rows = [[*ids, *row[:n]] for ids, row, n in zip(prompts, tokens.tolist(), counts, strict=True)]
        whole, attended = padded(rows, max(map(len, rows)), self.texts.pad)
        starts = torch.tensor([len(ids) for ids in prompts], device=mask.device)
        row, column = mask.nonzero(as_tuple=True)
        return Sequences(
            whole.to(self.device), attended.long().to(self.device), row, starts[row] + column - 1, tokens[mask]
        )

    def _token_logprobs(self, sequences: Sequences, name: str) -> TokenLogprobs:
        """What a snapshot or a teacher says of the tokens; with gradient for θ, where gradients are on."""
        if name in self.teachers:
            return self._read(self.teachers[name], sequences, fixed=True)
        with self.snapshots.use(name):
            return self._read(self.network, sequences, fixed=name != CURRENT)

    def _read(self, network: CausalLM, sequences: Sequences, *, fixed: bool) -> TokenLogprobs:
        hidden = network.hidden(sequences.tokens, sequences.attention)[sequences.rows, sequences.places]
        head = network.head(fixed=fixed)
        spoken = ChunkedLogits(hidden, head, self.speech.temperature, self.speech.chunk)
        return TokenLogprobs(spoken.logp(sequences.chosen), spoken)


def _penalty(recorded: Tensor, drew: TokenLogprobs | None, anchor: TokenLogprobs, mask: Tensor) -> Penalty:
    """k1 of every token, less its expectation over the vocabulary if the distributions that drew are given.

        k1_ij − KL(drew ‖ anchor)_ij,    KL_ij = Σ_v drew(v) (log drew(v) − log anchor(v))

    The expectation depends on the tokens before j alone, so E[KL_ij ∇ℓ_ij] = 0: the gradient's mean stays, and its variance
    falls (the value function of on-policy distillation: vOPD, 2605.07865).
    """
    estimate = k1(recorded, _placed(anchor.logp, mask))
    if drew is None:
        return Penalty(estimate, estimate)
    expected = _placed(kl_to(drew, anchor), mask)
    return Penalty(estimate - expected, expected)


def _placed(values: Tensor, mask: Tensor) -> Tensor:
    """[N] values where the mask [B, J] is True, 0 elsewhere."""
    return values.new_zeros(mask.shape).masked_scatter(mask, values)
