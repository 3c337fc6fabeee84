"""Time of a step on 1 to 64 processes, predicted from the phases of a step on one. docs/scaling.md has its tables.

    python -m benchmarks.scaling check                          minutes on a CPU: predictions against 1, 2 and 3 processes
    python -m benchmarks.scaling plan RECIPE [KEY=VALUE …]      a plan from FLOPs (`difrl check`), for the hardware of the flags
    python -m benchmarks.scaling plan RECIPE --phases FILE      the same from measured phases
    python -m benchmarks.scaling measure FILE RECIPE COUNT,…    measure phases; under torchrun with several processes

A phase takes a + b · groups / processes seconds. `measure` takes steps with two numbers of groups, which gives a and b.
Traffic is added for gradients (a ring: 2 (P − 1) / P of their bytes) and for sharded weights ((P − 1) / P of their bytes each
time that they are gathered), at the speed of the slowest link of the ring. Nothing is taken to overlap.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from unittest.mock import patch

import torch

from benchmarks.common import markdown
from benchmarks.models import MODELS, build_folder
from difrl.config import RunConfig
from difrl.config.load import read_config
from difrl.policies.load import load_policy
from difrl.runtime.distributed import DistributedContext
from difrl.runtime.dtypes import DTYPES
from difrl.training import step_metrics
from difrl.training.cost.estimate import Estimate, estimate
from difrl.training.inputs import load_inputs
from difrl.training.trainer import Trainer, find_indivisible

PROCESSES = (1, 2, 4, 8, 16, 32, 64)
Phases = Mapping[str, tuple[float, float]]
"""Phase of a step -> seconds in any case, and seconds more for each group of a process."""


@dataclass(frozen=True)
class Hardware:
    """Speeds of one GPU and of its links."""

    flops: float = 400e12
    """FLOP/s that a model reaches: 40 % of the 989e12 of bfloat16 without sparsity (NVIDIA H100 SXM datasheet)."""
    memory: float = 3.35e12
    """Bytes/s of its memory (the same datasheet)."""
    inside: float = 450e9
    """Bytes/s to the other GPUs of a machine, one way: half of NVLink's 900e9 (the same datasheet)."""
    between: float = 50e9
    """Bytes/s to other machines: an InfiniBand adapter of 400 Gb/s for each GPU (NVIDIA DGX H100 user guide)."""
    score: float = 0.02
    """Seconds to decode and score one sample."""
    machine: int = 8
    """GPUs of a machine."""

    def link(self, processes: int) -> float:
        """Return the speed of the slowest link of a ring of processes."""
        return self.inside if processes <= self.machine else self.between


@dataclass(frozen=True)
class Traffic:
    """Bytes that a process sends and receives."""

    gradients: int
    """Of the trained weights' gradients, float32."""
    weights: int
    """Of all weights of the trained network, in the type of its passes."""
    reductions: int
    """Reductions of gradients in a step: updates, or with sharded gradients micro-batches."""
    rollout: int
    """Passes of a step without gradient that draw samples, for all groups on one process."""
    references: int
    """The other passes of a step without gradient, likewise."""
    learning: int
    """The passes of a step with gradient, likewise."""
    shard: str

    def bytes(self, processes: int) -> float:
        """Return the bytes of a step in one direction, with the groups divided over processes."""
        ring = (processes - 1) / processes
        if self.shard == "none":
            return 2 * ring * self.gradients * self.reductions
        blocks = self.shard == "weights"  # these gather a block at a time, also in the backward pass
        passes = [self.rollout if blocks else 1, self.references, self.learning * (1 + blocks)]
        gathered = sum(math.ceil(count / processes) for count in passes)
        return ring * (self.weights * gathered + self.gradients * math.ceil(self.reductions / processes))


@dataclass(frozen=True)
class Step:
    """A step on a number of processes."""

    processes: int
    seconds: Mapping[str, float]
    bytes: float

    @property
    def total(self) -> float:
        return sum(self.seconds.values())


def plan(phases: Phases, traffic: Traffic, groups: int, hardware: Hardware, counts: Sequence[int]) -> list[Step]:
    """Return the predicted steps."""
    steps = []
    for count in counts:
        seconds = {name: fixed + each * groups / count for name, (fixed, each) in phases.items()}
        sent = traffic.bytes(count)
        steps.append(Step(count, {**seconds, "network": sent / hardware.link(count)}, sent))
    return steps


