from __future__ import annotations

import dataclasses
import io
import json
import math
import re

import pytest
from rich.console import Console

from difrl.reporting import number_format as formats
from difrl.reporting.summary import Change, changes, suspicious
from difrl.reporting.terminal import (
    LiveDisplay,
    PlainDisplay,
    RunFacts,
    RunSummary,
    SilentDisplay,
    open_display,
    summary_table,
)
from difrl.reporting.terminal.history import History

FACTS = RunFacts("quickstart", steps=40, samples_per_step=144, details=("awm", "tiny-sd3"))
BEFORE = {"eval/reward/geneval": 0.45, "eval/reward/mean": 0.45, "eval/watch/judge": 0.7, "eval/diversity/dino": 0.4}
AFTER = {
    "eval/reward/geneval": 0.7,
    "eval/reward/geneval/stderr": 0.015,
    "eval/reward/mean": 0.7,
    "eval/reward/mean/stderr": 0.015,
    "eval/watch/judge": 0.71,
    "eval/watch/judge/stderr": 0.01,
    "eval/diversity/dino": 0.39,
    "eval/diversity/dino/stderr": 0.01,
}
SUMMARY = RunSummary(BEFORE, AFTER, 40, 65.0, 1.2e6, "runs/a/report.html", "runs/a/final.png", "runs/a/checkpoints/x")


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(("count", "text"), [(0, "0 steps"), (1, "1 step"), (2, "2 steps")])
def test_counts_have_the_number_of_their_noun(count: int, text: str) -> None:
    assert formats.pluralise(count, "step") == text


def train(display, steps: int = 12) -> None:
    """Send a short run to a display, with an evaluation before it and at every fifth step."""
    display.start(FACTS)
    display.evaluation({"step": 0, **BEFORE, "eval/reward/mean/stderr": 0.015})
    for step in range(1, steps + 1):
        display.step(
            {
                "step": step,
                "nfe": step * 2880,
                "reward/mean": 0.45 + 0.01 * step,
                "kl/base": 1e-3 * step,
                "time/rollout": 0.6,
                "time/score": 0.1,
                "time/update": 0.3,
            }
        )
        if step % 5 == 0:
            display.evaluation({"step": step, **AFTER})
    display.message("the disk is nearly full")


def on_screen(width: int = 80) -> tuple[LiveDisplay, io.StringIO]:
    stream = io.StringIO()
    return LiveDisplay(Console(file=stream, force_terminal=True, width=width, color_system=None)), stream


def panel(display: LiveDisplay) -> list[str]:
    """Return the panel alone, on a fresh console, because the live one adds cursor movements."""
    console = Console(file=io.StringIO(), width=display.console.width)
    with console.capture() as captured:
        console.print(display.panel())
    return captured.get().splitlines()


def test_numbers_are_short_and_unknown_ones_a_dash():
    values = (0.4567, 0.0, -0.05, 123.45, 12345.6, 1.2e-5, math.nan, math.inf)
    assert [formats.number(value) for value in values] == [
        "0.457",
        "0.000",
        "-0.050",
        "123.5",
        "1.2e+04",
        "1.2e-05",
        "-",
        "inf",
    ]
    assert [formats.signed(value) for value in (0.25, -0.25)] == ["+0.250", "-0.250"]
    assert [formats.count(value) for value in (999, 172800, 1.2345e6, 3e9)] == ["999", "172,800", "1.23 M", "3 G"]


def test_durations():
    assert [formats.duration(value) for value in (7, 247, 3753, math.nan)] == ["0:07", "4:07", "1:02:33", "-:--"]


def test_sparkline_by_hand():
    assert formats.sparkline([0, 7], 10) == "▁█"
    assert formats.sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
    assert formats.sparkline([0, 0, 7, 7], 2) == "▁█"
    assert formats.sparkline([1, math.nan, 1], 3) == "▁ ▁"
    assert formats.sparkline([], 5) == formats.sparkline([1.0], 0) == ""


