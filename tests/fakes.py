"""A policy small enough to write down, which fills every field of the record, and what else a trainer needs.

`FakePolicy` is its mathematics, `LinearPolicy` the same behind the interface that the trainer sees.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from difrl.core import Constant, Likelihoods, velocity
from difrl.data.modality import Item
from difrl.data.prompts import Prompt
from difrl.data.rollout import Rollout, ScoredRollout
from difrl.policies.base import TRAINED, Decisions, GuidanceSettings, NoiseKey, Part, Penalty
from difrl.policies.evaluation import StoredEvaluation
from difrl.policies.layout import Layout
from difrl.policies.logprob_check import Close
from difrl.policies.snapshots import Snapshots
from difrl.runtime.distributed import DistributedContext
from difrl.scoring import Scorer
from difrl.training.trainer import Trainer
from rewards import Scores
from samplers import keyed, keyed_uniform
from tests.recipes import FLOW_GRPO, recipe


@dataclass
class FakePolicy:
    """x_ij = W c_ij + std_j z_ij in D dimensions; samples come from W_old. log N is averaged over D."""

    weight: Tensor
    old: Tensor
    base: Tensor
    contexts: Tensor
    noise: Tensor
    std: Tensor
    mask: Tensor
    mix: float = 0.7

    @classmethod
    def make(cls, rows: int, columns: int, *, dims: int = 3, shift: float = 0.3, seed: int = 0) -> FakePolicy:
        g = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g, dtype=torch.float64)

        old = normal(dims, dims)
        lengths = torch.randint(1, columns + 1, (rows, 1), generator=g)
        return cls(
            weight=(old + shift * normal(dims, dims)).requires_grad_(),
            old=old,
            base=old + 0.2 * normal(dims, dims),
            contexts=normal(rows, columns, dims),
            noise=normal(rows, columns, dims),
            std=torch.linspace(0.5, 1.5, columns, dtype=torch.float64),
            mask=torch.arange(columns) < lengths,
        )

    def likelihoods(self, rows: slice | Tensor = slice(None)) -> Likelihoods:
        c, std = self.contexts[rows], self.std[:, None]
        out, out_old, out_base = c @ self.weight.T, c @ self.old.T, c @ self.base.T
        x = out_old + std * self.noise[rows]
        scale = self.std.expand(c.shape[:2])
        return Likelihoods(
            logp=log_normal(x, out, std),
            mask=self.mask[rows],
            terms={
                "references/old": log_normal(x, out_old, std),
                "references/base": log_normal(x, out_base, std),
                "divergence/base": columns(velocity, out, out_base),
                "divergence/old": kl(out_old, out, std),
                "bias": kl(out_old, out, std),
                "scale": scale,
                "weight": 1.0 / scale,
                "mixed/plus": log_normal(x, self.mix * out + (1 - self.mix) * out_old, std),
                "mixed/minus": log_normal(x, (1 + self.mix) * out_old - self.mix * out, std),
            },
        )

    def grad(self, scalar: Tensor) -> Tensor:
        return torch.autograd.grad(scalar, self.weight, retain_graph=True)[0]


def without(lik: Likelihoods, *names: str) -> Likelihoods:
    """Return the likelihoods with all terms but these."""
    return replace(lik, terms={name: term for name, term in lik.terms.items() if name not in names})


def log_normal(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    return torch.distributions.Normal(mean, std.expand_as(mean)).log_prob(x).mean(dim=-1)


def columns(divergence: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """A [B, D] -> [B] divergence of every decision: [B, J, D] -> [B, J]."""
    rows, number = tensors[0].shape[:2]
    return divergence(*(x.flatten(0, 1) for x in tensors)).reshape(rows, number)


def kl(mean: Tensor, other: Tensor, std: Tensor) -> Tensor:
    """Return the KL of Gaussians of one std, averaged over dimensions: |mean - other|^2 / (2 std^2)."""
    return ((mean - other) / std).square().mean(dim=-1) / 2


class LinearPolicy:
    """FakePolicy as a policy: x_j = W c_j + std_j z_j, with c, z and the sequence's length keyed by the sample.

    Snapshots are "old", which is W at the beginning of a step, and the base. Two samples differ in c and z, so
    rewards that look at the image sigmoid(x_0) can be learnt.
    """

    def __init__(self, *, dims: int = 3, columns: int = 4, seed: int = 0) -> None:
        g = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(dims, dims, generator=g, dtype=torch.float64))
        self.base = self.weight.detach().clone() + 0.2
        self.std = torch.linspace(0.5, 1.5, columns, dtype=torch.float64)
        self.snapshots = Snapshots(Layout({"weight": self.weight}), {"old": Constant(0.0)}, self._base)
        self.evaluations = 0
        self.seen: list[tuple[NoiseKey, list[int]]] = []
        """The key and the samples of every call of `decisions`."""

    @contextmanager
    def _base(self) -> Iterator[None]:
        current, self.weight.data = self.weight.data, self.base
        try:
            yield
        finally:
            self.weight.data = current

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        return self.snapshots.parameters

    def validate_prompts(self, prompts: Sequence[Prompt]) -> None: ...

    def encode_prompts(self, prompts: Sequence[Prompt], start: float = 0.0) -> None: ...

    def validate_items(self, items: Sequence[Item], places: Sequence[str]) -> None: ...

    def rollout(self, prompts: Sequence[Prompt], groups: Tensor, samples: Tensor, key: NoiseKey) -> Rollout:
        return self._draw(self.weight.detach(), prompts, groups, samples, key)

    def drawing(self, *snapshots: str, alike: bool = True) -> AbstractContextManager[None]:
        return self.snapshots.gathered(*snapshots)

    def reference(self, prompts: Sequence[Prompt], samples: Tensor, key: NoiseKey, snapshot: str) -> Rollout:
        with self.snapshots.use(snapshot):
            return self._draw(self.weight.detach().clone(), prompts, samples, samples, key)

    def replay_data(self, prompts: Sequence[Prompt], content: Tensor | Sequence[str]) -> Mapping[str, Tensor]:
        raise NotImplementedError("what this policy draws has no form outside of it")

    def evaluation(
        self, prompts: Sequence[Prompt], samples: Tensor, key: NoiseKey, guidance: GuidanceSettings = TRAINED
    ) -> Rollout:
        moved = guidance.rlg * (self.weight.detach() - self.base)
        drawn = self._draw(self.base + moved, prompts, samples, samples, key)
        distance = moved.square().mean().float()
        return replace(drawn, measures={"divergence/base": distance.expand(len(samples))})

    def _draw(
        self, weight: Tensor, prompts: Sequence[Prompt], groups: Tensor, samples: Tensor, key: NoiseKey
    ) -> Rollout:
        columns, dims = len(self.std), len(weight)
        keys: dict[str, Any] = {"seed": key.seed, "step": key.step, "samples": samples, "dtype": torch.float64}
        context = keyed((columns, dims), use=f"{key.purpose}/context", **keys)
        noise = keyed((columns, dims), use=f"{key.purpose}/noise", **keys)
        length = 1 + (keyed_uniform((1,), use="length", **keys) * columns).long()
        mean = context @ weight.T
        x = mean + self.std[:, None] * noise
        self.evaluations += len(samples) * columns
        tape = {
            "context": context,
            "noise": noise,
            "mask": torch.arange(columns) < length,
            "std": self.std.expand(len(samples), columns),
            "log_prob": log_normal(x, mean, self.std[:, None]),
        }
        images = x[:, 0, :3].sigmoid().float()[:, :, None, None].expand(-1, -1, 4, 4)
        return Rollout(tuple(prompts), groups, samples, tape, images)

    def decisions(self, rollout: Rollout, key: NoiseKey) -> Decisions:
        self.seen.append((key, rollout.samples.tolist()))
        tensors = {name: value for name, value in rollout.replay_data.items() if name != "mask"}
        return Decisions(tensors, rollout.replay_data["mask"])

    def evaluate_references(
        self, rollout: Rollout, decisions: Decisions, parts: Sequence[Part], needs: frozenset[str] | None = None
    ) -> list[dict[str, StoredEvaluation]]:
        return [{} for _ in parts]

    def likelihoods(
        self,
        rollout: Rollout,
        decisions: Decisions,
        needs: frozenset[str] | None = None,
        references: Mapping[str, StoredEvaluation] | None = None,
    ) -> Likelihoods:
        d = decisions.tensors
        self.evaluations += decisions.mask.numel()
        with self.snapshots.use("old"):
            old = self.weight.detach().clone()
        fake = FakePolicy(self.weight, old, self.base, d["context"], d["noise"], d["std"][0], decisions.mask)
        return fake.likelihoods()

    def rollout_logprobs(self, rollout: Rollout, decisions: Decisions, unlike: int = 0) -> Tensor:
        self.evaluations += decisions.mask.numel()
        return decisions.tensors["log_prob"]

    def recompute_logprobs(self, rollout: Rollout, decisions: Decisions) -> Tensor:
        self.evaluations += decisions.mask.numel()
        return decisions.tensors["log_prob"]

    def penalties(
        self, rollout: Rollout, decisions: Decisions, parts: Sequence[Part], names: Collection[str] | None = None
    ) -> Iterator[dict[str, Penalty]]:
        for rows, columns in parts:
            part = decisions.select(rows, columns)
            estimate = part.tensors["log_prob"] - self.likelihoods(rollout.select(rows), part)["references/base"]
            yield {"base": Penalty(estimate, estimate)}

    def references_equal_to_policy(self) -> list[str]:
        return []

    def diagnose(self, rollout: Rollout, decisions: Decisions, recorded: Tensor, close: Close) -> str:
        return ""

    def save(self, folder: Path) -> None:
        pass

    merge = save


@dataclass
class Brightness:
    """The mean of an image, times a factor. Rows for which `fails` is true are not valid, and hold `left`."""

    factor: float = 1.0
    fails: Callable[[Tensor], Tensor] | None = None
    left: float = 0.0
    name: str = "brightness"
    needs: tuple[str, ...] = ("images",)

    def __call__(self, samples: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Scores:
        values = self.factor * samples.float().mean(tuple(range(1, samples.ndim)))
        failed = torch.zeros_like(values, dtype=torch.bool) if self.fails is None else self.fails(samples)
        return Scores(torch.where(failed, self.left, values), ~failed)

    def to(self, device: torch.device | str) -> Brightness:
        return self


@dataclass
class Moderation(Brightness):
    """A witness of Brightness that agrees with it up to `best` and falls beyond."""

    best: float = 0.5
    name: str = "moderation"

    def __call__(self, samples: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Scores:
        scores = super().__call__(samples, prompts, metadata)
        return Scores(-(scores.values - self.best).abs(), scores.valid)


class Moody(Brightness):
    """Random scores from the global random state, different at every call."""

    def __call__(self, samples: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Scores:
        scores = super().__call__(samples, prompts, metadata)
        return Scores(scores.values + torch.rand(len(samples)), scores.valid)


class Ones:
    """Number of ones in a text."""

    name, needs = "ones", ("texts",)

    def __call__(self, samples: Sequence[str], prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Scores:
        return Scores(torch.tensor([float(text.count("1")) for text in samples]), torch.ones(len(samples)).bool())

    def to(self, device: torch.device | str) -> Ones:
        return self


@dataclass
class Told:
    """A scorer of training that is a function of the rollout."""

    score: Callable[[Rollout], ScoredRollout]

    def score_for_training(
        self, rollout: Rollout, weights: Mapping[str, float], reference_scores: Any = None
    ) -> ScoredRollout:
        return self.score(rollout)


@dataclass
class Listed:
    """Scores by sample number, as given by a test. None is a row that is not valid."""

    values: Mapping[int, float | None]
    asked: list[list[int]] = field(default_factory=list)

    def __call__(self, rollout: Rollout) -> ScoredRollout:
        numbers = rollout.samples.tolist()
        self.asked.append(numbers)
        found = [self.values[n] for n in numbers]
        rewards = torch.tensor([0.0 if v is None else v for v in found])
        return ScoredRollout(rollout, rewards, torch.tensor([v is not None for v in found]), {"reward/listed": rewards})

    def score_for_training(
        self, rollout: Rollout, weights: Mapping[str, float], reference_scores: Any = None
    ) -> ScoredRollout:
        return self(rollout)


PROMPTS = [Prompt(f"prompt {i}", {}) for i in range(10)]


def linear_trainer(
    *,
    scorer: Any = None,
    processes: DistributedContext | None = None,
    policy: Any = None,
    prompts: Sequence[Prompt] = PROMPTS,
    **sections: Any,
) -> Trainer:
    """The real trainer of a linear policy; anchored to the base unless the sections say otherwise."""
    settings = {"anchors": [{"to": "base", "coefficient": 0.3}], **sections}
    return Trainer(
        recipe("nowhere", **{**FLOW_GRPO, **settings}),
        LinearPolicy() if policy is None else policy,
        Scorer.from_rewards({"brightness": (Brightness(), 1.0)}, {}) if scorer is None else scorer,
        prompts,
        processes or DistributedContext(),
    )


class Meeting:
    """Exchange of values between threads that act as processes."""

    def __init__(self, count: int) -> None:
        self.barrier = threading.Barrier(count, timeout=60)
        self.left: list[Any] = [None] * count

    def exchange(self, rank: int, value: Any) -> list[Any]:
        self.left[rank] = value
        self.barrier.wait()
        found = list(self.left)
        self.barrier.wait()
        return found


class ThreadProcesses(DistributedContext):
    """One of several processes, acted by threads. Collective operations go through a meeting."""

    def __init__(self, accelerator: Accelerator, rank: int, meeting: Meeting) -> None:
        super().__init__(accelerator)
        self._rank, self._meeting = rank, meeting

    @property
    def count(self) -> int:
        return self._meeting.barrier.parties

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def is_main(self) -> bool:
        return self._rank == 0

    def gather(self, tensor: Tensor) -> Tensor:
        found = self._meeting.exchange(self._rank, tensor)
        assert len({x.shape for x in found}) == 1, "gather wants equal shapes"
        return torch.cat(found)

    def gather_objects(self, value: Any) -> list[Any]:
        found: list[Any] = self._meeting.exchange(self._rank, value)
        return found

    def broadcast(self, tensor: Tensor) -> Tensor:
        received: Tensor = self._meeting.exchange(self._rank, tensor)[0]
        return received

    def sum(self, tensor: Tensor) -> Tensor:
        return torch.stack(self._meeting.exchange(self._rank, tensor)).sum(0)

    def wait(self) -> None:
        self._meeting.barrier.wait()


def in_threads(count: int, work: Callable[[DistributedContext], Any]) -> list[Any]:
    """Run a function in several processes acted by threads, and return their results."""
    accelerator, meeting = Accelerator(), Meeting(count)
    results: list[Any] = [None] * count
    errors: list[BaseException] = []

    here = threading.local()

    def part(self: Layout, name: str, whole: Tensor | None) -> Tensor:
        found: Tensor = here.processes.broadcast(whole)
        return found

    def run(rank: int) -> None:
        here.processes = ThreadProcesses(accelerator, rank, meeting)
        try:
            results[rank] = work(here.processes)
        except BaseException as error:
            errors.append(error)
            meeting.barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(count)]
    with mock.patch.object(Layout, "part", part):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if errors:
        raise next((e for e in errors if not isinstance(e, threading.BrokenBarrierError)), errors[0])
    return results
