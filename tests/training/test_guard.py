"""The guard: its verdicts by hand, and a run whose reward is hacked, uninterrupted and interrupted."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from difrl import open_run
from difrl.config import GuardConfig, RunConfig
from difrl.config.load import read_config
from difrl.config.yaml_source import ConfigError
from difrl.data.prompts import load_prompts
from difrl.policies.diffusion.load import load_diffusion_policy
from difrl.reporting.metrics_file import MetricsFile, read_metrics
from difrl.reporting.terminal import RunSummary, SilentDisplay
from difrl.runtime.distributed import DistributedContext
from difrl.scoring import Scorer
from difrl.scoring.diversity import Diversity
from difrl.training import checkpoint
from difrl.training import run as running
from difrl.training.checkpoint import CheckpointError
from difrl.training.evaluation import Evaluator
from difrl.training.guard import Guard, MetricsRow, compute_verdict
from difrl.training.trainer import Trainer
from tests.fakes import in_threads
from tests.recipes import load_training_prompts, recipe
from tests.training.test_run import Killed, dies

ERROR = 0.01


def evaluation(step: int, reward: float, judged: float, spread: float = 0.5) -> dict[str, float]:
    """Return an evaluation with standard errors of 0.01: two differ clearly from 2 · 0.01 · √2 = 0.0283 on."""
    values = {"eval/reward/mean": reward, "eval/watch/judge": judged, "eval/diversity/pixels": spread}
    return {"step": step, **values, **{f"{key}/stderr": ERROR for key in values}}


def rows(*values: tuple[float, ...]) -> list[MetricsRow]:
    return [evaluation(10 * n, *one) for n, one in enumerate(values)]


DEFAULTS = GuardConfig()


@pytest.mark.parametrize(
    ("now", "fallen"),
    [
        ((0.60, 0.67), ["eval/watch/judge"]),  # 0.03 down, 0.1 up
        ((0.60, 0.68), []),  # 0.02 down is not clear
        ((0.52, 0.60), []),  # 0.02 up is not clear
        ((0.40, 0.60), []),  # both fell: that is not hacking
        ((0.60, 0.70, 0.38), []),  # 24 % of the diversity
        ((0.60, 0.70, 0.37), ["eval/diversity/pixels"]),  # 26 %
        ((0.60, 0.60, 0.30), ["eval/watch/judge", "eval/diversity/pixels"]),
        ((0.60, math.nan), []),
        ((math.nan, 0.60), []),
    ],
)
def test_what_counts_as_a_fall(now: tuple[float, ...], fallen: list[str]) -> None:
    verdict = compute_verdict(rows((0.50, 0.70), now), DEFAULTS)
    assert [fall.key for fall in verdict.falls] == fallen
    assert verdict.strikes == bool(fallen)


def test_a_fall_is_from_the_best_evaluation_so_far() -> None:
    """0.70 → 0.75 → 0.735 → 0.72: only the last is clearly below the best; the trained reward rose since then."""
    verdict = compute_verdict(rows((0.5, 0.70), (0.6, 0.75), (0.65, 0.735), (0.7, 0.72)), DEFAULTS)
    assert (verdict.strikes, verdict.best) == (1, 20)
    assert str(verdict) == (
        "judge fell from 0.750 ± 0.010 to 0.720 ± 0.010 while the trained reward rose from 0.600 ± 0.010 to "
        "0.700 ± 0.010 since step 10"
    )


def test_only_strikes_in_a_row_count_and_the_best_has_none() -> None:
    values = [(0.5, 0.7), (0.6, 0.6), (0.7, 0.69), (0.8, 0.6), (0.9, 0.5)]
    verdicts = [compute_verdict(rows(*values[: n + 1]), DEFAULTS) for n in range(5)]
    assert [v.strikes for v in verdicts] == [0, 1, 0, 1, 2]
    assert [v.best for v in verdicts] == [0, 0, 20, 20, 20]
    assert verdicts[-1].metrics() == {"guard/fallen": 1, "guard/strikes": 2, "guard/best_step": 20}


def test_of_equal_evaluations_the_first_is_best_and_one_without_a_score_never() -> None:
    assert compute_verdict(rows((0.5, 0.7), (0.6, 0.7), (0.6, 0.7), (math.nan, 0.7)), DEFAULTS).best == 10
    assert compute_verdict(rows((math.nan, 0.7)), DEFAULTS).best == 0
    assert compute_verdict([], DEFAULTS).strikes == 0


def test_what_is_guarded_can_be_chosen() -> None:
    hacked = rows((0.5, 0.7), (0.9, 0.1, 0.1))
    assert [f.key for f in compute_verdict(hacked, GuardConfig(rewards=[])).falls] == ["eval/diversity/pixels"]
    assert [f.key for f in compute_verdict(hacked, GuardConfig(diversity=None)).falls] == ["eval/watch/judge"]
    assert compute_verdict(hacked, GuardConfig(margin=100.0)).falls == ()


def test_an_ensemble_is_watched_as_a_whole() -> None:
    """One member falls and the other rises: there is no fall, because the ensemble stays the same."""
    members = [{"eval/watch/judge/a": a, "eval/watch/judge/b": 1 - a} for a in (0.9, 0.1)]
    found = [{**row, **more} for row, more in zip(rows((0.5, 0.5), (0.7, 0.5)), members, strict=True)]
    assert not compute_verdict(found, DEFAULTS).falls


def test_a_single_sample_has_no_error_and_counts_as_exact() -> None:
    bare = [{k: v for k, v in row.items() if not k.endswith("stderr")} for row in rows((0.5, 0.7), (0.51, 0.69))]
    assert len(compute_verdict(bare, DEFAULTS).falls) == 1


@pytest.mark.parametrize(
    ("action", "ends", "result", "said"),
    [("warn", False, 20, "while"), ("stop", True, 20, "stopped after step 20"), ("rollback", True, 0, "after step 0")],
)
def test_actions(action: Any, ends: bool, result: int, said: str) -> None:
    guard = Guard(GuardConfig(action=action))
    for row in rows((0.5, 0.7), (0.6, 0.6), (0.7, 0.5)):
        assert not guard.ends
        assert guard.message(20) == ""
        guard.observe(row)
    assert (guard.alarm, guard.ends, guard.result(20), guard.kept) == (True, ends, result, (0,))
    assert said in guard.message(20)


def test_without_a_guard_nothing_is_said_or_kept() -> None:
    guard = Guard(None)
    assert [guard.observe(row) for row in rows((0.5, 0.7), (0.6, 0.1), (0.7, 0.1))] == [{}, {}, {}]
    assert (guard.ends, guard.kept, guard.message(20), guard.result(20)) == (False, (), "", 20)


def test_an_evaluation_made_again_takes_the_place_of_the_first() -> None:
    guard = Guard(DEFAULTS)
    for row in rows((0.5, 0.7), (0.6, 0.6)):
        guard.observe(row)
    guard.observe(evaluation(0, 0.5, 0.7))
    assert [row["step"] for row in guard.rows] == [0]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("eval.every=0", "guard: the guard compares evaluations"),
        ("guard.rewards=[judges]", r"guard.rewards.0: 'judges' is not a watched reward \(watched: judge\)"),
        ("guard={rewards: [], diversity: null}", "guard: nothing is guarded"),
    ],
)
def test_a_guard_that_could_guard_nothing_is_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_config("quickstart", ["guard={}", override])


# A run that trains brightness; its witness agrees up to 0.477 and falls beyond, which is passed at step 5.
HACKED: dict[str, Any] = {
    "data": {"prompts_per_step": 2, "group_size": 4},
    "rollout": {"steps": 3, "batch": 16},
    "train": {"steps": 9, "lr": 0.01, "micro_batch": 64},
    "eval": {"every": 1, "images": 16, "show": 1},
    "rewards": [{"import": "tests.fakes:Brightness"}],
    "watch": [{"import": "tests.fakes:Moderation", "options": {"best": 0.477}}],
    "checkpoint": {"every": 2, "keep": 1},
}


def hacked(model: Path, run: Path, **guard: Any) -> RunConfig:
    return recipe(model, run, **HACKED, guard={"diversity": None, **guard})


def train(config: RunConfig, *, resume: bool = False, processes: DistributedContext | None = None) -> RunSummary:
    return running.train(config, resume=resume, display=SilentDisplay(), processes=processes)


def logged(run: Path) -> list[dict[str, float]]:
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in read_metrics(run)]


def weights(place: Path) -> Mapping[str, torch.Tensor]:
    return load_file(place / "trained.safetensors")


def same(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def rolled_back(sd3: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunSummary]:
    run = tmp_path_factory.mktemp("hacked") / "run"
    return run, train(hacked(sd3, run))


def test_a_hacked_run_is_taken_back_to_its_best(rolled_back: tuple[Path, RunSummary]) -> None:
    run, summary = rolled_back
    found = logged(run)
    assert [row["guard/strikes"] for row in found][-2:] == [1, 2]
    best, last = int(found[-1]["guard/best_step"]), int(found[-1]["step"])
    assert 0 < best < last < 9
    assert summary.steps == last
    assert summary.before == {k: v for k, v in found[0].items() if k.startswith("eval/")}
    assert summary.after == {k: v for k, v in found[best].items() if k.startswith("eval/")}
    assert found[last]["eval/reward/mean"] > summary.after["eval/reward/mean"] > summary.before["eval/reward/mean"]
    assert f"stopped after step {last}; the result is the model after step {best}" in summary.guard
    assert [checkpoint.parse_step(p) for p in checkpoint.find_all(run)] == [best, last]  # though only one is kept


def test_everything_a_run_reports_is_of_the_best(rolled_back: tuple[Path, RunSummary]) -> None:
    run, summary = rolled_back
    place = checkpoint.find_result(run)
    assert place is not None
    assert place != checkpoint.find_latest(run)
    opened = open_run(run)
    assert opened.step == checkpoint.parse_step(place)
    assert same(opened.policy.parameters, weights(place))
    denoiser = load_file(next((run / "model" / "transformer").glob("*.safetensors")))
    assert all(torch.equal(denoiser[name], p) for name, p in opened.policy.parameters.items())
    assert json.loads((run / "summary.json").read_text())["guard"] == summary.guard
    assert "the best at which nothing had fallen" in (run / "report.html").read_text()


@pytest.mark.parametrize("at", [pytest.param(2, marks=pytest.mark.slow), 4, pytest.param(5, marks=pytest.mark.slow)])
def test_a_killed_run_comes_to_the_same_verdict(
    sd3: Path, tmp_path: Path, rolled_back: tuple[Path, RunSummary], monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    config = hacked(sd3, tmp_path / "run")
    with monkeypatch.context() as patched:
        patched.setattr(MetricsFile, "write", dies(MetricsFile.write, at))
        with pytest.raises(Killed):
            train(config)
    summary = train(config, resume=True)
    run = rolled_back[0]
    assert logged(config.output_dir) == logged(run)
    assert summary.guard == rolled_back[1].guard
    one, other = checkpoint.find_all(config.output_dir), checkpoint.find_all(run)
    assert [p.name for p in one] == [p.name for p in other]
    assert all(same(weights(a), weights(b)) for a, b in zip(one, other, strict=True))


def test_a_run_that_was_taken_back_stays_so_until_the_guard_is_changed(sd3: Path, tmp_path: Path) -> None:
    config = hacked(sd3, tmp_path / "run")
    first = train(config)
    again = train(config, resume=True)
    assert (again.guard, again.after, again.steps) == (first.guard, first.after, first.steps)
    onward = train(hacked(sd3, tmp_path / "run", action="warn"), resume=True)
    assert onward.steps == 9
    assert checkpoint.find_result(tmp_path / "run") == checkpoint.find_latest(tmp_path / "run")
    assert onward.guard.startswith("guard: Moderation fell from")


@pytest.mark.slow
def test_stop_leaves_the_weights_of_the_last_step(sd3: Path, tmp_path: Path) -> None:
    summary = train(hacked(sd3, tmp_path / "run", action="stop"))
    last = logged(tmp_path / "run")[-1]
    assert summary.steps == last["step"] < 9
    assert summary.after["eval/reward/mean"] == last["eval/reward/mean"]
    assert checkpoint.find_result(tmp_path / "run") == checkpoint.checkpoint_folder(tmp_path / "run", summary.steps)


@pytest.mark.slow
def test_a_best_checkpoint_that_was_never_kept_is_named(sd3: Path, tmp_path: Path) -> None:
    train(recipe(sd3, tmp_path / "run", **HACKED))
    with pytest.raises(
        CheckpointError, match=r"takes the run back to step \d, whose checkpoint is not in .*guard.action=stop"
    ):
        train(hacked(sd3, tmp_path / "run"), resume=True)


@pytest.mark.slow
def test_two_processes_are_taken_back_together(sd3: Path, tmp_path: Path, rolled_back: tuple[Path, RunSummary]) -> None:
    config = hacked(sd3, tmp_path / "run")
    policies = [load_diffusion_policy(config, keep_base=True) for _ in range(2)]  # loading knows no threads

    def work(processes: DistributedContext) -> RunSummary:
        scorer = Scorer.build(config.rewards, config.watch, processes.device)
        policy = policies[processes.rank]
        trainer = Trainer(config, policy, scorer, load_training_prompts(config), processes)
        prompts, diversity = load_prompts(str(config.data.evaluation)), Diversity.build(config.eval.diversity)
        evaluator = Evaluator(policy, scorer, prompts, processes, config.seed, diversity)
        (config.output_dir / "samples").mkdir(parents=True, exist_ok=True)
        return running.Run(config, trainer, evaluator, processes, SilentDisplay())()

    one, two = in_threads(2, work)
    assert one.guard == two.guard == rolled_back[1].guard
    place = checkpoint.find_result(tmp_path / "run")
    assert place is not None
    for policy in policies:
        assert same(policy.parameters, weights(place))
