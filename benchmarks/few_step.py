"""A model that was distilled to four steps, fine-tuned by AWM at the times that it knows and at others.

    python benchmarks/few_step.py --seeds 0 1          half an hour on one CPU thread; page into docs/benchmarks/

1. tiny-sd3 under classifier-free guidance is distilled into a model that draws in four steps without it: at each of the four
   times the student learns the whole step that the teacher's ODE takes in several (as in progressive distillation,
   arXiv:2202.00512, at once and without a teacher that halves its steps).
2. AWM trains the student with decisions at the times of its own steps, at all times, and on samples of more steps. Everything
   else is equal, and every evaluation draws in four steps. Runs are resumable, and a run with a record is not repeated.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from common import Bench, Job, markdown, spread
from torch import Tensor

import rewards
from difrl.config.load import read_config
from difrl.data.prompts import Prompt, load_prompts
from difrl.inference.loaded_run import open_run
from difrl.policies.diffusion.load import load_diffusion_policy
from difrl.pretraining.stages import Stage, StageConfig
from difrl.reporting.metrics_file import read_metrics
from difrl.runtime.paths import recipes
from samplers import Condition, Grid, Window, keyed, ode, rollout

STEPS, FINE = 4, 4
"""Steps of the student; steps of the teacher in each of them."""
GUIDANCE = 2.0
PER_PROMPT = 4
"""Paths of the teacher for each training prompt."""
STAGE = StageConfig(steps=300, batch=64, lr=5e-4, final_lr=0.1, ema=0.99, checkpoint_every=100)
BASE: Mapping[str, Any] = {
    "rollout.steps": STEPS,
    "eval.steps": STEPS,
    "likelihood.times": {"kind": "grid"},
    "likelihood.decisions": 2,
    "data.prompts_per_step": 8,
    "data.group_size": 8,
    "train.steps": 36,
    "eval.every": 12,
    "eval.images": 256,
    "eval.final_images": 256,
    "eval.rlg": [],
    "eval.show": 0,
    "checkpoint.every": 12,
    "snapshots": {"ema": {"decay": 0.9}},
    "anchors": [
        {"to": "ema", "divergence": "velocity", "coefficient": 1.0},
        {"to": "base", "divergence": "velocity", "coefficient": 0.05},
    ],
    "watch": [{"name": "judge"}, {"name": "sharpness"}],
    "guard": {"action": "warn"},
}
"""Overrides of every run."""


@dataclass(frozen=True)
class Variant:
    """One choice of times."""

    name: str
    title: str
    overrides: Mapping[str, Any]


GOOD_ONLY = {"advantage.negative": 0.0}
VARIANTS = (
    Variant("later", "4 steps, times of their own", {}),
    Variant("uniform", "4 steps, all times", {"likelihood.times": {"kind": "uniform"}}),
    Variant("many", "16 steps, times of their own", {"rollout.steps": 16}),
    Variant("positive", "4 steps, times of their own, better samples only", GOOD_ONLY),
)


@dataclass(frozen=True)
class Course:
    """Evaluations of one run; every array [evaluations]."""

    nfe: np.ndarray
    reward: np.ndarray
    stderr: np.ndarray
    judge: np.ndarray
    sharpness: np.ndarray
    diversity: np.ndarray
    fallen: np.ndarray
    """Measures that the guard has found fallen."""

    @classmethod
    def of_run(cls, run: Path) -> Self:
        rows = [row for row in read_metrics(run) if "eval/reward/geneval" in row]
        names = {
            "nfe": "nfe",
            "reward": "eval/reward/geneval",
            "stderr": "eval/reward/geneval/stderr",
            "judge": "eval/watch/judge",
            "sharpness": "eval/watch/sharpness",
            "diversity": "eval/diversity/pixels",
            "fallen": "guard/fallen",
        }
        return cls(**{field: np.array([row[name] for row in rows]) for field, name in names.items()})


@torch.no_grad()
def draw_paths(prompts: Sequence[Prompt]) -> Tensor:
    """Return the teacher's states [N, STEPS + 1, ...] at the ends of the student's steps."""
    policy = load_diffusion_policy(read_config(recipes()["awm"]))
    grid = Grid(torch.linspace(1, 0, STEPS * FINE + 1, dtype=torch.float64))
    denoiser = policy.denoiser(guidance=GUIDANCE)

    def draw(rows: Tensor) -> Tensor:
        x_init = keyed(policy.sampling.shape, seed=0, step=0, samples=rows, use="distil")
        condition = policy.prompts([prompts[i] for i in rows.tolist()], True)
        states = [x_init]
        window, on_step = Window(0, 0), lambda step, x: states.append(x) if (step + 1) % FINE == 0 else None
        rollout(
            denoiser,
            policy.process,
            grid,
            ode,
            x_init,
            condition,
            window=window,
            noise=lambda step: x_init,
            on_step=on_step,
        )
        return torch.stack(states, 1)

    return torch.cat([draw(rows) for rows in torch.arange(len(prompts)).split(111)])


def distil(folder: Path, work: Path) -> None:
    """Distil tiny-sd3 and write the pipeline of the student."""
    work.mkdir(parents=True, exist_ok=True)
    file = work / f"paths-{STEPS}-{FINE}-{GUIDANCE:g}-{PER_PROMPT}.pt"
    prompts = list(load_prompts("shapes:train")) * PER_PROMPT
    if not file.exists():
        torch.save(draw_paths(prompts), file)
    paths = torch.load(file, weights_only=True)
    policy = load_diffusion_policy(read_config(recipes()["awm"]))
    times = torch.linspace(1, 0, STEPS + 1)
    condition: Condition = policy.prompts(prompts, False)

    def compute_loss(step: int) -> Tensor:
        generator = torch.Generator().manual_seed(step)
        rows = torch.randint(len(paths), (STAGE.batch,), generator=generator)
        at = torch.randint(STEPS, (STAGE.batch,), generator=generator)
        x_t, x_next = paths[rows, at], paths[rows, at + 1]
        output = policy.denoiser()(x_t, times[at].double(), condition.select(rows))
        return F.mse_loss(output, (x_t - x_next) * STEPS)

    Stage("student", STAGE, [policy.module], work).run(compute_loss)
    # The scheduler's last time before 0 is that of the last step, so its four times are 1, 3/4, 1/2 and 1/4.
    policy.family.pipeline.scheduler.register_to_config(shift_terminal=1 / STEPS)
    policy.save(folder)


def measure(path: str, steps: int, guidance: float, count: int) -> dict[str, float]:
    """Return the mean rewards of drawings for evaluation prompts."""
    prompts = load_prompts("shapes:eval")
    drawn = open_run(path, device="cpu", steps=steps, guidance=guidance).sample(
        [prompts[i % len(prompts)] for i in range(count)]
    )
    judge = {"path": str(Path(rewards.__file__).parents[1] / "difrl" / "assets" / "judge")}
    found = {}
    for name, options in (("geneval", {"exact": True}), ("judge", judge), ("sharpness", {})):
        scores = rewards.score(rewards.make(name, **options), drawn.content, drawn.prompt_texts, drawn.metadata)
        found[name] = scores.values[scores.valid].mean().item()
    return found


PLAIN = (
    ("teacher", STEPS * FINE, GUIDANCE),
    ("teacher", STEPS, GUIDANCE),
    ("student", STEPS, 1.0),
    ("student", STEPS * FINE, 1.0),
    ("student", STEPS, GUIDANCE),
)
"""Models before fine-tuning, with their steps and guidance."""


def overrides(variant: Variant, model: Path, seed: int) -> tuple[str, ...]:
    """Return the overrides of a run."""
    settings = {**BASE, **variant.overrides, "model.path": model.as_posix(), "seed": seed}
    return tuple(f"{key}={json.dumps(value)}" for key, value in settings.items())


def before_table(found: Sequence[Mapping[str, float]]) -> str:
    """Return a table of the models before fine-tuning."""
    rows = [
        (model, f"{steps}", f"{guidance:g}", *(f"{one[name]:.3f}" for name in ("geneval", "judge", "sharpness")))
        for (model, steps, guidance), one in zip(PLAIN, found, strict=True)
    ]
    return markdown(("model", "steps", "guidance", "reward", "judge", "sharpness"), rows)


def after_table(courses: Mapping[str, Sequence[Course]]) -> str:
    """Return a table of the runs, before → after; mean and range over seeds."""
    rows = []
    for variant in VARIANTS:
        runs = courses[variant.name]
        columns = [
            f"{np.mean([getattr(c, name)[0] for c in runs]):.3f} → {spread([getattr(c, name)[-1] for c in runs])}"
            for name in ("reward", "judge", "sharpness", "diversity")
        ]
        rows.append((variant.title, *columns, spread([float(c.fallen.sum()) for c in runs], "{:.0f}")))
    return markdown(("rollouts, decisions", "reward", "judge", "sharpness", "diversity", "falls"), rows)


def text(before: Sequence[Mapping[str, float]], courses: Mapping[str, Sequence[Course]], seeds: Sequence[int]) -> str:
    """Return docs/benchmarks/few_step.md."""
    lines = (
        "# A model of four steps, fine-tuned at its own times and at others",
        f"`python benchmarks/few_step.py --seeds {' '.join(map(str, seeds))}` writes this page. tiny-sd3 under guidance "
        f"{GUIDANCE:g} is the teacher. The student is the same network, trained on {PER_PROMPT} paths of the teacher for each "
        f"training prompt, {STAGE.steps} steps of {STAGE.batch} states: at each of its {STEPS} times it predicts the mean "
        f"velocity of the {FINE} steps that the teacher takes from there. Its scheduler has the times 1, 3/4, 1/2 and 1/4.",
        "## Before fine-tuning",
        "256 drawings for evaluation prompts. Reward: GenEval's rules, and nothing but the requested objects in the image. "
        "Judge: a network trained on correct drawings. Sharpness: 1 − the blur effect (`rewards/sharpness.py`); the standard "
        "error of a reward is 0.03.",
        before_table(before),
        "## Fine-tuning",
        f"AWM, {BASE['train.steps']} steps of {BASE['data.prompts_per_step']} prompts × {BASE['data.group_size']} samples with "
        f"{BASE['likelihood.decisions']} decisions each, anchored to its moving average and to the student as it was "
        "(coefficient 0.05) at the same decisions. The rows differ in the steps of the rollouts and in the times of the "
        "decisions only. Times of their own are those of AWM's preset (`fraction: 0.9`): 3/4 and 1/2 for four steps. "
        "*Better samples only*: samples below the mean of their group have weight 0 (`advantage.negative: 0`). "
        "Every evaluation draws 256 images in four steps. Values are before → after, means over seeds with the lowest and "
        "highest in brackets. Falls: how often the guard found judge, sharpness or diversity fallen.",
        after_table(courses),
    )
    return "\n\n".join(lines) + "\n"


def main() -> None:
    """Distil, train, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--runs", type=Path, default=Path("runs/benchmark-few-step"))
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = options.runs / "student"
    jobs = {
        (variant.name, seed): Job("awm", f"{variant.name}-{seed}", overrides(variant, model, seed))
        for seed in options.seeds
        for variant in VARIANTS
    }
    records = options.out / "records" / "few_step"
    bench = Bench(options.runs, records, Course)
    plain = records / "before.json"
    if not (model / "model_index.json").exists() and not (plain.exists() and all(map(bench.known, jobs.values()))):
        distil(model, options.runs)
    if not plain.exists():
        places = {"teacher": "tiny-sd3", "student": str(model)}
        found = [measure(places[name], steps, guidance, 256) for name, steps, guidance in PLAIN]
        records.mkdir(parents=True, exist_ok=True)
        plain.write_text(json.dumps(found, indent=1) + "\n")
    found = bench.curves(list(jobs.values()), options.jobs)
    courses: dict[str, list[Course]] = {}
    for (name, _), course in zip(jobs, found, strict=True):
        courses.setdefault(name, []).append(course)
    written = text(json.loads(plain.read_text()), courses, options.seeds)
    (options.out / "few_step.md").write_text(written, encoding="utf-8")
    print(written)


if __name__ == "__main__":
    main()