def fit(measured: Mapping[int, Mapping[str, float]]) -> Phases:
    """Return phases from the seconds of steps with two numbers of groups on one process: groups -> phase -> seconds."""
    (few, less), (many, more) = sorted(measured.items())
    slopes = {name: max(0.0, (more[name] - less[name]) / (many - few)) for name in more}
    return {name: (max(0.0, more[name] - slope * many), slope) for name, slope in slopes.items()}


def count_phases(found: Estimate, config: RunConfig, hardware: Hardware) -> Phases:
    """Return phases from the FLOPs of `difrl check`. The optimizer reads and writes its state once an update."""
    counts, forward, training, groups = found.evaluations, found.model.forward, found.model.training, config.groups
    states = 4 + len(config.snapshots)  # weights, gradients and two moments, and every snapshot
    update = 2 * 4 * found.model.trained * (config.train.updates_per_step * 4 + states - 4) / hardware.memory
    update += 4 * forward / hardware.flops  # the samples of the first-update check
    learning = counts.without_gradient * forward + counts.gradient * training
    return {
        "rollout": (0.0, counts.rollout * forward / hardware.flops / groups),
        "score": (0.0, hardware.score * config.samples_per_group),
        "update": (update, learning / hardware.flops / groups),
    }


def count_traffic(found: Estimate, config: RunConfig, shard: str, weights: int) -> Traffic:
    """Return the traffic of a recipe. weights: number of weights of the trained network."""
    counts, together = found.evaluations, max(1, found.model.dry.tally.together)
    learning = math.ceil(counts.gradient / together)
    return Traffic(
        gradients=4 * found.model.trained,
        weights=DTYPES[config.model.dtype].itemsize * weights,
        reductions=config.train.updates_per_step if shard == "none" else learning,
        rollout=math.ceil(counts.rollout / config.rollout.batch),
        references=math.ceil(counts.without_gradient / together),
        learning=learning,
        shard=shard,
    )


def describe(steps: Sequence[Step]) -> str:
    """Return a table of predicted steps."""
    names = list(steps[0].seconds)
    rows = []
    for step in steps:
        efficiency = steps[0].total * steps[0].processes / (step.total * step.processes)
        rows.append(
            [
                str(step.processes),
                *(f"{step.seconds[name]:.3g}" for name in names),
                f"{step.total:.3g}",
                f"{efficiency:.0%}",
                f"{step.bytes / 1e9:.3g}",
                max(names, key=step.seconds.__getitem__),
            ]
        )
    return markdown(["processes", *(f"{n}, s" for n in names), "step, s", "efficiency", "GB sent", "longest"], rows)


