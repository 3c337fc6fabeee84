"""Runs of benchmarks/overoptimisation.py: the proxies of a seed, the variants of training, and the measurements of a run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch

from benchmarks.arenas.proxies import Labelled, ProxyConfig, draw, fit_ensemble
from benchmarks.common import Job
from difrl.data.prompts import load_prompts
from difrl.inference.loaded_run import open_run
from difrl.reporting.metrics_file import read_metrics

RECIPE = "nft"
PROXIES = ProxyConfig(flipped=0.1)
LEARNT, HELD_OUT = 7, 3
"""Number of drawings of each training prompt on which the proxies are fitted, and on which they are tested."""
STEPS, EVALUATIONS = 54, 9
REFERENCES = 3
"""Number of samples of each prompt by the pretrained model with which PAR compares; published: at most 5."""
SETTINGS = (
    f"train.steps={STEPS}",
    f"eval.every={STEPS // EVALUATIONS}",
    "likelihood.decisions=2",
    "data.evaluation=shapes:train",
    "eval.images=256",
    "eval.final_images=256",
    "eval.rlg=[]",
    "eval.show=0",
    "checkpoint.every=6",
)
"""Overrides of every run. Evaluations use the training prompts, to which the proxy was fitted: on others it might fail for
another reason."""
ALL = "all"
Section = Mapping[str, Any]


@dataclass(frozen=True)
class Variant:
    """One way of training against proxies."""

    name: str
    title: str
    reward: Section
    """Further keys of the reward."""
    of: Literal["first", "all", "gold"] = "first"
    """The optimised reward: the first member, all of them, or the gold reward itself."""
    anchor: float = 0.0
    """Coefficient of the divergence from the pretrained model."""

    def overrides(self, members: Sequence[Section]) -> tuple[str, ...]:
        """Return overrides of the recipe."""
        every = {"ensemble": list(members)}
        gold = {"name": "geneval", "label": "gold", "options": {"exact": True}}
        trained = {"first": members[0], "all": every, "gold": gold}[self.of]
        sections: dict[str, Any] = {
            "rewards": [{**trained, **self.reward, "label": "proxy"}],
            "watch": [gold, {"name": "judge"}, {**every, "combine": "uncertainty", "penalty": 1.0, "label": ALL}],
            "anchors": [{"to": "base", "divergence": "velocity", "coefficient": self.anchor}],
        }
        if "shape" in self.reward:
            sections["references"] = {"count": REFERENCES}
        return tuple(f"{key}={json.dumps(value)}" for key, value in sections.items())

    def proxy(self, course: Course) -> np.ndarray:
        """Return the optimised score of the members, unshaped and without pessimism; for gold, the mean of all."""
        return course.members[:, 0] if self.of == "first" else course.members.mean(1)


VARIANTS = (
    Variant("plain", "one proxy, plain", {}),
    Variant("anchored", "one proxy, anchored (KL)", {}, anchor=0.3),
    Variant("par", "one proxy, shaped (PAR)", {"shape": {"kind": "par"}}),
    Variant("mean", "ensemble, mean", {"combine": "mean"}, of="all"),
    Variant("worst", "ensemble, worst (WCO)", {"combine": "worst"}, of="all"),
    Variant("uncertainty", "ensemble, uncertainty (UWO)", {"combine": "uncertainty", "penalty": 1.0}, of="all"),
    Variant("gold", "gold itself", {}, of="gold"),
)


@dataclass(frozen=True)
class Course:
    """Evaluations of one run; every array [evaluations], members [evaluations, K]."""

    nfe: np.ndarray
    gold: np.ndarray
    stderr: np.ndarray
    judge: np.ndarray
    members: np.ndarray
    """Mean score by each proxy."""
    disagreement: np.ndarray
    """Variance over the proxies of the score of a drawing, mean over drawings."""
    divergence: np.ndarray
    """Divergence from the pretrained model, on the samples of the step before the evaluation."""
    minutes: float
    """Minutes of training."""

    @classmethod
    def of_run(cls, run: Path) -> Self:
        rows = read_metrics(run)
        seconds = sum(v for row in rows for k, v in row.items() if k.startswith("time/"))
        found = [row for row in rows if "eval/watch/gold" in row]

        def column(name: str) -> np.ndarray:
            return np.array([row.get(name, 0.0) for row in found])

        names = [f"eval/watch/{ALL}/{member_label(k)}" for k in range(PROXIES.members)]
        members = np.stack([column(name) for name in names], axis=1)
        return cls(
            nfe=column("nfe"),
            gold=column("eval/watch/gold"),
            stderr=column("eval/watch/gold/stderr"),
            judge=column("eval/watch/judge"),
            members=members,
            disagreement=members.mean(1) - column(f"eval/watch/{ALL}"),
            divergence=column("kl/base"),
            minutes=seconds / 60,
        )


def member_label(number: int) -> str:
    """Return the name of a proxy in metrics."""
    return f"m{number}"


def member(folder: Path, number: int) -> Section:
    """Return the section of a proxy in a recipe."""
    options = {"path": (folder / str(number)).as_posix(), "output": "logit"}
    return {"name": "judge", "label": member_label(number), "options": options}


def job(variant: Variant, proxies: Path, seed: int) -> Job:
    """Return the run of a variant."""
    members = [member(proxies, number) for number in range(PROXIES.members)]
    return Job(RECIPE, f"{variant.name}-{seed}", (f"seed={seed}", *SETTINGS, *variant.overrides(members)))


@dataclass(frozen=True)
class Proxies:
    """The ensemble of a seed: the folder of its networks, and the record of their quality."""

    runs: Path
    record: Path
    seed: int

    @property
    def made_with(self) -> Section:
        """Settings that determine the networks."""
        return {**asdict(PROXIES), "learnt": LEARNT, "held_out": HELD_OUT, "seed": self.seed}

    @property
    def folder(self) -> Path:
        """Folder of the networks. Its name depends on the settings, and so do the settings of runs against them."""
        fingerprint = hashlib.sha256(json.dumps(self.made_with, sort_keys=True).encode()).hexdigest()[:8]
        return self.runs / f"proxies-{self.seed}-{fingerprint}"

    def quality(self, needed: bool) -> Sequence[Mapping[str, float]]:
        """Return the quality of each member and of their mean. Fit missing networks if they are needed or have no record."""
        known = json.loads(self.record.read_text()) if self.record.exists() else {}
        there = (self.folder / str(PROXIES.members - 1)).exists()
        if known.get("made_with") == self.made_with and (there or not needed):
            return known["quality"]
        torch.set_num_threads(1)
        learnt, held_out = load_drawings(self.runs)
        found = fit_ensemble(self.folder, learnt, held_out, PROXIES, self.seed)
        gold = torch.cat([learnt.gold, held_out.gold]).mean().item()
        self.record.parent.mkdir(parents=True, exist_ok=True)
        known = {"made_with": self.made_with, "gold": gold, "quality": found}
        self.record.write_text(json.dumps(known, indent=1) + "\n")
        return found

    @property
    def gold(self) -> float:
        """Share of right drawings among all labelled ones, from the record."""
        return float(json.loads(self.record.read_text())["gold"])


def load_drawings(folder: Path) -> tuple[Labelled, Labelled]:
    """Return the drawings on which proxies are fitted and tested: by the pretrained model, of training prompts, made once."""
    file = folder / f"drawings-{LEARNT}-{HELD_OUT}.pt"
    prompts = load_prompts("shapes:train")
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        drawings = draw(open_run("tiny-sd3", device="cpu", steps=10), prompts, LEARNT + HELD_OUT, seed=0)
        torch.save((drawings.images, drawings.gold), file)
    images, gold = torch.load(file, weights_only=True)
    every = Labelled(images, [p.text for p in prompts] * (LEARNT + HELD_OUT), gold)
    rows = torch.arange(len(every))
    return every.select(rows[: LEARNT * len(prompts)]), every.select(rows[LEARNT * len(prompts) :])
