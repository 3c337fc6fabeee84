"""Trackers: every metric of a run reaches them once, from new runs and from resumed ones."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from difrl.config import RunConfig
from difrl.config.yaml_source import ConfigError
from difrl.reporting.metrics_file import MetricsFile
from difrl.reporting.terminal import SilentDisplay
from difrl.reporting.trackers import TRACKERS, TensorBoard, find_trackers, register_tracker
from difrl.training.run import train
from tests.documented_packages import install
from tests.recipes import text_recipe

Values = dict[tuple[int, str], float]


class Killed(BaseException):
    """A kill that a test survives: nothing catches it."""


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install("my_trackers", TRACKERS, tmp_path / "site", monkeypatch)


def small(lm: Path, folder: Path, **sections: object) -> RunConfig:
    """Four steps with evaluations before, in the middle and after; a checkpoint after every second step."""
    settings = {"trackers": ["long_csv"], "tensorboard": True, "checkpoint": {"every": 2}, "eval": {"rlg": []}}
    return text_recipe(lm, folder / "run", **{"data": prompts(folder), **settings, **sections})


def prompts(folder: Path) -> dict[str, object]:
    (folder / "prompts.txt").write_text("1 + 1 =\n2 + 2 =\n3 + 1 =\n4 + 4 =\n")
    path = str(folder / "prompts.txt")
    return {"train": path, "evaluation": path, "prompts_per_step": 2, "group_size": 2}


def metrics(run: Path) -> Values:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    pairs = [(row["step"], name, value) for row in rows for name, value in row.items() if name != "step"]
    return {(step, name): math.nan if value is None else value for step, name, value in pairs}


def csv_values(run: Path) -> Values:
    cells = [line.split(",") for line in (run / "metrics.csv").read_text().splitlines()]
    found = {(int(step), name): float(value) for step, name, value in cells}
    assert len(found) == len(cells), "a metric was written twice"
    return found


def event_values(run: Path) -> Values:
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    scalars = [(e.step, tag, e.value) for tag in events.Tags()["scalars"] for e in events.Scalars(tag)]
    assert len({(step, tag) for step, tag, _ in scalars}) == len(scalars), "a metric was written twice"
    return {(step, tag): value for step, tag, value in scalars}


@pytest.mark.usefixtures("installed")
def test_trackers_of_a_run_hold_what_metrics_jsonl_holds(lm: Path, tmp_path: Path) -> None:
    config = small(lm, tmp_path)
    train(config, display=SilentDisplay())
    expected = metrics(config.output_dir)
    assert {step for step, _ in expected} == {0, 1, 2, 3}
    assert csv_values(config.output_dir) == pytest.approx(expected, rel=0, abs=0, nan_ok=True)
    assert event_values(config.output_dir) == pytest.approx(expected, rel=1e-6, nan_ok=True)  # float32


@pytest.mark.usefixtures("installed")
def test_a_resumed_run_writes_every_step_once(lm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run is killed after the metrics of step 3, whose checkpoint does not exist: step 3 is repeated."""
    config = small(lm, tmp_path, train={"steps": 4})
    write = MetricsFile.write

    def killed_after_step_3(self: MetricsFile, row: Mapping[str, float]) -> None:
        write(self, row)
        if row["step"] == 3:
            raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(MetricsFile, "write", killed_after_step_3)
        with pytest.raises(Killed):
            train(config, display=SilentDisplay())
    assert max(step for step, _ in csv_values(config.output_dir)) == 3
    train(config, resume=True, display=SilentDisplay())
    expected = metrics(config.output_dir)
    assert {step for step, _ in expected} == {0, 1, 2, 3, 4}
    assert csv_values(config.output_dir) == pytest.approx(expected, rel=0, abs=0, nan_ok=True)
    assert event_values(config.output_dir) == pytest.approx(expected, rel=1e-6, nan_ok=True)


def test_a_resumed_run_may_have_other_trackers(lm: Path, tmp_path: Path) -> None:
    train(small(lm, tmp_path, trackers=[], tensorboard=False, train={"steps": 2}), display=SilentDisplay())
    config = small(lm, tmp_path, trackers=["tensorboard"], train={"steps": 3})
    train(config, resume=True, display=SilentDisplay())
    assert {step for step, _ in event_values(config.output_dir)} == {3}


@pytest.mark.parametrize(
    "settings",
    [{"tensorboard": True}, {"trackers": ["tensorboard"]}, {"tensorboard": True, "trackers": ["tensorboard"]}],
)
def test_both_keys_of_tensorboard_mean_the_same(settings: dict[str, object]) -> None:
    assert find_trackers(text_recipe("nowhere", **settings)) == [TensorBoard]


def test_no_tracker_is_the_default() -> None:
    assert find_trackers(text_recipe("nowhere")) == []


def test_an_unknown_tracker_stops_a_run_before_it_loads_anything(tmp_path: Path) -> None:
    config = text_recipe("nowhere", tmp_path / "run", trackers=["tensorbord"], data=prompts(tmp_path))
    with pytest.raises(ConfigError, match=r"trackers: there is no tracker 'tensorbord'; did you mean 'tensorboard'\?"):
        train(config, display=SilentDisplay())
    assert not config.output_dir.exists()


def test_every_tracker_is_closed_after_an_error(tmp_path: Path) -> None:
    closed = []

    class Broken:
        def write(self, step: int, metrics: Mapping[str, float]) -> None:
            raise OSError("no space left")

        def close(self) -> None:
            closed.append(self)
            raise OSError("still no space left")

    first, second = Broken(), Broken()
    with pytest.raises(OSError, match="no space left"), MetricsFile(tmp_path, 0, [first, second]) as file:
        file.write({"step": 1, "loss": 0.5})
    assert closed == [second, first]
    assert metrics(tmp_path) == {(1, "loss"): 0.5}


def test_a_name_is_taken_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TRACKERS, "_registered", dict(TRACKERS._registered))
    with pytest.raises(ValueError, match="two tracker extensions are called 'tensorboard'"):
        register_tracker("tensorboard", lambda config, done: TensorBoard(config, done))