def measure(file: Path, config: RunConfig, groups: Sequence[int], steps: int, wall: bool) -> None:
    """Write the mean seconds of every phase for each number of groups. A first step warms up.

    Processor time, unless `wall`: it leaves out waiting, and a busy machine changes it less.
    """
    processes = DistributedContext()
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    trainers = {}
    for count in groups:
        data = config.data.model_copy(update={"prompts_per_step": count // config.branches})
        own = config.model_copy(update={"data": data})
        inputs = load_inputs(own, processes.count, processes.device)
        trainers[count] = Trainer(own, load_policy(own, processes.device), inputs.scorer, inputs.train, processes)
    rows: dict[int, list[Mapping[str, float]]] = {count: [] for count in groups}
    clock = SimpleNamespace(perf_counter=time.perf_counter if wall else time.process_time)
    with patch.object(step_metrics, "time", clock):
        for number in range(steps + 1):
            for count, trainer in trainers.items():
                times = {k[5:]: v for k, v in trainer.step(number).items() if k.startswith("time/")}
                slowest = processes.gather(torch.tensor(list(times.values())).to(processes.device))
                slowest = slowest.reshape(processes.count, -1).amax(dim=0)
                rows[count].append(dict(zip(times, slowest.tolist(), strict=True)))
    if processes.is_main:
        means = {count: {k: fmean(row[k] for row in own[1:]) for k in own[0]} for count, own in rows.items()}
        file.write_text(json.dumps(means), encoding="utf-8")


def launch(processes: int, file: Path, recipe: str, groups: Sequence[int], overrides: Sequence[str]) -> None:
    """Run `measure` on CPU processes."""
    several = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    numbers = ",".join(map(str, groups))
    command = [sys.executable, *several, "-m", "benchmarks.scaling", "measure", str(file), recipe, numbers, *overrides]
    subprocess.run(command, check=True, env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"})


def check(recipe: str, overrides: Sequence[str], pairs: int) -> str:
    """Return a table of predicted and measured processor seconds of a step of 12 groups, and the plan that follows."""
    config = read_config(recipe, overrides)
    ratios: dict[int, dict[str, list[float]]] = {count: {} for count in (1, 2, 3)}
    fitted = list[Phases]()
    with TemporaryDirectory() as folder:
        for pair in range(pairs):
            for count, own in ratios.items():
                file = Path(folder) / f"{pair}-{count}.json"
                launch(count, file, recipe, (12, 6) if count == 1 else (12,), overrides)
                measured = {int(groups): phases for groups, phases in json.loads(file.read_text()).items()}
                if count == 1:
                    fitted.append(fit(measured))
                found = measured[12]
                expected = {name: fixed + each * 12 / count for name, (fixed, each) in fitted[-1].items()}
                for name in expected:
                    own.setdefault(name, []).append(found[name] / expected[name])
                own.setdefault("step", []).append(sum(found.values()) / sum(expected.values()))
    rows = [
        [str(count), *(f"{median(own[n]):.2f} ({min(own[n]):.2f} to {max(own[n]):.2f})" for n in own)]
        for count, own in ratios.items()
    ]
    table = markdown(["processes", *next(iter(ratios.values()))], rows)
    phases = {n: (median(f[n][0] for f in fitted), median(f[n][1] for f in fitted)) for n in fitted[0]}
    found = estimate(config)
    traffic = count_traffic(found, config, "none", found.model.trained)
    slow = Hardware(inside=1.25e9, between=1.25e9)
    shown = markdown(
        ["phase", "seconds in any case", "seconds a group"],
        [[n, f"{a:.3g}", f"{b:.3g}"] for n, (a, b) in phases.items()],
    )
    return "\n\n".join([table, shown, describe(plan(phases, traffic, 64, slow, PROCESSES))])


def make_plan(config: RunConfig, hardware: Hardware, shard: str, phases: Path | None) -> str:
    """Return the plan of a recipe for every number of processes that divides its groups."""
    found = estimate(config)
    policy = load_policy(config, "meta")
    weights = sum(p.numel() for p in policy.module.parameters())
    measured = None if phases is None else json.loads(phases.read_text(encoding="utf-8"))
    own = count_phases(found, config, hardware)
    if measured is not None:
        own = fit({int(groups): times for groups, times in measured.items()})
    counts = [count for count in PROCESSES if not find_indivisible(config, count)]
    return describe(plan(own, count_traffic(found, config, shard, weights), config.groups, hardware, counts))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    checking, planning, measuring = (commands.add_parser(name) for name in ("check", "plan", "measure"))
    checking.add_argument("recipe", nargs="?", default="quickstart")
    checking.add_argument("--pairs", type=int, default=3)
    planning.add_argument("recipe")
    planning.add_argument("--phases", type=Path, help="file of `measure`")
    planning.add_argument("--published", choices=MODELS, help="a model of tests/published.yaml, without its weights")
    planning.add_argument("--shard", choices=("none", "gradients", "weights"), default="none")
    for name, value in asdict(Hardware()).items():
        planning.add_argument(f"--{name}", type=type(value), default=value)
    measuring.add_argument("file", type=Path)
    measuring.add_argument("recipe")
    measuring.add_argument("groups")
    measuring.add_argument("--wall", action="store_true", help="wall-clock time, for a GPU")
    measuring.add_argument("--steps", type=int, default=2)
    found, overrides = parser.parse_known_args(arguments)
    if found.command == "check":
        print(check(found.recipe, overrides, found.pairs))
        return
    if found.command == "measure":
        groups = [int(number) for number in found.groups.split(",")]
        measure(found.file, read_config(found.recipe, overrides), groups, found.steps, found.wall)
        return
    hardware = Hardware(**{name: getattr(found, name) for name in asdict(Hardware())})
    with TemporaryDirectory() as folder:
        if found.published:
            build_folder(found.published, Path(folder) / "model")
            overrides = [*overrides, f"model.path={folder}/model"]
        print(make_plan(read_config(found.recipe, overrides), hardware, found.shard, found.phases))


if __name__ == "__main__":
    main()
