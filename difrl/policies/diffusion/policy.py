"""DiffusionPolicy: a text-to-image pipeline of diffusers as something that can be sampled, evaluated and trained.

The family (families/) names the pipeline's parts, the kind (likelihoods.py) says what a decision is, and the snapshots
say under which weights. What is left here is the order in which they are asked:

    rollout      prompts → condition → samplers.rollout → images and tape
    likelihoods  decisions → outputs under old weights and anchors, without gradient → output of θ, with gradient
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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
from difrl.policies.diffusion.branching import ALONE, Branching
from difrl.policies.diffusion.diagnosis import examined
from difrl.policies.diffusion.divergences import DIVERGENCES
from difrl.policies.diffusion.families import Family
from difrl.policies.diffusion.guidance import build_guidance
from difrl.policies.diffusion.image_encoder import encoded
from difrl.policies.diffusion.likelihoods import Evaluation, Kind
from difrl.policies.diffusion.noising import Model
from difrl.policies.diffusion.old_policy import OLD
from difrl.policies.diffusion.prompt_encoder import PromptEncoder
from difrl.policies.logprob_check import Close
from difrl.policies.references import ReferenceSet
from difrl.policies.snapshots import CURRENT, Snapshots
from samplers import (
    Condition,
    Denoiser,
    Grid,
    Kernel,
    Process,
    Reduction,
    Scheduler,
    Trajectory,
    Window,
    advance,
    classifier_free,
    keyed,
    rollout,
    solve,
)


@dataclass(frozen=True)
class Sampling:
    """How samples are drawn."""

    grid: Grid
    kernel: Kernel
    window: Callable[[NoiseKey], Window]
    guidance: float
    snapshot: str
    batch: int
    shape: tuple[int, ...]
    """Of one latent."""
    reduce: Reduction = "mean"
    """Of the recorded log-probabilities, over the dimensions of a latent."""
    means: bool = False
    """Whether the means of transitions are recorded."""
    scheduler: Scheduler | None = None
    """A diffusers scheduler that takes the kernel's place."""
    branching: Branching = ALONE
    """What samples share before the window."""


