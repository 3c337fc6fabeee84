"""`torchrun -m tests.sharded_run OUT CASE…`: runs of a few steps with whole and with sharded weights, on the same processes.

OUT.json has for each case and layout the metrics of the steps and evaluations, and how far weights and snapshots are from
those of the whole layout. A case of `FAILURES` has the error that each process raised.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from accelerate.utils import gather_object

from difrl.config import RunConfig
from difrl.policies.base import GuidanceSettings
from difrl.policies.load import load_policy
from difrl.runtime.distributed import DistributedContext
from difrl.training.evaluation import Evaluator
from difrl.training.first_update import FirstUpdateCheck
from difrl.training.inputs import load_inputs
from difrl.training.trainer import Trainer
from tests.fakes import Brightness
from tests.recipes import AWM, FLOW_GRPO, recipe, text_recipe
from tests.tiny_pipelines import tiny_wan22

STEPS = 2
ANCHORED = {
    "snapshots": {"ema": {"decay": 0.5}},
    "anchors": [{"to": "ema", "coefficient": 0.5}, {"to": "base", "coefficient": 0.1}],
}
SMOOTH = {"rewards": [{"import": "tests.fakes:Brightness"}]}
LORA = {"train": "lora", "lora": {"rank": 5}}
"""A rank that two processes cannot share evenly."""
IMAGES: Mapping[str, Mapping[str, Any]] = {
    "full": {**AWM, **ANCHORED, **SMOOTH},
    "lora": {**AWM, **ANCHORED, **SMOOTH, "model": {**LORA, "gradient_checkpointing": True}},
    "bfloat16": {**AWM, **ANCHORED, **SMOOTH, "model": {**LORA, "dtype": "bfloat16"}},
    "redraw": {**FLOW_GRPO, **SMOOTH, "collect": {"max_draws": 3}, "snapshots": {"old": {"decay": 0.5}}},
    "sampler": {**FLOW_GRPO, **SMOOTH, "collect": {"max_draws": 2}, "snapshots": {"slow": {"decay": 0.5}}},
    "unet": {**AWM, **ANCHORED, **SMOOTH, "model": LORA},
    "experts": {
        **AWM, **ANCHORED, **SMOOTH, "model": LORA, "rollout": {"frames": 5, "height": 16, "width": 16, "steps": 4, "batch": 5},
    },
}  # fmt: skip
TEXTS: Mapping[str, Mapping[str, Any]] = {
    "text": {
        "snapshots": {"old": {"decay": 0.5}},
        "anchors": [
            {"to": "base", "divergence": "reverse_kl", "coefficient": 0.1},
            {"to": "old", "divergence": "reverse_kl", "coefficient": 0.1},
        ],
    },
    "text_lora": {"model": LORA},
    "teacher": {
        "teachers": {"teacher": {"path": "tiny-lm"}},
        "model": LORA,
        "anchors": [{"to": "teacher", "divergence": "reverse_kl", "coefficient": 0.5}],
    },
}
FAILURES = ("first_update", "reward", "crash")


def config_of(case: str, shard: str, folder: Path) -> RunConfig:
    """Return the recipe of a case. Its prompts divide by two and by three processes."""
    own = IMAGES.get(case) or TEXTS.get(case) or IMAGES["lora"]
    model = {"unet": "tiny-sd", "experts": str(folder / "wan"), **dict.fromkeys(TEXTS, "tiny-lm")}.get(case, "tiny-sd3")
    prompts = str(folder / "prompts.txt")
    sections = {
        **own,
        "data": {"train": prompts, "evaluation": prompts, "prompts_per_step": 6, "group_size": 2},
        "model": {**own.get("model", {}), "shard": shard},
    }
    if case == "sampler":
        sections["rollout"] = {**sections["rollout"], "snapshot": "slow", "steps": 4, "batch": 5}
    return (text_recipe if case in TEXTS else recipe)(model, folder / "run", **sections)


def build(config: RunConfig, processes: DistributedContext) -> tuple[Trainer, Evaluator]:
    inputs = load_inputs(config, processes.count, processes.device)
    policy = load_policy(config, processes.device, keep_base=True)
    trainer = Trainer(config, policy, inputs.scorer, inputs.train, processes)
    evaluator = Evaluator(policy, inputs.scorer, inputs.evaluation, processes, config.seed, inputs.diversity)
    return trainer, evaluator


def run(
    case: str, shard: str, folder: Path, processes: DistributedContext
) -> tuple[list[Any], dict[str, torch.Tensor]]:
    """Return the metrics of steps and evaluations, and the whole weights and snapshots afterwards."""
    trainer, evaluator = build(config_of(case, shard, folder), processes)
    rows = [trainer.step(step) for step in range(STEPS)]
    rows += [evaluator(6, guidance) for guidance in (GuidanceSettings(), GuidanceSettings(1.5, measure=True))]
    snapshots = trainer.policy.snapshots
    layout = snapshots.layout
    own = {name: layout.local(p.detach()) for name, p in layout.parameters.items()}
    sets = {"current": own, **{name: copy.tensors for name, copy in snapshots.copies.items()}}
    whole = {f"{name}/{key}": layout.whole(key, part) for name, parts in sets.items() for key, part in parts.items()}
    return rows, {name: tensor.clone() for name, tensor in whole.items()}


def fail(case: str, shard: str, folder: Path, processes: DistributedContext) -> list[str]:
    """Let process 1 fail in a step. Return the error of every process."""
    trainer, _ = build(config_of(case, shard, folder), processes)
    prepare = FirstUpdateCheck.prepare

    def wrong(*args: Any) -> FirstUpdateCheck:
        check = prepare(*args)
        if case == "crash" and processes.rank == 1:
            print("process 1 leaves", flush=True)
            raise SystemExit(3)  # which no process agrees on: the others are in a pass already
        return check if processes.rank != 1 else FirstUpdateCheck(**{**vars(check), "recorded": check.recorded + 1})

    if case == "reward" and processes.rank == 1:
        mock.patch.object(Brightness, "__call__", side_effect=ValueError("broken")).start()
    with mock.patch.object(FirstUpdateCheck, "prepare", prepare if case == "reward" else wrong):
        try:
            trainer.step(0)
        except Exception as error:
            found = f"{type(error).__name__}: {error}"
        else:
            found = "none"
    mock.patch.stopall()
    return list(gather_object([found]))


def main(out: Path, cases: list[str]) -> None:
    torch.set_num_threads(1)
    processes = DistributedContext()
    if processes.is_main:
        (out.parent / "prompts.txt").write_text("".join(f"a red circle and {n} squares\n" for n in range(6)))
        if "experts" in cases:
            tiny_wan22(out.parent / "wan")
    processes.wait()
    found: dict[str, Any] = {"count": processes.count}
    for case in cases:
        if case in FAILURES:
            found[case] = fail(case, "weights", out.parent, processes)
            continue
        rows, whole = run(case, "none", out.parent, processes)
        found[case] = {"none": {"rows": rows}}
        for shard in ("weights", "gradients"):
            rows, tensors = run(case, shard, out.parent, processes)
            assert tensors.keys() == whole.keys()
            apart = {name: float((tensors[name] - tensor).abs().max()) for name, tensor in whole.items()}
            found[case][shard] = {"rows": rows, "apart": max(apart.values())}
    if processes.is_main:
        out.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
    os._exit(0)  # the processes of gloo wait for each other at the end of an interpreter
