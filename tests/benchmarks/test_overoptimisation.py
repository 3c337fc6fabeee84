"""The benchmark of over-optimisation without its runs: valid recipes, reading of runs, statistics and the page."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import overoptimisation as benchmark
from benchmarks.arenas import proxy_runs
from benchmarks.arenas.proxies import Labelled
from benchmarks.arenas.proxy_runs import ALL, PROXIES, RECIPE, STEPS, VARIANTS, Course, Proxies
from difrl.config import RunConfig
from difrl.config.load import read_config
from difrl.runtime.paths import recipes

FOLDER = Path("runs/proxies")


def config(name: str) -> RunConfig:
    variant = next(v for v in VARIANTS if v.name == name)
    return read_config(recipes()[RECIPE], proxy_runs.job(variant, FOLDER, seed=3).overrides)


def course(gold: list[float], first: list[float], others: list[float]) -> Course:
    """Build a course of two members."""
    zeros = np.zeros(len(gold))
    return Course(
        nfe=np.arange(len(gold)) * 1e3,
        gold=np.array(gold),
        stderr=zeros + 0.01,
        judge=zeros + 0.5,
        members=np.array([first, others]).T,
        disagreement=zeros + 0.25,
        divergence=zeros + 0.04,
        minutes=2.0,
    )


def test_variants_differ_only_in_reward_anchor_and_references() -> None:
    plain = config("plain")
    for variant in VARIANTS:
        found = config(variant.name)
        assert found.seed == 3
        same = {"rewards": plain.rewards, "anchors": plain.anchors, "references": plain.references}
        assert found.model_copy(update=same) == plain
        assert [anchor.coefficient for anchor in found.anchors] == [variant.anchor]
        if variant.of == "gold":
            continue
        assert [member.options["path"] for member in found.rewards[0].members] == [
            f"runs/proxies/{number}" for number in range(PROXIES.members if variant.of == "all" else 1)
        ]


def test_only_the_gold_variant_optimises_gold() -> None:
    for variant in VARIANTS:
        found = config(variant.name)
        assert (found.rewards[0].name == "geneval") == (variant.of == "gold")
        assert [reward.label for reward in found.rewards] == ["proxy"]
        gold, judge, every = found.watch
        assert (gold.name, gold.options, judge.options) == ("geneval", {"exact": True}, {})
        assert [member.label for member in every.members] == [f"m{number}" for number in range(PROXIES.members)]


def test_kinds_of_variants() -> None:
    assert {v.name: config(v.name).rewards[0].combine for v in VARIANTS if v.of == "all"} == {
        "mean": "mean",
        "worst": "worst",
        "uncertainty": "uncertainty",
    }
    assert {v.name for v in VARIANTS if config(v.name).rewards[0].shape is not None} == {"par"}
    assert {v.name for v in VARIANTS if config(v.name).references is not None} == {"par"}
    assert {v.name for v in VARIANTS if v.anchor > 0} == {"anchored"}


def test_other_proxies_are_in_another_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Records of runs against one ensemble must not be used for runs against another."""
    folders = {Proxies(FOLDER, FOLDER / "x.json", seed).folder for seed in (0, 1)}
    monkeypatch.setattr(proxy_runs, "PROXIES", replace(PROXIES, flipped=PROXIES.flipped / 2))
    folders.add(Proxies(FOLDER, FOLDER / "x.json", 0).folder)
    assert len(folders) == 3
    assert all(folder.parent == FOLDER for folder in folders)


def test_known_proxies_are_not_fitted_where_no_run_needs_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    proxies = Proxies(tmp_path / "runs", tmp_path / "records" / "proxies-0.json", 0)
    fitted = [{"auc": 0.7}]
    drawings = [
        Labelled(torch.zeros(2, 3, 32, 32), ["a circle"] * 2, torch.tensor(gold)) for gold in ([1.0, 0.0], [0.0] * 2)
    ]
    monkeypatch.setattr(proxy_runs, "load_drawings", lambda folder: drawings)
    monkeypatch.setattr(proxy_runs, "fit_ensemble", lambda *of: fitted)
    assert proxies.quality(needed=False) == fitted
    monkeypatch.setattr(proxy_runs, "fit_ensemble", lambda *of: [{"auc": 0.0}])
    assert proxies.quality(needed=False) == fitted
    assert proxies.quality(needed=True) == [{"auc": 0.0}]
    assert proxies.gold == 0.25


