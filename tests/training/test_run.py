"""Runs that are stopped, killed, broken and resumed: nothing is lost, nothing is repeated, and every refusal has its reason."""

from __future__ import annotations

import errno
import json
import random
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from difrl.config import RunConfig
from difrl.config.load import to_yaml
from difrl.policies.errors import ModelError
from difrl.reporting.metrics_file import MetricsError, MetricsFile, read_metrics
from difrl.reporting.terminal import SilentDisplay
from difrl.training import checkpoint
from difrl.training import run as running
from difrl.training.checkpoint import CheckpointError, write
from difrl.training.evaluation import Evaluator
from difrl.training.rollout_source import PolicyRollouts
from difrl.training.run import Interrupted
from difrl.training.run_folder import RunFolderError, find_stretched_schedules
from difrl.training.trainer import Trainer
from rewards import RewardError
from tests.fakes import Moody
from tests.recipes import FLOW_GRPO, recipe

EMA = {"ema": {"decay": 0.5}}
LORA = {"train": "lora", "lora": {"rank": 2}}
CASES: dict[str, dict[str, Any]] = {
    "forward": {"snapshots": EMA, "anchors": [{"to": "ema", "coefficient": 0.5}]},
    "lora": {
        "model": LORA,
        "snapshots": EMA,
        "anchors": [{"to": "base", "coefficient": 0.1}, {"to": "ema", "coefficient": 0.5}],
    },
    "int8": {"model": {**LORA, "quantize": "int8"}, "train": {"optimizer": "adamw8bit"}},
    "reverse": {**FLOW_GRPO, "train": {"updates_per_step": 2, "lr": {"kind": "linear", "start": 1e-3, "end": 0.0}}},
}
KEPT = ("trained.safetensors", "optimizer.safetensors", "snapshots.safetensors", "source.safetensors")


class Killed(BaseException):
    """An exception in place of SIGKILL, for tests that stay in their own process. Nothing catches it."""


def small(model: Path, run: Path, /, **sections: Any) -> RunConfig:
    """Return a recipe of four steps of two prompts, evaluated on four images every second step."""
    defaults: dict[str, Any] = {
        "data": {"prompts_per_step": 2, "group_size": 2},
        "rollout": {"steps": 3},
        "train": {"steps": 4},
        "eval": {"images": 4, "show": 1},
    }
    for name, section in sections.items():
        merged = isinstance(section, dict) and name in defaults
        defaults[name] = {**defaults[name], **section} if merged else section
    return recipe(model, run, **defaults)


def train(config: RunConfig, *, resume: bool = False) -> Path:
    running.train(config, resume=resume, display=SilentDisplay())
    return config.output_dir


def rows(run: Path) -> list[dict[str, Any]]:
    """Return the rows of metrics.jsonl without the times."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith("time/")} for line in lines]


def results(run: Path) -> dict[str, Any]:
    """Return the results of a run that must be reproduced bit for bit."""
    newest = checkpoint.find_latest(run)
    assert newest is not None
    files = {name: (newest / name).read_bytes() for name in KEPT}
    pictures = {p.name: p.read_bytes() for p in (run / "samples").iterdir()}
    return {"checkpoint": newest.name, "metrics": rows(run), **files, **pictures}


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    assert found["metrics"] == expected["metrics"]
    assert [name for name in expected if found[name] != expected[name]] == []


@pytest.fixture(scope="module")
def uninterrupted(sd3: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """Results of an undisturbed run, by case."""
    done: dict[str, dict[str, Any]] = {}

    def of(case: str) -> dict[str, Any]:
        if case not in done:
            done[case] = results(train(small(sd3, tmp_path_factory.mktemp("whole") / "run", **CASES[case])))
        return done[case]

    return of


def dies(function: Callable[..., Any], at: int, *, done: bool = False) -> Callable[..., Any]:
    """Wrap a function so that its call number `at` kills the process, before its work or after it."""
    calls = 0

    def call(*args: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at and not done:
            raise Killed
        result = function(*args, **named)
        if calls == at:
            raise Killed
        return result

    return call


def torn(write: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap MetricsFile.write so that the process is killed when half of the line of step 3 is on the disk."""

    def call(self: MetricsFile, metrics: dict[str, float]) -> None:
        write(self, metrics)
        if metrics["step"] == 3:
            text = self.path.read_text()
            self.path.write_text(text[: len(text) - 40])
            raise Killed

    return call