class DiffusionPolicy:
    """A policy over a diffusers pipeline. Built by difrl.policies.diffusion.load."""

    def __init__(
        self,
        family: Family,
        kind: Kind,
        sampling: Sampling,
        evaluation_sampling: Sampling,
        snapshots: Snapshots,
        comparison: ReferenceSet,
        prompts: PromptEncoder,
        save: Callable[[Path], None],
    ) -> None:
        self.family, self.kind, self.snapshots, self.comparison = family, kind, snapshots, comparison
        self.sampling, self.evaluation_sampling = sampling, evaluation_sampling
        self.prompts, self.save, self.dtype = prompts, save, prompts.dtype
        self.process: Process = family.process
        self.evaluations = 0

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        return self.snapshots.parameters

    @property
    def device(self) -> torch.device:
        return next(self.family.denoiser.parameters()).device

    def denoiser(self, snapshot: str = CURRENT, guidance: float = 1.0) -> Denoiser:
        """The model under a snapshot's weights and classifier-free guidance; without gradient but for `current`."""

        def evaluate(x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
            self.evaluations += x_t.shape[0]
            gradient = torch.is_grad_enabled() and snapshot == CURRENT
            timestep = self.process.timestep(t).float()
            with self.snapshots.use(snapshot), torch.set_grad_enabled(gradient), self._autocast():
                return self.family.call(x_t.to(self.dtype), timestep, condition.tensors).float()

        return classifier_free(evaluate, guidance)

    @contextmanager
    def _autocast(self) -> Iterator[None]:
        # Trained weights are float32 whatever the dtype of the frozen ones; autocast runs them in the latter.
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            yield

    def refuse(self, prompts: Sequence[Prompt]) -> None:
        """Any text can be drawn; its encoder cuts what is too long."""

    def refuse_items(self, items: Sequence[Item], places: Sequence[str]) -> None:
        """Images of a file have one size, which `tape` holds to the model's."""

    def rollout(self, prompts: Sequence[Prompt], groups: Tensor, samples: Tensor, key: NoiseKey) -> Rollout:
        sampling = self.sampling
        denoiser = self.denoiser(sampling.snapshot, sampling.guidance)
        with self.snapshots.use(sampling.snapshot):  # once, not once a step: it may have to come from the CPU
            tape = self._draw(denoiser, prompts, samples, key, sampling)
            tape["weights"] = self.weights_drawn_with().expand(len(prompts))
        images = self._decode(tape["latents"], sampling.batch)
        return Rollout(tuple(prompts), groups, samples, tape, images)

    def reference(self, prompts: Sequence[Prompt], samples: Tensor, key: NoiseKey, snapshot: str) -> Rollout:
        sampling = replace(self.sampling, snapshot=snapshot, branching=replace(self.sampling.branching, size=1))
        with self.snapshots.use(snapshot):
            tape = self._draw(self.denoiser(snapshot, sampling.guidance), prompts, samples, key, sampling)
        images = self._decode(tape["latents"], sampling.batch)
        return Rollout(tuple(prompts), samples, samples, {}, images)

    def replay_data(self, prompts: Sequence[Prompt], content: Tensor | Sequence[str]) -> dict[str, Tensor]:
        """The latents of images; refuses images of another size than the model is sampled at."""
        assert isinstance(content, Tensor)
        return {"latents": encoded(self.family, content, self.sampling.shape, self.sampling.batch)}

    def evaluation(
        self, prompts: Sequence[Prompt], samples: Tensor, key: NoiseKey, steering: GuidanceSettings = TRAINED
    ) -> Rollout:
        sampling = self.evaluation_sampling
        steered = build_guidance(self.denoiser, sampling.guidance, steering, sampling.grid)
        tape = self._draw(steered.denoiser, prompts, samples, key, sampling)
        images = self._decode(tape["latents"], sampling.batch)
        return Rollout(tuple(prompts), samples, samples, {}, images, measures=steered.measures(len(prompts)))

    @torch.no_grad()
    def _draw(
        self, denoiser: Denoiser, prompts: Sequence[Prompt], samples: Tensor, key: NoiseKey, sampling: Sampling
    ) -> dict[str, Tensor]:
        chunks = list(sampling.branching.chunks(samples, sampling.batch))
        parts = []
        for rows in chunks:
            condition = self.prompts([prompts[i] for i in rows.tolist()], sampling.guidance != 1)
            condition = replace(condition, rows=rows.to(self.device))
            parts.append(self._draw_branches(denoiser, condition, samples[rows], key, sampling))
        back = torch.cat(chunks).argsort()
        return {name: torch.cat([part[name] for part in parts])[back.to(self.device)] for name in parts[0]}

    def _draw_branches(
        self, denoiser: Denoiser, condition: Condition, samples: Tensor, key: NoiseKey, sampling: Sampling
    ) -> dict[str, Tensor]:
        """Whole branches: what their samples share once each, then every sample's own steps."""

        def noise(use: str, numbers: Tensor, index: int = 0) -> Tensor:
            return keyed(
                sampling.shape,
                seed=key.seed,
                step=key.step,
                samples=numbers,
                use=f"{key.purpose}/{use}",
                index=index,
                device=self.device,
            )

        numbers, first, owner = sampling.branching.owners(samples)
        if sampling.scheduler is not None:
            length = self.family.sequence_length(sampling.shape)
            steps, x_init = sampling.grid.steps, noise("init", numbers)[owner]
            x0 = solve(denoiser, self.process, sampling.scheduler, steps, x_init, condition, sequence_length=length)
            return {"latents": x0}
        window, branching = sampling.window(key), sampling.branching
        shared = advance(
            denoiser,
            self.process,
            sampling.grid,
            branching.kernel,
            noise("init", numbers),
            condition.select(first.to(self.device)),
            steps=window.start,
            noise=(lambda step: noise("prefix", numbers, step)) if branching.noisy else None,
        )

        def draw(rows: slice) -> dict[str, Tensor]:
            trajectory = rollout(
                denoiser,
                self.process,
                sampling.grid,
                sampling.kernel,
                shared[owner[rows].to(self.device)],
                condition.select(rows),
                window=window,
                noise=lambda step: noise("sde", samples[rows], step),
                start=window.start,
                log_prob_reduce=sampling.reduce,
                keep_means=sampling.means,
            )
            together = torch.full((len(trajectory.x0),), len(trajectory.x0), device=self.device)
            return {**_tape(trajectory), "together": together}

        tapes = [draw(rows) for rows in batches(len(samples), sampling.batch)]
        return {name: torch.cat([tape[name] for tape in tapes]) for name in tapes[0]}

    def _decode(self, latents: Tensor, batch: int) -> Tensor:
        return torch.cat([self.family.decode(latents[rows]) for rows in batches(len(latents), batch)])

    def decisions(self, rollout: Rollout, key: NoiseKey) -> Decisions:
        lent = Model(self.denoiser, lambda asked: self.prompts(asked.prompts, False), self.sampling.batch)
        return self.kind.decisions(rollout, key, lent)

    def likelihoods(self, rollout: Rollout, decisions: Decisions, needs: frozenset[str] | None = None) -> Likelihoods:
        needs = self.comparison.needs if needs is None else needs
        flat = decisions.flat()
        guidance = self.own_guidance
        wanted = self.comparison.needed_for(needs)
        scales = {guidance, *(r.guidance or guidance for r in wanted.values())}
        condition = self.prompts(rollout.prompts, any(scale != 1 for scale in scales))
        condition = condition.repeat_interleave(decisions.mask.shape[1])

        def evaluate(snapshot: str, scale: float) -> Evaluation:
            output = self.denoiser(snapshot, scale)(flat["x_t"], flat["t"], condition)
            return self.kind.evaluate(output, flat)

        # Weights are exchanged here, before the differentiable pass, and never again until its backward pass is over.
        with torch.no_grad():
            others = {name: evaluate(r.snapshot, r.guidance or guidance) for name, r in wanted.items()}
        theta = evaluate(CURRENT, guidance)
        fields = {"logp": theta.logp, **{f"references/{name}": other.logp for name, other in others.items()}}
        fields |= {
            f"divergence/{name}": DIVERGENCES[r.divergence](theta, others[name])
            for name, r in wanted.items()
            if r.divergence is not None and f"divergence/{name}" in needs
        }
        fields |= self._of_old(theta, others, flat, needs) | self._factors(theta, flat, needs)
        shaped = {name: value.unflatten(0, decisions.mask.shape) for name, value in fields.items()}
        return Likelihoods(shaped.pop("logp"), decisions.mask, shaped)

    def _of_old(
        self, theta: Evaluation, others: Mapping[str, Evaluation], flat: dict[str, Tensor], needs: frozenset[str]
    ) -> dict[str, Tensor]:
        """What compares θ with the weights that are old to this run: ℓ_old, KL(old‖θ), mixtures."""
        source, found = OLD[self.comparison.old], {}
        if "references/old" in needs:
            found["references/old"] = source.logp(theta, others, flat)
        if "bias" in needs:
            found["bias"] = theta.kl(source.mean(theta, others, flat))
        if "mixed/plus" in needs:
            found["mixed/plus"], found["mixed/minus"] = self.kind.mixed(theta.output, others["old"].output, flat)
        return found

    def _factors(self, theta: Evaluation, flat: dict[str, Tensor], needs: frozenset[str]) -> dict[str, Tensor]:
        scale = self.kind.scale(flat) if "scale" in needs else None
        factors = {"scale": scale, "weight": self.kind.weight(flat)}
        return {name: value.to(theta.logp.dtype) for name, value in factors.items() if value is not None}

    @property
    def own_guidance(self) -> float:
        """The guidance scale under which θ's likelihoods are evaluated."""
        return self.sampling.guidance if self.kind.guided else 1.0

    @torch.no_grad()
    def penalties(self, rollout: Rollout, decisions: Decisions) -> dict[str, Penalty]:
        flat, anchors = decisions.flat(), self.comparison.reward_anchors
        scales = {name: r.guidance or self.own_guidance for name, r in anchors.items()}
        condition = self.prompts(rollout.prompts, any(scale != 1 for scale in scales.values()))
        condition = condition.repeat_interleave(decisions.mask.shape[1])
        recorded, found = self.rollout_logprobs(rollout, decisions), dict[str, Penalty]()
        for name, anchor in anchors.items():
            output = self.denoiser(anchor.snapshot, scales[name])(flat["x_t"], flat["t"], condition)
            logp = self.kind.evaluate(output, flat).logp.unflatten(0, decisions.mask.shape)
            estimate = k1(recorded, logp)
            found[name] = Penalty(estimate, estimate)
        return found

    def references_equal_to_policy(self) -> list[str]:
        own, references = self.own_guidance, self.comparison.needed_for(self.comparison.needs)
        return [
            name
            for name, r in references.items()
            if (r.guidance or own) == own and self.snapshots.is_current(r.snapshot)
        ]

    def weights_drawn_with(self) -> Tensor:
        """A number [1] that changes with the weights that draw samples."""
        return self.snapshots.fingerprint(self.sampling.snapshot)

    def rollout_logprobs(self, rollout: Rollout, decisions: Decisions) -> Tensor:
        if "log_prob" in decisions.tensors:
            return decisions.tensors["log_prob"]
        # One decision at a time: another batch shape than training's, as a rollout's is.
        return self.recompute_logprobs(rollout, decisions, together=1)

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
        guidance: float | None = None,
    ) -> Tensor:
        """ℓ [B, J] evaluated again, without gradient, under the weights that drew the samples unless a snapshot is named.

        In one batch, or as a rollout does it: `together` samples at one decision at a time.
        """
        flat, (rows, columns) = decisions.flat(), decisions.mask.shape
        scale = self.own_guidance if guidance is None else guidance
        condition = self.prompts(rollout.prompts, scale != 1).repeat_interleave(columns)
        denoiser = self.denoiser(snapshot or self.sampling.snapshot, scale)
        if together is None:
            output = denoiser(flat["x_t"], flat["t"], condition)
        else:
            output = torch.empty_like(flat["x_t"])
            for start, column in itertools.product(range(0, rows, together), range(columns)):
                # A batch that is not full is filled up with rows again, so that all have one shape.
                index = (torch.arange(start, start + together, device=self.device) % rows) * columns + column
                mine = slice(min(together, rows - start))
                output[index[mine]] = denoiser(flat["x_t"][index], flat["t"][index], condition.select(index))[mine]
        return self.kind.evaluate(output, flat).logp.unflatten(0, decisions.mask.shape)

    def diagnose(self, rollout: Rollout, decisions: Decisions, recorded: Tensor, close: Close) -> str:
        return Diagnosis(examined(self, rollout), rollout, decisions, recorded, close)()


def _tape(trajectory: Trajectory) -> dict[str, Tensor]:
    return {
        **({} if trajectory.mean is None else {"mean": trajectory.mean}),
        "latents": trajectory.x0,
        "x_t": trajectory.x_t,
        "x_next": trajectory.x_next,
        "t": trajectory.t,
        "s": trajectory.s,
        "log_prob": trajectory.log_prob,
    }
