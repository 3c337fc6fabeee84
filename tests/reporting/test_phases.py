"""Phases on a terminal of 80 columns, and in logs."""

from __future__ import annotations

import io
import time

import pytest
from rich.console import Console

from difrl.reporting.terminal import LiveDisplay, PlainDisplay, RunFacts, show_phases
from difrl.reporting.terminal.phases import PATIENCE, PhaseLine, PhaseLog, describe, describe_time, find_slow
from difrl.runtime.progress import Phase, phase


def render(line: PhaseLine, width: int = 80) -> list[str]:
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    with console.capture() as captured:
        console.print(line)
    return captured.get().splitlines()


def test_a_phase_has_its_count_and_its_time() -> None:
    evaluation = Phase("evaluation", 256, 96, began=100.0)
    assert describe(evaluation) == "evaluation 96/256"
    assert describe_time(evaluation, 103.0) == "0:05 left"  # 3 s for 96, so 160 more take 5 s
    assert describe(Phase("loading tiny-sd3")) == "loading tiny-sd3"
    assert describe_time(Phase("loading tiny-sd3", began=100.0), 163.0) == "1:03"
    assert describe_time(Phase("evaluation", 256, began=100.0), 104.0) == "0:04"  # nothing to extrapolate from
    assert describe(Phase("rollout", 8, 10)) == "rollout 8/8"
    continued = Phase("decoder", 1000, 510, before=500, began=100.0)
    assert describe_time(continued, 110.0) == "8:10 left"  # 10 of its own in 10 s, and 490 are left


def test_only_what_lasts_is_slow() -> None:
    phases = [Phase("evaluation", 256, began=100.0), Phase("reward ocr", began=101.5)]
    assert find_slow(phases, 102.9) == []
    assert find_slow(phases, 103.0) == phases[:1]
    assert find_slow(phases, 104.5) == phases


def test_the_line_fits_80_columns() -> None:
    assert render(PhaseLine()) == []
    assert render(PhaseLine(reserve=True)) == [""]
    with phase("evaluation", total=256) as evaluation:
        assert render(PhaseLine()) == []  # it has only begun
        evaluation.done = 96
        evaluation.began -= 60
        (line,) = render(PhaseLine())
        assert line.startswith("evaluation 96/256 ")
        assert line.endswith(" left")
        assert "1:40" in line
        assert line.count("━") >= 8  # 96/256 of 24
        assert len(line) <= 80
        with phase("a reward with a name that is far too long for a line of eighty columns", total=7) as scoring:
            scoring.began -= 60
            (line,) = render(PhaseLine())
            assert line.startswith("evaluation 96/256 · a reward")
            assert "…" in line
            assert len(line) <= 80


def test_a_log_gets_a_line_once_and_then_only_into_silence() -> None:
    lines = list[str]()
    log = PhaseLog(lines.append, patience=3.0, silence=30.0)
    with phase("rollout", total=8) as rollout:
        start = rollout.began
        log.tick(start + 2.9)
        assert lines == []
        log.tick(start + 3.0)
        rollout.done = 2
        log.tick(start + 4.0)
        log.tick(start + 32.0)
        assert lines == ["rollout 0/8   0:03"]
        log.tick(start + 33.0)
        assert lines[1:] == ["rollout 2/8   1:39 left"]
    with phase("rollout", total=8) as second:  # of the next step
        log.last = second.began
        log.tick(second.began + 4.0)
        assert len(lines) == 2
        with phase("reward ocr"):
            log.tick(second.began + 29.0)
            assert lines[2:] == ["rollout 0/8 · reward ocr   0:29"]


def test_plain_output_of_a_run_says_what_takes_long_and_other_lines_postpone_it() -> None:
    stream = io.StringIO()
    display = PlainDisplay(stream)
    with phase("evaluation", total=8) as evaluation:
        display.phases.tick(evaluation.began + PATIENCE)
        display.message("step 1/2")
        display.phases.tick(display.phases.last + 29.0)
    display.close()
    assert stream.getvalue().splitlines() == ["evaluation 0/8   0:03", "step 1/2"]


def test_the_panel_has_a_line_for_the_phase() -> None:
    stream = io.StringIO()
    display = LiveDisplay(Console(file=stream, force_terminal=True, width=80, color_system=None))
    display.start(RunFacts("quickstart", 40, 144))
    console = Console(file=io.StringIO(), width=80)

    def panel() -> list[str]:
        with console.capture() as captured:
            console.print(display.panel())
        return captured.get().splitlines()

    quiet = panel()
    with phase("evaluation", total=256) as evaluation:
        evaluation.done, evaluation.began = 96, time.monotonic() - 60
        busy = panel()
    display.close()
    assert len(quiet) == len(busy)  # the panel does not jump
    assert "evaluation 96/256" in busy[-2]
    assert "left" in busy[-2]
    assert quiet[-2].strip("│ ") == ""
    assert {len(line) for line in busy} == {80}


@pytest.mark.parametrize("terminal", [True, False])
def test_quick_work_shows_nothing(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stream(io.StringIO):
        def isatty(self) -> bool:
            return terminal

    monkeypatch.setenv("TERM", "xterm")
    stream = Stream()
    with show_phases(stream), phase("reading files", total=2):
        pass
    for control in ("\x1b[?25l", "\x1b[?25h", "\r", "\x1b[2K"):  # the cursor is hidden and comes back
        assert terminal or control not in stream.getvalue()
        stream = Stream(stream.getvalue().replace(control, ""))
    assert stream.getvalue() == ""
