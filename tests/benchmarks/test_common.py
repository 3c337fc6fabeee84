"""Gains of benchmarks over seeds, by hand, and the grouping of curves by recipe."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest

from benchmarks import common
from benchmarks.common import Bench, Job, gain, verdict


@dataclass(frozen=True)
class Marks:
    """A curve of two evaluations."""

    reward: np.ndarray
    stderr: np.ndarray

    @classmethod
    def of_run(cls, run: Path) -> Self:
        return cls(np.array([0.0, float((run / "seen").read_text())]), np.zeros(2))


def marks(before: float, after: float, *errors: float) -> Marks:
    return Marks(np.array([before, after]), np.array(errors))


def test_the_gain_of_several_seeds() -> None:
    """The error of one seed is √(9 + 16) = 5 hundredths, of the other √(25 + 144) = 13, of their mean √(25 + 169)/2."""
    first, second = marks(0.5, 0.6, 0.03, 0.04), marks(0.4, 0.7, 0.05, 0.12)
    assert gain([first]) == pytest.approx((0.1, 0.05))
    assert gain([first, second]) == pytest.approx((0.2, 194**0.5 / 200))


@pytest.mark.parametrize(
    ("after", "said"),
    [
        (0.609, "not improving in the budget"),
        (0.611, "improves"),
        (0.391, "not improving in the budget"),
        (0.389, "gets worse"),
    ],
)
def test_a_gain_counts_beyond_twice_its_error(after: float, said: str) -> None:
    assert verdict([marks(0.5, after, 0.055, 0.0)]) == said


def test_runs_are_grouped_by_recipe_and_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every run has a folder of its settings, so that runs of other settings are not confused with it."""
    started = list[str]()

    def run(command: list[str], **_: Any) -> None:
        place = Path(next(word for word in command if word.startswith("output_dir=")).partition("=")[2])
        started.append(place.name)
        place.mkdir(parents=True)
        (place / "seen").write_text(str(len(started)))
        (place / "summary.json").touch()

    monkeypatch.setattr(common.subprocess, "run", run)
    bench = Bench(tmp_path / "runs", tmp_path / "records", Marks)
    jobs = [Job("awm", "awm-0", ("seed=0",)), Job("nft", "nft-0", ("seed=0",)), Job("awm", "awm-1", ("seed=1",))]
    found = {name: [c.reward[-1] for c in curves] for name, curves in bench.by_recipe(jobs, 1).items()}
    assert found == {"awm": [1, 3], "nft": [2]}
    assert [c.reward[-1] for c in bench.curves(jobs, 1)] == [1, 2, 3]  # of records
    bench.curves([Job("awm", "awm-0", ("seed=0", "train.lr=1e-4"))], 1)
    assert len(set(started)) == 4
    assert all(name.startswith(("awm-", "nft-")) for name in started)