def test_trend_is_a_slope_beyond_two_standard_errors():
    assert formats.trend([1, 2, 3, 4]) == formats.RISING
    assert formats.trend([4, 3, 2, 1]) == formats.FALLING
    assert formats.trend([1, 2, 1, 2, 1, 2, 1, 2]) == formats.LEVEL
    assert formats.trend([1, 2, 3]) == formats.LEVEL
    assert formats.trend([5, 5, 5, 5]) == formats.LEVEL
    # slope 2.8 / 5 = 0.56; residuals squared sum to 1.512, so its standard error is sqrt(1.512 / 2 / 5) = 0.389
    assert formats.trend([0, 2, 1, 2.2]) == formats.LEVEL


def test_time_left_counts_evaluations_and_speed_does_not():
    clock = Clock()
    history = History(RunFacts("a", steps=10, samples_per_step=50), clock)
    clock.now = 100.0
    history.record_evaluation({"step": 0, "eval/reward/mean": 0.5})
    for step in (1, 2):
        clock.now += 3.0
        history.record({"step": step, "reward/mean": 0.5, "time/rollout": 1.5, "time/update": 1.0})
    assert history.step_seconds() == pytest.approx(3.0)
    assert history.seconds_left() == pytest.approx(24.0)
    assert history.samples_per_second() == pytest.approx(50 / 2.5)


def test_a_resumed_run_counts_from_where_it_was():
    history = History(RunFacts("a", steps=10, samples_per_step=1, first_step=6), Clock())
    history.record({"reward/mean": 0.5})
    assert history.step == 7


def test_live_panel_fits_eighty_columns_and_shows_everything():
    display, _ = on_screen()
    train(display)
    lines = panel(display)
    display.close()
    assert {len(line) for line in lines} == {80}
    text = "\n".join(lines)
    for part in ("quickstart", "step 12/40", "left", "0.570", "evaluation ", "0.700 ± 0.015", "+0.250", "judge"):
        assert part in text
    assert "…" not in text
    assert "watched, +0.010 " in text
    for part in ("KL to base", "0.012", "144.0 samples/s", "rollout 60%", "awm · tiny-sd3", "↗", "█"):
        assert part in text


@pytest.mark.parametrize("width", [40, 60, 200])
def test_live_panel_never_wraps(width):
    display, _ = on_screen(width)
    train(display)
    assert {len(line) for line in panel(display)} == {width}
    display.close()


def test_live_panel_before_the_first_step():
    display, _ = on_screen()
    display.start(FACTS)
    assert "waiting for the first step" in "\n".join(panel(display))
    display.close()


def test_the_clock_of_the_panel_runs_on_after_the_last_step():
    """The sweep and the report follow, and they take time."""
    display, _ = on_screen()
    train(display, steps=FACTS.steps)
    display.bar.tasks[0].start_time -= 106
    display.close()
    assert re.search(r"left · 1:[45]\d", panel(display)[1])


def test_live_display_restores_the_terminal_after_an_error():
    display, stream = on_screen()
    display.start(FACTS)
    display.close()
    display.close()
    assert stream.getvalue().endswith("\x1b[?25h")  # the cursor is shown again


def test_live_display_ends_with_the_summary():
    display, stream = on_screen()
    train(display)
    display.finish(SUMMARY)
    text = stream.getvalue()
    assert "the disk is nearly full" in text
    assert "runs/a/report.html" in text


def test_names_are_not_interpreted_as_markup():
    display, _ = on_screen()
    display.start(RunFacts("[red]run[/red]", 2, 1, ("[bold]x",)))
    display.evaluation({"step": 0, "eval/watch/[odd]": 0.5})
    text = "\n".join(panel(display))
    display.close()
    assert "[red]run[/red]" in text
    assert "[odd]" in text


def test_plain_lines_are_aligned_and_hold_no_control_characters():
    stream = io.StringIO()
    display = PlainDisplay(stream)
    train(display)
    display.finish(SUMMARY)
    text = stream.getvalue()
    assert all(character == "\n" or character.isprintable() for character in text)
    steps = [line for line in text.splitlines() if line.startswith("step")]
    assert len(steps) == 12
    assert len({len(line) for line in steps}) == 1
    assert len({line.index("samples/s") for line in steps}) == 1
    assert "eval 10/40   evaluation 0.700 ± 0.015   judge 0.710 ± 0.010" in text
    assert "report   runs/a/report.html" in text


def test_another_metric_may_represent_the_reward():
    """This holds in both displays, for rollouts and for evaluations; the sum of 0 is not shown."""
    stream = io.StringIO()
    live, _ = on_screen()
    for display in (PlainDisplay(stream), live):
        display.start(dataclasses.replace(FACTS, reward="reward/math"))
        display.evaluation({"step": 0, "eval/reward/mean": 0.0, "eval/reward/math": 0.25})
        display.step({"step": 1, "reward/mean": 0.0, "reward/math": 0.5})
    text = "\n".join(panel(live))
    live.close()
    assert "evaluation 0.250" in stream.getvalue()
    assert "reward math   0.500" in stream.getvalue()
    assert "0.000" not in stream.getvalue() + text
    assert "reward math 0.500" in " ".join(text.split())


def test_plain_lines_survive_a_stream_that_is_not_unicode():
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    display = PlainDisplay(stream)
    train(display)
    display.message("naïve → ok")
    display.finish(SUMMARY)
    stream.seek(0)
    text = stream.read()
    assert "0.700 +/- 0.015" in text
    assert "na?ve > ok" in text


def test_open_display_looks_at_the_stream():
    for stream, plain, kind in (
        (io.StringIO(), None, PlainDisplay),
        (None, False, LiveDisplay),
        (None, True, PlainDisplay),
    ):
        display = open_display(stream, plain)
        display.close()
        assert isinstance(display, kind)


def test_silent_display_accepts_everything():
    display = SilentDisplay()
    train(display)
    display.finish(SUMMARY)
    display.close()


def test_a_display_that_was_not_started_raises():
    with pytest.raises(RuntimeError, match="before start"):
        PlainDisplay(io.StringIO()).step({"step": 1})


def test_changes_pair_what_both_evaluations_have():
    found = changes(BEFORE, AFTER)
    assert [(change.name, change.role) for change in found] == [
        ("geneval", "trained"),
        ("judge", "watched"),
        ("dino", "diversity"),
    ]
    assert found[0].difference == pytest.approx(0.25)
    assert [change.name for change in changes(BEFORE, {**AFTER, "eval/reward/mean": 0.8})][:2] == ["mean", "geneval"]
    assert changes({}, AFTER) == []


def test_standard_errors_may_come_from_the_side():
    (change,) = changes({"eval/reward/x": 0.1}, {"eval/reward/x": 0.2}, {"eval/reward/x": 0.03})
    assert change.after_stderr == 0.03


def test_direction_needs_two_standard_errors_of_the_difference():
    assert Change("eval/reward/x", "trained", 0.5, 0.6, 0.03, 0.04).direction == 0  # 0.1 against 2 · 0.05
    assert Change("eval/reward/x", "trained", 0.5, 0.61, 0.03, 0.04).direction == 1
    assert Change("eval/reward/x", "trained", 0.5, 0.4).direction == -1
    assert Change("eval/reward/x", "trained", 0.5, math.nan).direction == 0


def test_suspicious_is_a_fall_while_the_reward_rose():
    rose = Change("eval/reward/x", "trained", 0.4, 0.7, 0.01, 0.01)
    fell = Change("eval/watch/y", "watched", 0.7, 0.5, 0.01, 0.01)
    thinner = Change("eval/diversity/z", "diversity", 0.4, 0.35, 0.001, 0.001)
    collapsed = Change("eval/diversity/z", "diversity", 0.4, 0.2, 0.001, 0.001)
    assert suspicious([rose, fell, thinner]) == [fell]
    assert suspicious([rose, collapsed]) == [collapsed]
    assert suspicious([fell]) == []


def test_summary_table_shows_before_after_and_error():
    console = Console(file=io.StringIO(), width=100)
    with console.capture() as captured:
        console.print(summary_table(BEFORE, AFTER))
    lines = captured.get().splitlines()
    (geneval,) = (line for line in lines if "geneval" in line)
    assert geneval.split() == ["geneval", "trained", "0.450", "→", "0.700", "±", "0.015", "+0.250"]


def test_summary_json_has_no_nan():
    text = RunSummary({"eval/reward/x": math.nan}, AFTER, 3).to_json()
    value = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert value["before"] == {"eval/reward/x": None}
    assert value["seconds"] is None
    assert value["after"] == AFTER