def test_a_run_is_read(tmp_path: Path) -> None:
    """Two evaluations, a step between them that was not evaluated; member k scores k + 1 at the end, their variance is 0.5."""
    names = [f"eval/watch/{ALL}/m{number}" for number in range(PROXIES.members)]
    mean = np.mean([number + 1 for number in range(PROXIES.members)])
    rows: list[dict[str, float]] = [
        {"step": 0, "nfe": 0, "eval/watch/gold": 0.4, "eval/watch/gold/stderr": 0.03, "eval/watch/judge": 0.5}
        | {f"eval/watch/{ALL}": -0.1}
        | dict.fromkeys(names, 0.0),
        {"step": 1, "nfe": 100, "kl/base": 7.0, "time/rollout": 60.0, "time/update": 30.0},
        {"step": 2, "nfe": 200, "kl/base": 0.3, "time/rollout": 30.0, "eval/watch/gold": 0.6}
        | {"eval/watch/gold/stderr": 0.02, "eval/watch/judge": 0.7, f"eval/watch/{ALL}": float(mean) - 0.5}
        | {name: number + 1.0 for number, name in enumerate(names)},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = Course.of_run(tmp_path)
    assert found.nfe.tolist() == [0, 200]
    assert found.gold.tolist() == [0.4, 0.6]
    assert found.stderr.tolist() == [0.03, 0.02]
    assert found.judge.tolist() == [0.5, 0.7]
    assert found.divergence.tolist() == [0, 0.3]
    assert found.disagreement.tolist() == pytest.approx([0.1, 0.5])
    assert found.members[1].tolist() == [number + 1 for number in range(PROXIES.members)]
    assert found.minutes == 2


def test_a_seed_does_not_choose_its_own_peak() -> None:
    """The mean of the other seeds decides, so that the luck of a seed at one evaluation does not count."""
    golds = ([0.4, 0.9, 0.5, 0.4], [0.4, 0.5, 0.7, 0.4], [0.4, 0.5, 0.6, 0.4])
    courses = [course(gold, [0] * 4, [0] * 4) for gold in golds]
    assert benchmark.peak_indices(courses) == [2, 1, 1]
    assert benchmark.peak_indices(courses[:1]) == [1]  # there are no other seeds


def test_a_change_is_clear_beyond_twice_its_error() -> None:
    """The mean of two seeds with errors of 0.03 and 0.04 has an error of √(9 + 16)/2 = 2.5 hundredths."""
    assert benchmark.change([0.05, 0.04], [0.03, 0.04]) == "+0.045 ± 0.025"
    assert benchmark.change([0.05, 0.06], [0.03, 0.04]) == "**+0.055 ± 0.025**"
    assert benchmark.change([-0.1], [0.04]) == "**-0.100 ± 0.040**"


def test_what_a_variant_optimises() -> None:
    found = course([0.4, 0.5], [0.0, 1.0], [0.0, 3.0])
    proxy = {variant.name: variant.proxy(found).tolist() for variant in VARIANTS}
    assert proxy["plain"] == proxy["par"] == proxy["anchored"] == [0, 1]
    assert proxy["mean"] == proxy["worst"] == proxy["uncertainty"] == proxy["gold"] == [0, 2]


def test_the_page_shows_gains_and_losses(tmp_path: Path) -> None:
    found = [
        course([0.4, 0.6, 0.7, 0.5], [0.0, 1.0, 1.5, 2.0], [0.0] * 4),
        course([0.4, 0.7, 0.6, 0.3], [0.0, 2.0, 2.5, 3.0], [0.0] * 4),
    ]
    runs = {variant.name: found for variant in VARIANTS}
    quality = [[{"auc": 0.7, "auc_of_a_prompt": 0.65, "accuracy": 0.6}] * (PROXIES.members + 1)]
    page = benchmark.text(runs, quality, 0.4, [0, 1])
    rows = {line.split(" | ")[0].removeprefix("| "): line.split(" | ")[1:] for line in page.splitlines() if "|" in line}
    # Each seed is read at the best evaluation of the other, where both have 0.6. Errors: 0.01/√2 a level, 0.01 a difference.
    assert rows["one proxy, plain"] == [
        "+2.50 (+2.00 to +3.00)",
        "0.600 (0.600 to 0.600)",
        f"{STEPS // 3} or {2 * STEPS // 3}",
        "0.400 (0.300 to 0.500)",
        "**+0.200 ± 0.007**",
        "**-0.200 ± 0.010**",
        "0.500 (0.500 to 0.500)",
        "0.500 (0.500 to 0.500)",
        "0.25 (0.25 to 0.25)",
        "0.04 (0.04 to 0.04) |",
    ]
    assert rows["ensemble, mean"][0].startswith("+1.25")
    assert rows["mean of the ensemble"] == ["0.700", "0.650", "0.600 |"]
    benchmark.plot(runs, 0.4, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000
