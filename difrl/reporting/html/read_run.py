"""Reader of run folders, also of damaged ones. Everything that cannot be read becomes a sentence in `problems`.

A report matters most for a run that was killed or filled the disk, so no content of a file raises an error here.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

from difrl.config.yaml_source import ConfigError, parse
from difrl.reporting.html.image_frames import Frame, Picture, read_frames, read_picture
from difrl.reporting.html.text_tables import TextSamples, parse_text_samples, read_text_samples
from difrl.reporting.inference_defaults import InferenceDefaults, InferenceDefaultsError, read_inference_defaults
from difrl.reporting.summary import Change, changes
from difrl.runtime.errors import MissingFile

MetricsRow = dict[str, float]
AXES = ("step", "nfe", "minutes")


@dataclass(frozen=True)
class Sweep:
    """Content of rlg.json: series over guidance weights, the settings they share, and the samples."""

    weights: list[float]
    series: dict[str, list[float]]
    picture: Picture | None = None
    first_steps: int = 0
    adaptive: float | None = None
    texts: TextSamples | None = None
    """Texts at each weight."""


@dataclass
class RunRecord:
    """A run as the report shows it. Rows are in step order, each with "step", "nfe" and "minutes"."""

    name: str
    folder: Path
    rows: list[MetricsRow] = field(default_factory=list)
    config_text: str = ""
    config: dict[str, object] = field(default_factory=dict)
    frames: list[Frame] = field(default_factory=list)
    texts: list[TextSamples] = field(default_factory=list)
    sweep: Sweep | None = None
    defaults: InferenceDefaults | None = None
    summary: dict[str, object] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def metrics(self) -> list[str]:
        """Return the metric keys in order of appearance, without the axes."""
        return list(dict.fromkeys(key for row in self.rows for key in row if key not in AXES))

    def series(self, key: str, axis: str) -> tuple[list[float], list[float]]:
        """Return x and y of the rows that have both. A y that is not finite stays, as a gap."""
        pairs = [(row[axis], row[key]) for row in self.rows if key in row and math.isfinite(row[axis])]
        return [x for x, _ in pairs], [y for _, y in pairs]

    def evaluation(self, which: int) -> MetricsRow:
        """Return the first (0) or the last (-1) evaluation: from summary.json, or else from the rows."""
        saved = _numbers(self.summary.get("before" if which == 0 else "after"))
        if saved:
            return saved
        rows = [row for row in self.rows if any(key.startswith("eval/") for key in row)]
        return rows[which] if rows else {}

    def changes(self) -> list[Change]:
        """Return the changes from the first to the last evaluation, none without two of them."""
        first, last = self.evaluation(0), self.evaluation(-1)
        return changes(first, last) if first is not last else []

    def settings(self, section: str) -> dict[str, object]:
        """Return a section of config.yaml, empty if there is none."""
        found = self.config.get(section)
        return found if isinstance(found, dict) else {}

    @property
    def nfe_name(self) -> str:
        return "tokens generated" if self.settings("likelihood").get("kind") == "tokens" else "denoiser evaluations"

    @property
    def planned_steps(self) -> int | None:
        steps = self.settings("train").get("steps")
        return steps if isinstance(steps, int) else None


def read_run(folder: Path) -> RunRecord:
    """Read a run folder. Raise MissingFile if it does not exist; damaged files become problems of the record."""
    if not folder.is_dir():
        raise MissingFile(
            f"no run folder at {folder}; expected a folder with metrics.jsonl, as `difrl train` writes it"
        )
    run = RunRecord(folder.resolve().name, folder)
    run.rows = read_metrics_leniently(folder / "metrics.jsonl", run.problems)
    config = folder / "config.yaml"
    if config.is_file():
        run.config_text = config.read_text(encoding="utf-8", errors="replace")
        run.config = _parse_config(run.config_text, run.problems)
    else:
        run.problems.append("config.yaml is missing, so the settings of this run are not shown.")
    run.frames = read_frames(folder / "samples", run.problems)
    run.texts = read_text_samples(folder / "samples", run.problems)
    run.summary = _read_json(folder / "summary.json", run.problems)
    run.sweep = _read_sweep(folder, run.problems)
    try:
        run.defaults = read_inference_defaults(folder)
    except InferenceDefaultsError:
        run.problems.append("inference.json cannot be read; the run's default weight is not shown.")
    return run


def read_metrics_leniently(path: Path, problems: list[str]) -> list[MetricsRow]:
    """Return rows in step order. Steps that a resumed run repeated replace the earlier ones."""
    if not path.is_file():
        problems.append("metrics.jsonl is missing: the run stopped before its first step, or it was not copied.")
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    rows: dict[int, MetricsRow] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            value: object = json.loads(line)
        except ValueError:
            value = None
        if not isinstance(value, dict):
            last = number == len(lines)
            why = "is cut short, probably because the run was killed" if last else "is not a JSON object"
            problems.append(f"Line {number} of metrics.jsonl {why}; it is left out.")
            continue
        row = _numbers(value)
        if not math.isfinite(row.get("step", math.nan)):
            problems.append(f"Line {number} of metrics.jsonl has no step; it is left out.")
            continue
        step = int(row["step"])
        if rows and step < max(rows):
            rows = {earlier: kept for earlier, kept in rows.items() if earlier < step}
        rows.setdefault(step, {}).update(row)
    found = [rows[step] for step in sorted(rows)]
    _report_gaps(found, problems)
    return _with_axes(found)


def _numbers(values: object) -> MetricsRow:
    """Return the metrics of a JSON object, with null as NaN. Leave out anything that is not a number."""
    items = values.items() if isinstance(values, dict) else ()
    return {
        key: math.nan if value is None else float(value)
        for key, value in items
        if value is None or (isinstance(value, int | float) and not isinstance(value, bool))
    }


def _report_gaps(rows: list[MetricsRow], problems: list[str]) -> None:
    for key in ("loss", "grad_norm", "reward/mean"):
        steps = [int(row["step"]) for row in rows if key in row and not math.isfinite(row[key])]
        if steps:
            shown = ", ".join(str(step) for step in steps[:5]) + (", …" if len(steps) > 5 else "")
            problems.append(f"{key} is not a finite number at step {shown}.")


def _with_axes(rows: list[MetricsRow]) -> list[MetricsRow]:
    """Add nfe to rows that lack it, and minutes: the running sum of the seconds of all stages."""
    nfe, seconds = 0.0, 0.0
    known = any("nfe" in row for row in rows)
    for row in rows:
        seconds += sum(value for key, value in row.items() if key.startswith("time/") and math.isfinite(value))
        nfe = row.get("nfe", nfe)
        row["nfe"] = nfe if known else math.nan
        row["minutes"] = seconds / 60
    return rows


def _parse_config(text: str, problems: list[str]) -> dict[str, object]:
    try:
        value = parse(text, "config.yaml").data
    except ConfigError:
        problems.append("config.yaml is not valid YAML; it is shown as it is.")
        return {}
    return value if isinstance(value, dict) else {}


def _read_json(path: Path, problems: list[str]) -> dict[str, object]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError):
        problems.append(f"{path.name} is not valid JSON; it is left out.")
        return {}
    return value if isinstance(value, dict) else {}


def _read_sweep(folder: Path, problems: list[str]) -> Sweep | None:
    """Return rlg.json. A series whose length differs from that of the weights becomes a problem."""
    value = _read_json(folder / "rlg.json", problems)
    weights = value.get("weights")
    if not isinstance(weights, list) or not weights or not all(isinstance(one, int | float) for one in weights):
        return None
    series: dict[str, list[float]] = {}
    for key, numbers in value.items():
        if key == "weights" or not isinstance(numbers, list):
            continue
        if len(numbers) != len(weights):
            problems.append(f"rlg.json has {len(numbers)} values of {key} for {len(weights)} weights; left out.")
            continue
        series[key] = [float(one) if isinstance(one, int | float) else math.nan for one in numbers]
    name, texts = value.get("picture"), parse_text_samples(value.get("samples"))
    picture = read_picture(folder / name, problems) if isinstance(name, str) and texts is None else None
    order = sorted(range(len(weights)), key=lambda index: weights[index])
    return Sweep(
        [float(weights[index]) for index in order],
        {key: [numbers[index] for index in order] for key, numbers in series.items()},
        picture,
        int(_setting(value, "first_steps") or 0),
        _setting(value, "adaptive"),
        texts,
    )


def _setting(value: dict[str, object], key: str) -> float | None:
    found = value.get(key)
    return float(found) if isinstance(found, int | float) else None