MOMENTS: dict[str, tuple[Any, str, Callable[..., Any]]] = {
    "in the first rollout": (PolicyRollouts, "draw", partial(dies, at=1)),
    "in a rollout": (PolicyRollouts, "draw", partial(dies, at=3)),
    "after an update": (Trainer, "_optimizer_step", partial(dies, at=3, done=True)),
    "before the metrics": (MetricsFile, "write", partial(dies, at=4)),
    "in the metrics": (MetricsFile, "write", torn),
    "before the checkpoint": (checkpoint, "save", partial(dies, at=3)),
    "in the checkpoint": (write, "write_tensors", partial(dies, at=12, done=True)),
    "at the end of the checkpoint": (write, "atomic_write_text", partial(dies, at=3, done=True)),
    "after the last checkpoint": (checkpoint, "save", partial(dies, at=4, done=True)),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_and_resumed_is_the_same_run(
    sd3: Path, tmp_path: Path, uninterrupted: Any, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """At every moment: weights, optimizer, snapshots, metrics and pictures equal those of an undisturbed run."""
    where, name, how = MOMENTS[moment]
    config = small(sd3, tmp_path / "run", **CASES["forward"])
    with monkeypatch.context() as patched:
        patched.setattr(where, name, how(getattr(where, name)))
        with pytest.raises(Killed):
            train(config)
    train(config, resume=True)
    assert_same(results(config.output_dir), uninterrupted("forward"))
    hidden = [p.name for p in (config.output_dir / "checkpoints").iterdir() if p.name.startswith(".")]
    assert hidden == []


@pytest.mark.parametrize("case", ["lora", "reverse"])
def test_every_kind_of_run_resumes(
    sd3: Path, tmp_path: Path, uninterrupted: Any, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    config = small(sd3, tmp_path / "run", **CASES[case])
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "save", dies(checkpoint.save, 3))
        with pytest.raises(Killed):
            train(config)
    train(config, resume=True)
    assert_same(results(config.output_dir), uninterrupted(case))


# The difrl command, which sends itself a signal at its N-th fsync or backward pass: anywhere in a step or a checkpoint.
SIGNALLED = """
import os, signal, sys, torch
left, number = int(sys.argv.pop(1)), int(sys.argv.pop(1))

def counted(function):
    def call(*args, **named):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), number)
        return function(*args, **named)
    return call

os.fsync, torch.Tensor.backward = counted(os.fsync), counted(torch.Tensor.backward)
from difrl.cli import main
main()
"""


def signalled(config: RunConfig, at: int, number: signal.Signals) -> subprocess.CompletedProcess[str]:
    """Train in a process of its own, which receives a signal at its event `at`."""
    path = config.output_dir.with_suffix(".yaml")
    path.write_text(to_yaml(config))
    command = [sys.executable, "-c", SIGNALLED, str(at), str(int(number)), "train", str(path)]
    root = Path(running.__file__).parents[2]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=600, cwd=root)


def events(config: RunConfig) -> int:
    """Return the numbers of fsyncs and backward passes of a run of full batches."""
    decisions = config.likelihood.decisions if config.likelihood.kind == "forward" else config.rollout.steps - 1
    groups = config.data.prompts_per_step // config.train.updates_per_step
    samples = groups * config.data.group_size
    rows_at_once = max(1, config.train.micro_batch // decisions)
    passes = -(-samples // rows_at_once) * config.train.updates_per_step
    return config.train.steps * (passes + 8)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_sigkill_at_a_random_moment(sd3: Path, tmp_path: Path, uninterrupted: Any, case: str) -> None:
    config = small(sd3, tmp_path / "run", **CASES[case])
    at = random.SystemRandom().randrange(1, events(config))
    process = signalled(config, at, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL, f"event {at}: {process.stdout}{process.stderr}"
    train(config, resume=True)
    assert_same(results(config.output_dir), uninterrupted(case))


@pytest.mark.slow
def test_ctrl_c_saves_says_so_and_exits_130(sd3: Path, tmp_path: Path, uninterrupted: Any) -> None:
    """Ctrl-C comes in the first backward pass of the second step, which is still finished and saved."""
    config = small(sd3, tmp_path / "run", **CASES["forward"])
    process = signalled(config, events(config) // config.train.steps + 1, signal.SIGINT)
    assert process.returncode == 130, process.stderr
    assert "stopped after step 2, which is saved; continue with the same command and --resume" in process.stderr
    assert "Traceback" not in process.stderr
    assert [p.name for p in checkpoint.find_all(config.output_dir)] == ["step-000001", "step-000002"]
    train(config, resume=True)
    assert_same(results(config.output_dir), uninterrupted("forward"))


class Interrupting:
    """A reward that is interrupted at its call `at`, `times` times."""

    name = "interrupting"
    needs = ("images",)

    def __init__(self, at: int, times: int, number: signal.Signals) -> None:
        self.left, self.times, self.number = at, times, number

    def to(self, device: Any) -> Interrupting:
        return self

    def __call__(self, images: torch.Tensor, prompts: Any, metadata: Any) -> Any:
        from rewards import Scores

        self.left -= 1
        if self.left == 0:
            for _ in range(self.times):
                signal.raise_signal(self.number)
        return Scores(images.mean(dim=(1, 2, 3)), torch.ones(len(images), dtype=torch.bool))


def interrupting(
    monkeypatch: pytest.MonkeyPatch, at: int, times: int = 1, number: signal.Signals = signal.SIGINT
) -> None:
    monkeypatch.setattr("difrl.scoring.scorer.build_reward", lambda config: Interrupting(at, times, number))


UNSEEN = {"eval": {"every": 0}}  # every call of the reward is a training step's


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_polite_signal_ends_the_step_and_saves_it(
    sd3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    """The step is saved although no checkpoint is due, and the previous signal handlers are restored."""
    handler = signal.getsignal(number)
    config = small(sd3, tmp_path / "run", **UNSEEN, checkpoint={"every": 0})
    with monkeypatch.context() as patched:
        interrupting(patched, 2, number=number)
        with pytest.raises(Interrupted, match=r"after step 2, which is saved.*--resume"):
            train(config)
    assert [p.name for p in checkpoint.find_all(config.output_dir)] == ["step-000002"]
    assert signal.getsignal(number) is handler
    train(config, resume=True)
    assert [row["step"] for row in rows(config.output_dir)] == [1, 2, 3, 4]


def test_a_second_ctrl_c_does_not_wait(sd3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupting(monkeypatch, 2, times=2)
    config = small(sd3, tmp_path / "run", **UNSEEN)
    with pytest.raises(KeyboardInterrupt):
        train(config)
    assert [p.name for p in checkpoint.find_all(config.output_dir)] == ["step-000001"]


def test_ctrl_c_in_the_last_step_lets_the_run_finish(
    sd3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupting(monkeypatch, 4)
    run = train(small(sd3, tmp_path / "run", **UNSEEN))
    assert (run / "summary.json").is_file()


def test_the_same_seed_gives_the_same_run_and_another_seed_another(
    sd3: Path, tmp_path: Path, uninterrupted: Any
) -> None:
    again = results(train(small(sd3, tmp_path / "again", **CASES["forward"])))
    assert_same(again, uninterrupted("forward"))
    other = results(train(small(sd3, tmp_path / "other", **CASES["forward"], seed=1)))
    assert other["step-000000.png"] != again["step-000000.png"]
    assert other["trained.safetensors"] != again["trained.safetensors"]


def test_a_reward_that_draws_is_the_same_in_every_run_of_a_seed(
    sd3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("difrl.scoring.scorer.build_reward", lambda config: Moody())
    found = list[dict[str, Any]]()
    for name, before in (("one", 1), ("two", 2)):
        torch.manual_seed(before)
        found.append(results(train(small(sd3, tmp_path / name, train={"steps": 2}))))
    assert_same(*found)


def test_a_run_is_extended_moved_and_saved_more_rarely(sd3: Path, tmp_path: Path, uninterrupted: Any) -> None:
    """A resumed run may change train.steps, checkpoint, eval and output_dir."""
    train(small(sd3, tmp_path / "first", **CASES["forward"], train={"steps": 2}))
    (tmp_path / "first").rename(tmp_path / "second")
    changed = small(sd3, tmp_path / "second", **CASES["forward"], checkpoint={"every": 3}, eval={"rlg": [0.0, 1.0]})
    assert_same(results(train(changed, resume=True)), uninterrupted("forward"))
    saved = (tmp_path / "second" / "config.yaml").read_text()
    assert saved == to_yaml(changed)


def test_a_finished_run_resumed_has_nothing_left_to_do(sd3: Path, tmp_path: Path) -> None:
    config = small(sd3, tmp_path / "run")
    before = results(train(config))
    summary = json.loads((config.output_dir / "summary.json").read_text())
    assert_same(results(train(config, resume=True)), before)
    again = json.loads((config.output_dir / "summary.json").read_text())
    assert {k: again[k] for k in ("before", "after", "steps", "evaluations")} == {
        k: summary[k] for k in ("before", "after", "steps", "evaluations")
    }


@pytest.fixture(scope="module")
def half(sd3: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of one step, for runs that are refused before they touch it."""
    return train(small(sd3, tmp_path_factory.mktemp("half") / "run", train={"steps": 1}))


@pytest.mark.parametrize(
    ("section", "changed"),
    [
        ("model", LORA),
        ("data", {"group_size": 3}),
        ("rollout", {"guidance": 2.0}),
        ("likelihood", {"kind": "forward", "decisions": 2}),
        ("objective", {"kind": "clipped", "clip_low": 0.5}),
        ("advantage", {"std": "global"}),
        ("train", {"lr": 1e-4}),
        ("rewards", [{"name": "jpeg_incompressibility"}]),
        ("seed", 3),
    ],
)
def test_another_recipe_is_refused(sd3: Path, half: Path, section: str, changed: Any) -> None:
    """The error names the section that differs, and the run is untouched."""
    before = results(half)
    with pytest.raises(
        RunFolderError, match=f"other settings of {section}; resume with the recipe it was started with"
    ):
        train(small(sd3, half, **{section: changed}), resume=True)
    assert_same(results(half), before)


def test_a_folder_with_a_run_is_not_overwritten(sd3: Path, half: Path) -> None:
    before = results(half)
    with pytest.raises(RunFolderError, match=r"holds a run already; continue it with --resume, or .*output_dir="):
        train(small(sd3, half))
    assert_same(results(half), before)


def test_resuming_what_was_never_begun_begins_it(sd3: Path, tmp_path: Path, uninterrupted: Any) -> None:
    config = small(sd3, tmp_path / "run", **CASES["forward"])
    assert_same(results(train(config, resume=True)), uninterrupted("forward"))


def test_a_model_that_cannot_be_loaded_does_not_occupy_the_folder(sd3: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no folder"):
        train(small(tmp_path / "nowhere", tmp_path / "run"))
    assert not (tmp_path / "run").exists()


class Spoken(SilentDisplay):
    """A display that keeps the messages."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def message(self, text: str) -> None:
        self.messages.append(text)


def resumed(config: RunConfig) -> list[str]:
    """Resume a run, and return its messages."""
    display = Spoken()
    running.train(config, resume=True, display=display)
    return display.messages


def test_a_damaged_checkpoint_is_passed_over_and_kept(sd3: Path, tmp_path: Path, uninterrupted: Any) -> None:
    """The run continues from the one before it, says so, and ends with the same bytes; it keeps the damaged files."""
    config = small(sd3, tmp_path / "run", **CASES["forward"])
    train(config)
    newest = checkpoint.find_latest(config.output_dir)
    assert newest is not None
    (newest / "optimizer.safetensors").write_bytes(b"short")
    (message,) = resumed(config)
    assert re.search(
        r"step-000004 is damaged: optimizer.safetensors has 5 bytes .* continues from step-000003", message
    )
    assert_same(results(config.output_dir), uninterrupted("forward"))
    kept = newest.with_name("step-000004-damaged")
    assert (kept / "optimizer.safetensors").read_bytes() == b"short"
    assert resumed(config) == []


def test_rows_of_metrics_that_are_missing_or_edited_are_noticed(sd3: Path, tmp_path: Path) -> None:
    """Once: the next checkpoint takes the rows as they are. Rows after the checkpoint are repeated and do not count."""
    config = small(sd3, tmp_path / "run", train={"steps": 3})
    longer = small(sd3, tmp_path / "run", train={"steps": 4})
    path = train(config) / "metrics.jsonl"
    whole = path.read_text()
    lines = whole.splitlines(keepends=True)
    damages = {
        "": None,
        "missing row": "".join(lines[:1] + lines[2:]),
        "missing last row": "".join(lines[:-1]),
        "edited": whole.replace('"nfe": ', '"nfe": 1'),
        "twice": "".join([*lines[:2], *lines[1:]]),
        "empty": "",
        "a row more": whole + '{"step": 4, "loss": 1.0}\n',
    }
    for name, text in damages.items():
        path.write_text(whole if text is None else text)
        said = [
            message
            for message in resumed(config)
            if "does not hold the rows that the run wrote up to step 3" in message
        ]
        assert len(said) == (name not in ("", "a row more")), name
    path.write_text(whole.replace('"nfe": ', '"nfe": 1'))
    assert any("missing or edited" in message for message in resumed(longer))
    assert resumed(longer) == []


def test_an_evaluation_that_failed_is_repeated_until_it_is_in_a_checkpoint(
    sd3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after the repeated evaluation and before the next checkpoint: a reward that draws still draws the same."""
    monkeypatch.setattr("difrl.scoring.scorer.build_reward", lambda config: Moody())
    rare = {"checkpoint": {"every": 0}}
    torch.manual_seed(0)
    expected = results(train(small(sd3, tmp_path / "whole", **rare)))
    config = small(sd3, tmp_path / "run", **rare)
    with monkeypatch.context() as patched:
        calls = iter(range(9))
        evaluate = Evaluator.__call__

        def failing(*args: Any, **named: Any) -> dict[str, float]:
            if next(calls) == 1:
                raise RewardError("mine", "the server is gone")
            return evaluate(*args, **named)

        patched.setattr(Evaluator, "__call__", failing)
        with pytest.raises(RewardError):
            train(config)
    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "step", dies(Trainer.step, 1))
        with pytest.raises(Killed):
            train(config, resume=True)
    assert any(name.startswith("eval/") for name in rows(config.output_dir)[-1])
    assert resumed(config) == []
    assert_same(results(config.output_dir), expected)


# A reward in a module of the user's own; what is wrong with it is what the file `fault` beside it says.
REWARD = """
from pathlib import Path
import torch
from rewards import Scores

class Mine:
    name = "mine"
    needs = ("images", "prompts")

    def __init__(self):
        self.calls = 0

    def to(self, device):
        return self

    def __call__(self, images, prompts, metadata):
        self.calls += 1
        values = images.mean(dim=(1, 2, 3))
        fault = Path(__file__).with_name("fault").read_text()
        if fault == "raises" and self.calls == 3:
            raise KeyError("weights")
        if fault == "nan" and self.calls == 3:
            values[1] = float("nan")
        if fault == "short" and self.calls == 3:
            values = values[:-1]
        return Scores(values, torch.ones(len(values), dtype=torch.bool))
"""


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Return the sections of a recipe with this reward."""
    module = f"reward_of_{tmp_path.name}"
    (tmp_path / f"{module}.py").write_text(REWARD)
    monkeypatch.syspath_prepend(tmp_path)
    yield {"rewards": [{"import": f"{module}:Mine"}], **UNSEEN}
    sys.modules.pop(module, None)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (
            "raises",
            r"'mine' failed: KeyError: 'weights' in \w+\.py, line \d+ \(in a batch of 4 samples of '.+', '.+'\)",
        ),
        ("nan", r"'mine' failed at row 1 \(prompt '.+'\): value nan is not finite"),
        ("short", r"'mine' failed: returned values \(3,\).* for 4 samples.*\(in a batch of 4 samples of '.+', '.+'\)"),
    ],
)
def test_a_broken_reward_stops_the_run(
    sd3: Path, tmp_path: Path, broken: dict[str, Any], fault: str, message: str
) -> None:
    """The error names the reward and its prompts. With a working reward, the run resumes to the same end."""
    (tmp_path / "fault").write_text("none")
    expected = results(train(small(sd3, tmp_path / "whole", **broken)))
    (tmp_path / "fault").write_text(fault)
    config = small(sd3, tmp_path / "run", **broken)
    with pytest.raises(RewardError, match=message):
        train(config)
    assert [row["step"] for row in rows(config.output_dir)] == [1, 2]
    assert "reward/Mine" in rows(config.output_dir)[0]
    (tmp_path / "fault").write_text("none")
    assert_same(results(train(config, resume=True)), expected)


def test_a_broken_reward_costs_no_finished_step(sd3: Path, tmp_path: Path, broken: dict[str, Any]) -> None:
    """No checkpoint was due, so the failure saves the two steps before it, with the random states from before it."""
    rare = {**broken, "checkpoint": {"every": 0}}
    (tmp_path / "fault").write_text("none")
    expected = results(train(small(sd3, tmp_path / "whole", **rare)))
    (tmp_path / "fault").write_text("raises")
    config = small(sd3, tmp_path / "run", **rare)
    with pytest.raises(RewardError):
        train(config)
    assert [p.name for p in checkpoint.find_all(config.output_dir)] == ["step-000002"]
    (tmp_path / "fault").write_text("none")
    assert_same(results(train(config, resume=True)), expected)


def test_schedules_that_span_the_run_are_named_when_it_is_extended(tmp_path: Path) -> None:
    decay = {"kind": "linear", "start": 0.0, "end": 0.5}
    spanning = {
        "train": {"lr": {"kind": "cosine", "start": 1e-3, "end": 0.0}},
        "snapshots": {"ema": {"decay": decay}, "old": {"decay": {**decay, "steps": 9}}},
    }
    config = recipe("nowhere", tmp_path, **spanning)
    longer = config.model_copy(update={"train": config.train.model_copy(update={"steps": config.train.steps + 1})})
    assert find_stretched_schedules(config, longer) == ["train.lr", "snapshots.ema"]
    assert find_stretched_schedules(longer, longer) == []


def test_an_evaluation_in_which_a_reward_fails_is_made_when_the_run_goes_on(
    sd3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step before it is saved, although no checkpoint was due, and gets the metrics that it would have had."""
    rare = {**CASES["forward"], "checkpoint": {"every": 0}}
    expected = results(train(small(sd3, tmp_path / "whole", **rare)))
    config = small(sd3, tmp_path / "run", **rare)
    whole, calls = Evaluator.__call__, iter(range(9))

    def failing(*args: Any, **named: Any) -> dict[str, float]:
        if next(calls) == 1:
            raise RewardError("mine", "the server is gone")
        return whole(*args, **named)

    with monkeypatch.context() as patched:
        patched.setattr(Evaluator, "__call__", failing)
        with pytest.raises(RewardError):
            train(config)
    assert [p.name for p in checkpoint.find_all(config.output_dir)] == ["step-000002"]
    assert not any(name.startswith("eval/") for name in rows(config.output_dir)[-1])
    assert_same(results(train(config, resume=True)), expected)


class Failing(Moody):
    """A reward that fails at its call `at`, after it has drawn a random number."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.left = at

    def __call__(self, *args: Any) -> Any:
        self.left -= 1
        scores = super().__call__(*args)
        if self.left == 0:
            raise RewardError("moody", "the server is gone")
        return scores


COMPARED = {
    "rewards": [{"name": "jpeg_compressibility", "shape": {"kind": "par"}}],
    "references": {"count": 2},
    "data": {"train": "three.txt"},
    **UNSEEN,
}


@pytest.mark.parametrize(
    ("sections", "at", "saved"),
    [
        pytest.param(COMPARED, 5, 1, id="after references were scored"),  # 1, 2: two prompts; 3: step; 4: third prompt
        pytest.param({}, 5, 2, id="in an evaluation"),  # 1, 2: before, and its pictures; 3, 4: steps
        pytest.param({"guard": {}, "watch": [{"name": "judge"}]}, 3, 0, id="in the first step of a guarded run"),
    ],
)
def test_a_moody_reward_that_fails_ends_as_if_it_had_not(
    sd3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sections: dict[str, Any], at: int, saved: int
) -> None:
    """The reward draws from the global random state, which must be restored before the work is repeated."""
    (tmp_path / "three.txt").write_text("a red circle\na blue square\na green circle\n")
    monkeypatch.chdir(tmp_path)

    def trained(config: RunConfig, seed: int, at: int, *, resume: bool = False) -> dict[str, Any]:
        torch.manual_seed(seed)
        monkeypatch.setattr("difrl.scoring.scorer.build_reward", lambda config: Failing(at))
        return results(train(config, resume=resume))

    rare = {**sections, "checkpoint": {"every": 0}}
    expected = trained(small(sd3, tmp_path / "whole", **rare), 3, 99)
    config = small(sd3, tmp_path / "run", **rare)
    with pytest.raises(RewardError, match="the server is gone"):
        trained(config, 3, at)
    assert [checkpoint.parse_step(place) for place in checkpoint.find_all(config.output_dir)] == [saved]
    assert_same(trained(config, 4, 99, resume=True), expected)


def test_a_failure_in_the_middle_of_a_step_saves_nothing(
    sd3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights after one of two updates belong to no step."""
    monkeypatch.setattr(Trainer, "_accumulate_gradient", failing_second(Trainer._accumulate_gradient))
    config = small(sd3, tmp_path / "run", **CASES["reverse"], **UNSEEN, checkpoint={"every": 0})
    with pytest.raises(RuntimeError, match="shapes differ"):
        train(config)
    assert checkpoint.find_all(config.output_dir) == []


def failing_second(update: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap an update so that the second one of the second step fails."""
    calls = 0

    def call(*args: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise RuntimeError("shapes differ")
        return update(*args, **named)

    return call


def test_metrics_are_on_the_disk_before_the_checkpoint_is(
    sd3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    monkeypatch.setattr(MetricsFile, "sync", lambda self: order.append("metrics"))
    save = checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda *args: order.append("checkpoint") or save(*args))  # type: ignore[func-returns-value]
    train(small(sd3, tmp_path / "run", **UNSEEN, train={"steps": 2}))
    assert order == ["metrics", "checkpoint"] * 2


def test_without_evaluations_none_is_made(sd3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With eval.every=0 there is no evaluation before or after training, no picture and no sweep."""

    def evaluation(*args: Any, **named: Any) -> None:
        raise AssertionError("an evaluation was made")

    monkeypatch.setattr("difrl.policies.diffusion.policy.DiffusionPolicy.evaluation", evaluation)
    run = train(small(sd3, tmp_path / "run", eval={"every": 0, "rlg": [0.0, 1.0]}))
    assert [row["step"] for row in rows(run)] == [1, 2, 3, 4]
    assert not [key for row in rows(run) for key in row if key.startswith("eval/")]
    assert list((run / "samples").iterdir()) == []
    assert (run / "report.html").is_file()


def test_evaluations_are_before_every_so_often_and_after(sd3: Path, tmp_path: Path) -> None:
    run = train(small(sd3, tmp_path / "run", train={"steps": 3}, eval={"every": 2}))
    assert [row["step"] for row in rows(run) if "eval/reward/mean" in row] == [0, 2, 3]
    assert sorted(p.name for p in (run / "samples").glob("step-*.png")) == [f"step-00000{n}.png" for n in (0, 2, 3)]


@pytest.mark.parametrize("what", ["metrics", "checkpoint", "picture"])
def test_a_full_disk_stops_the_run_and_costs_nothing_that_was_saved(
    sd3: Path, tmp_path: Path, uninterrupted: Any, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    def full(*args: Any, **named: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    config = small(sd3, tmp_path / "run", **CASES["forward"])
    places = {
        "metrics": (MetricsFile, "write"),
        "checkpoint": (write, "atomic_write_text"),
        "picture": (Path, "write_text"),
    }
    train_step = running.Run._train_step

    def fills_up(self: running.Run) -> None:
        if self.step == 1:
            self.writer.finish()
            patched.setattr(*places[what], full)
        train_step(self)

    with monkeypatch.context() as patched:
        patched.setattr(running.Run, "_train_step", fills_up)
        with pytest.raises(
            (RunFolderError, CheckpointError), match=r"cannot write .*No space left.*untouched.*--resume"
        ):
            train(config)
    assert [p.name for p in checkpoint.find_all(config.output_dir)] == ["step-000001"]
    assert_same(results(train(config, resume=True)), uninterrupted("forward"))


def test_a_run_folder_that_cannot_be_made_says_so(sd3: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunFolderError, match="cannot write to"):
        train(small(sd3, tmp_path / "file" / "run"))


def lines_of(run: Path, *lines: str) -> Path:
    (run / "metrics.jsonl").write_text("\n".join(lines))
    return run


def test_a_torn_last_line_is_dropped(tmp_path: Path) -> None:
    """A process killed while writing leaves such a line; the step is repeated."""
    lines_of(tmp_path, '{"step": 1, "loss": null}', '{"step": 2}', '{"step": 3, "lo')
    read = read_metrics(tmp_path)
    assert [row["step"] for row in read] == [1, 2]
    assert read[0]["loss"] != read[0]["loss"]  # null is NaN
    MetricsFile(tmp_path, 2).write({"step": 3, "loss": float("inf")})
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3]
    assert rows(tmp_path)[-1]["loss"] is None


def test_what_follows_the_checkpoint_is_cut_off(tmp_path: Path) -> None:
    lines_of(tmp_path, '{"step": 0}', '{"step": 1}', '{"step": 2}', '{"step": 3}')
    MetricsFile(tmp_path, 2)
    assert [row["step"] for row in rows(tmp_path)] == [0, 1, 2]
    MetricsFile(tmp_path, 0)
    assert rows(tmp_path) == []


@pytest.mark.parametrize("middle", ['{"step": 2, "lo', "[]", '{"loss": 3}', "\x00\x00\x00", ""])
def test_a_broken_line_in_the_middle_is_refused(tmp_path: Path, middle: str) -> None:
    """A killed process does not leave such a line. Dropping it would lose a step silently."""
    lines_of(tmp_path, '{"step": 1}', middle, '{"step": 3}')
    before = (tmp_path / "metrics.jsonl").read_bytes()
    for reader in (lambda: read_metrics(tmp_path), lambda: MetricsFile(tmp_path, 3)):
        with pytest.raises(MetricsError, match=r"metrics\.jsonl:2: expected a JSON object with a step"):
            reader()
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_no_metrics_yet(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []
