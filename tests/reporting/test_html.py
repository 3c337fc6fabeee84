from __future__ import annotations

import json
import math
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from difrl.reporting.html import write_report
from difrl.reporting.html.axes import Scale, tick_labels, ticks
from difrl.reporting.html.charts import Line, line_chart, smoothing_window, stacked_chart
from difrl.reporting.html.glossary import DEFINITIONS, definition, entries
from difrl.reporting.html.image_frames import MOST_FRAMES, read_frames
from difrl.reporting.html.read_run import read_metrics_leniently, read_run

VOID = {"meta", "img", "input", "br", "link"}
CONFIG = """# expanded
algorithm: awm
output_dir: {name}
model: {{path: tiny-sd3, train: lora}}
anchors:
  - to: base
    coefficient: {coefficient}
train:
  steps: 20
"""


def evaluation(step: int, gain: float) -> dict[str, float]:
    reward = 0.45 + gain * step / 20
    return {
        "eval/reward/geneval": reward,
        "eval/reward/geneval/stderr": 0.015,
        "eval/reward/mean": reward,
        "eval/reward/mean/stderr": 0.015,
        "eval/watch/judge": 0.7,
        "eval/watch/judge/stderr": 0.01,
        "eval/diversity/dino": 0.4,
        "eval/diversity/dino/stderr": 0.01,
    }


def rows(steps: int = 20, gain: float = 0.25) -> list[dict[str, float]]:
    found: list[dict[str, float]] = [{"step": 0, "nfe": 0, **evaluation(0, gain)}]
    for step in range(1, steps + 1):
        reward = 0.45 + gain * step / 20
        row = {"step": step, "nfe": step * 1440, "reward/mean": reward, "reward/geneval": reward}
        row |= {"watch/judge": 0.7, "diversity/dino": 0.4, "kl/base": 1e-4 * step**2, "kl/ema": 1e-3}
        row |= {"ratio/mean": 1.0, "ratio/std": 0.01, "clip/high": 0.02, "clip/low": 0.01, "groups/zero_std": 0.1}
        row |= {"grad_norm": 0.5, "loss": 0.01, "lr": 1e-4 * step, "surprise/value": 3.0}
        row |= {"time/rollout": 2.0, "time/score": 0.5, "time/update": 1.5}
        found.append(row | (evaluation(step, gain) if step % 10 == 0 else {}))
    return found


def write_run(folder: Path, gain: float = 0.25, coefficient: float = 1.0) -> Path:
    """Write a complete run folder, like `difrl train`."""
    (folder / "samples").mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(gain=gain)))
    (folder / "config.yaml").write_text(CONFIG.format(name=folder.name, coefficient=coefficient))
    for step in (0, 10, 20):
        Image.new("RGB", (60, 40), (step * 10, 90, 90)).save(folder / "samples" / f"step-{step:06d}.png")
        notes = {"prompts": ["a <red> circle"], "columns": 2, "scores": [[step / 20, None]]}
        (folder / "samples" / f"step-{step:06d}.json").write_text(json.dumps(notes))
    Image.new("RGB", (60, 40)).save(folder / "rlg.png")
    sweep = {
        "weights": [0, 1, 2],
        "reward/geneval": [0.45, 0.7, 0.72],
        "reward/geneval/stderr": [0.01, 0.01, 0.01],
        "watch/judge": [0.7, 0.71, 0.6],
        "divergence/base": [0, 0.1, 0.4],
        "cost/evaluations": [10, 10, 17.5],
        "cost/saved": [0, 0, 2.5],
        "first_steps": 0,
        "adaptive": None,
        "picture": "rlg.png",
    }
    (folder / "rlg.json").write_text(json.dumps(sweep))
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "quickstart")


class Checker(HTMLParser):
    """Parser that collects references and ids, and asserts that every tag is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.references: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "srcset", "data"):
                self.references.append(value)
            if name == "id":
                self.ids.append(value)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def page_of(runs: list[Path], out: Path) -> str:
    """Write a page, check that it is well formed and self-contained, and return it."""
    text = write_report(runs, out).read_text(encoding="utf-8")
    checker = Checker()
    checker.feed(text)
    assert checker.open == []
    assert len(set(checker.ids)) == len(checker.ids)
    for reference in checker.references:
        assert reference.startswith(("data:image/", "#"))
    assert "url(" not in text
    assert "@import" not in text
    for drawing in re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL):
        ElementTree.fromstring(drawing)
    assert not re.search(r'"[^"]*\bnan\b[^"]*"', re.sub(r"data:image[^\"]*", "", text), flags=re.IGNORECASE)
    return text


def test_report_shows_every_part_of_a_run(run, tmp_path):
    text = page_of([run], tmp_path / "out.html")
    for part in ("quickstart", "awm", "LoRA", "20 steps", "28,800 denoiser evaluations", "1:20 of training"):
        assert part in text
    for part in ("<span>0.450</span><span>→</span><b>0.700</b>", "± 0.015", "+0.250", "rose", "no clear change"):
        assert part in text
    titles = re.findall(r"<h3>(.*?)</h3>", text)
    for title in ("Reward", "Watched, never optimised", "Divergence from anchors", "Diversity within a prompt"):
        assert title in titles
    for title in ("Ratio to the sampling policy", "Shares without gradient", "Gradient norm", "Where the time goes"):
        assert title in titles
    assert "surprise" in titles  # every logged metric is shown
    assert text.count("data:image/png") == 4
    assert "step <b>10</b> · mean score <b>0.500</b>" in text
    assert "a &lt;red&gt; circle" in text
    assert "geneval is highest at w = 2 (<b>0.720</b>); judge (watched) is highest at w = 1" in text
    assert '<span class="key">algorithm</span>: awm' in text
    assert "Worth knowing" not in text


def test_each_chart_is_drawn_against_every_axis(run, tmp_path):
    text = page_of([run], tmp_path / "out.html")
    for axis in ("step", "nfe", "minutes"):
        assert text.count(f'class="by by-{axis}"') == text.count('data-axes="step nfe minutes"')


def test_a_truncated_last_line_is_a_problem_on_the_page(run, tmp_path):
    path = run / "metrics.jsonl"
    path.write_text(path.read_text()[:-40])
    text = page_of([run], tmp_path / "out.html")
    assert "Line 21 of metrics.jsonl is cut short" in text
    assert "19 of 20 steps" in text


def test_damaged_files_are_problems_on_the_page(run, tmp_path):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    lines[3] = "not json"
    lines[4] = '["a list"]'
    lines[5] = '{"reward/mean": 0.5}'
    lines[6] = '{"step": 6, "loss": NaN, "grad_norm": null, "reward/mean": "high"}'
    (run / "metrics.jsonl").write_text("\n".join([*lines, ""]))
    (run / "samples" / "step-000010.png").write_bytes(b"\x89PNG\r\n\x1a\n truncated")
    (run / "samples" / "step-000020.json").write_text("[1, 2]")
    (run / "rlg.json").write_text('{"weights": [0, 1], "reward/geneval": [0.5], "watch/judge": [0.5, null]}')
    (run / "summary.json").write_text("{")
    (run / "config.yaml").write_text("a: [1")
    text = page_of([run], tmp_path / "out.html")
    for problem in (
        "Line 4 of metrics.jsonl is not a JSON object",
        "Line 5 of metrics.jsonl is not a JSON object",
        "Line 6 of metrics.jsonl has no step",
        "loss is not a finite number at step 6.",
        "grad_norm is not a finite number at step 6.",
        "step-000010.png is missing or damaged",
        "step-000020.json is not a valid description of a sample grid",
        "rlg.json has 1 values of reward/geneval for 2 weights",
        "summary.json is not valid JSON",
        "config.yaml is not valid YAML",
    ):
        assert problem in text


def test_an_empty_run_folder_gives_a_page(tmp_path):
    (tmp_path / "new").mkdir()
    text = page_of([tmp_path / "new"], tmp_path)
    assert "metrics.jsonl is missing" in text
    assert "0 steps" in text


def test_a_single_step_gives_a_page(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "metrics.jsonl").write_text('{"step": 1, "reward/mean": 0.5, "kl/base": 0.0}\n')
    assert "this run has no two evaluations" in page_of([tmp_path / "one"], tmp_path).replace("\n", " ")


def test_without_evaluations_the_headline_is_the_rollout_reward(run, tmp_path):
    kept = [{key: value for key, value in row.items() if not key.startswith("eval/")} for row in rows()]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    text = page_of([run], tmp_path / "out.html")
    assert "<b>0.694</b>" in text  # mean of the last two of twenty steps: (0.6875 + 0.7) / 2
    assert "first and the last tenth" in text


def test_summary_json_takes_precedence(run, tmp_path):
    before, after = {"eval/reward/geneval": 0.11}, {"eval/reward/geneval": 0.99}
    (run / "summary.json").write_text(json.dumps({"before": before, "after": after}))
    assert "<span>0.110</span><span>→</span><b>0.990</b>" in page_of([run], tmp_path / "out.html")


def test_a_fall_of_the_watched_reward_is_a_warning(run, tmp_path):
    changed = [row | ({"eval/watch/judge": 0.5} if row["step"] == 20 else {}) for row in rows()]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in changed))
    assert "judge fell while the trained reward rose" in page_of([run], tmp_path / "out.html")


def test_several_runs_are_compared(run, tmp_path):
    other = write_run(tmp_path / "other", gain=0.05, coefficient=0.3)
    text = page_of([run, other], tmp_path / "both.html")
    assert "2 runs" in text
    assert "<code>anchors.0.coefficient</code></th><td>1.0</td><td>0.3</td>" in text
    assert "<code>output_dir</code>" not in text
    assert 'href="#run-quickstart"' in text
    assert 'id="run-other"' in text
    assert "Last samples" in text


def test_runs_of_the_same_name_show_their_folders(tmp_path):
    runs = [write_run(tmp_path / parent / "quickstart") for parent in ("a", "b")]
    text = page_of(runs, tmp_path)
    assert 'id="run-a/quickstart"' in text
    assert 'id="run-b/quickstart"' in text
    assert "The settings of these runs are the same" in text


def test_names_cannot_break_the_page(tmp_path):
    folder = write_run(tmp_path / "<b>&\"x'")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 21, "reward/mean": 0.5, "kl/<script>": 0.5}) + "\n")
    page_of([folder], tmp_path / "out.html")


def test_out_may_be_a_folder_and_gets_no_other_file(run, tmp_path):
    out = tmp_path / "made"
    out.mkdir()
    assert write_report([run], out) == out / "report.html"
    assert [path.name for path in out.iterdir()] == ["report.html"]


def test_missing_runs_are_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="no run folder at"):
        write_report([tmp_path / "absent"], tmp_path)
    with pytest.raises(ValueError, match="no run folders were given"):
        write_report([], tmp_path)


def test_repeated_steps_of_a_resumed_run_replace_earlier_ones(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [{"step": step, "reward/mean": step} for step in (1, 2, 3, 4)]
    lines += [{"step": 3, "reward/mean": 30}, {"step": 3, "eval/reward/mean": 0.5}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = read_metrics_leniently(path, [])
    assert [row["step"] for row in found] == [1, 2, 3]
    assert found[-1]["reward/mean"] == 30
    assert found[-1]["eval/reward/mean"] == 0.5


def test_minutes_are_the_running_sum_of_the_stages(run):
    assert read_run(run).series("reward/mean", "minutes")[0][-1] == pytest.approx(20 * 4.0 / 60)


def test_many_frames_are_thinned_but_keep_both_ends(tmp_path):
    for step in range(40):
        Image.new("RGB", (4, 4)).save(tmp_path / f"step-{step:06d}.png")
    frames = read_frames(tmp_path, [])
    assert len(frames) == MOST_FRAMES
    assert (frames[0].step, frames[-1].step) == (0, 39)


def test_large_pictures_are_converted(tmp_path):
    Image.effect_noise((2400, 600), 90).convert("RGB").save(tmp_path / "step-000001.png")
    (frame,) = read_frames(tmp_path, [])
    assert frame.picture.uri.startswith("data:image/jpeg")
    assert (frame.picture.width, frame.picture.height) == (2000, 500)


def test_ticks_are_round_and_inside():
    assert ticks(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert ticks(0.43, 0.78) == pytest.approx([0.5, 0.6, 0.7])
    assert ticks(0, 3, most=6, whole=True) == [0, 1, 2, 3]
    assert [label for _, label in Scale(1e-3, 2.0, 0, 1, log=True).ticks()] == ["0.001", "0.01", "0.1", "1"]


def test_tick_labels_distinguish_neighbours():
    assert tick_labels([0, 0.25, 0.5]) == ["0.00", "0.25", "0.50"]
    assert tick_labels([0.9995, 1.0, 1.0005]) == ["0.9995", "1.0000", "1.0005"]
    assert tick_labels([0, 50_000, 100_000]) == ["0", "50k", "100k"]
    assert tick_labels([0, 2_500_000]) == ["0", "2.5M"]
    assert tick_labels([0, 1e-4, 2e-4]) == ["0", "1.0e-4", "2.0e-4"]
    assert tick_labels([]) == []


def test_scale_by_hand():
    assert Scale(0, 10, 100, 200)(2.5) == 125
    assert Scale(1, 100, 0, 1, log=True)(10) == pytest.approx(0.5)


def points(svg: str, name: str) -> list[tuple[float, float]]:
    (path,) = re.findall(rf'<path class="{name}" d="([^"]*)"', svg)
    return [(float(x), float(y)) for x, y in re.findall(r"[ML]([\d.]+) ([\d.]+)", path)]


def test_unknown_values_interrupt_a_line():
    svg = line_chart([Line("k", "k", [0, 1, 2, 3, 4], [0, 1, math.nan, 1, 0])], "step")
    (path,) = re.findall(r'<path class="line c1" d="([^"]*)"', svg)
    assert [part[0] for part in re.findall(r"[ML][\d.]+", path)] == ["M", "L", "M", "L"]


def test_a_noisy_series_gets_its_running_mean():
    values = [float(step % 2) for step in range(40)]
    svg = line_chart([Line("k", "k", [float(step) for step in range(40)], values)], "step")
    raw, mean = points(svg, "raw c1"), points(svg, "line c1")
    reach = max(y for _, y in raw) - min(y for _, y in raw)
    inner = [y for _, y in mean[5:-5]]
    assert max(inner) - min(inner) < 0.4 * reach
    assert [smoothing_window(size) for size in (30, 60, 100, 400)] == [3, 7, 11, 25]


def test_a_chart_without_numbers_is_empty():
    assert line_chart([], "step") == ""
    assert line_chart([Line("k", "k", [0, 1], [math.nan, math.inf])], "step") == ""
    assert stacked_chart([], "step") == ""


def test_flat_and_single_values_are_drawn():
    for values in ([0.0], [1.0, 1.0], [-3.0, -3.0]):
        x = [float(index) for index in range(len(values))]
        ElementTree.fromstring(line_chart([Line("k", "k", x, values)], "step", log=True))


def test_long_series_are_binned():
    x = [float(step) for step in range(5000)]
    svg = line_chart([Line("k", "k", x, x)], "step")
    assert len(points(svg, "line c1")) == 400


def test_stacked_areas_add_up():
    x = [0.0, 1.0]
    svg = stacked_chart([Line("a", "a", x, [1, 1], 1), Line("b", "b", x, [2, math.nan], 2)], "step")
    first, second = points(svg, "area c1"), points(svg, "area c2")
    zero = max(y for _, y in first)
    unit = zero - min(y for _, y in first)
    assert zero - second[0][1] == pytest.approx(3 * unit, abs=0.2)
    assert second[1][1] == pytest.approx(first[1][1], abs=0.2)


def test_every_metric_of_the_run_folder_has_one_definition():
    for key in {key for row in rows() for key in row} - {"surprise/value"}:
        assert definition(key), key
    assert definition("surprise/value") == ""
    assert entries(["kl/base", "kl/ema", "eval/reward/mean/stderr"]) == [
        ("kl/*", DEFINITIONS["kl/*"]),
        ("*/stderr", DEFINITIONS["*/stderr"]),
    ]


def test_the_sweep_marks_peaks_and_the_default(run, tmp_path):
    """A ring marks the peak of the watched reward, and a rule the default weight."""
    text = page_of([run], tmp_path / "out.html")
    assert text.count('class="ring') == 1
    assert "judge (watched) is highest at w = 1 (<b>0.710</b>)" in text
    assert "Divergence from base" in text
    assert "by default" not in text
    assert "Evaluations a sample" not in text  # without adaptive guidance it is 1 or 2 a step
    (run / "inference.json").write_text('{"rlg": 1.0, "why": "highest judge of 3 weights"}')
    text = page_of([run], tmp_path / "out.html")
    assert ">trained, default</text>" in text
    assert "The run is sampled at w = 1 by default (highest judge of 3 weights)." in text
    (run / "inference.json").write_text("{")
    assert "inference.json cannot be read" in page_of([run], tmp_path / "out.html")


def test_the_sweep_shows_its_settings(run, tmp_path):
    sweep = json.loads((run / "rlg.json").read_text())
    (run / "rlg.json").write_text(json.dumps({**sweep, "first_steps": 3, "adaptive": 0.99}))
    text = page_of([run], tmp_path / "out.html")
    assert "The first 3 steps are at w = 1. Adaptive guidance ended at a cosine of 0.99." in text
    assert "Evaluations a sample" in text
