"""A run's default weight: written, read, and told apart from a damaged file."""

from __future__ import annotations

from pathlib import Path

import pytest

from difrl.reporting.inference_defaults import Chosen, ChosenError, read_chosen


def test_what_is_written_is_read(tmp_path: Path) -> None:
    assert read_chosen(tmp_path) is None
    for chosen in (Chosen(1.5, 2, 0.99, "highest judge of 9 weights"), Chosen(0.5)):
        assert chosen.write(tmp_path) == tmp_path / "inference.json"
        assert read_chosen(tmp_path) == chosen
    assert [path.name for path in tmp_path.iterdir()] == ["inference.json"]


def test_a_file_by_hand_may_name_the_weight_alone(tmp_path: Path) -> None:
    (tmp_path / "inference.json").write_text('{"rlg": 2}')
    assert read_chosen(tmp_path) == Chosen(2.0)


@pytest.mark.parametrize("text", ["{", "[1]", '{"rgl": 2}', '{"rlg": "two"}', '{"rlg": null}'])
def test_a_damaged_file_is_told(tmp_path: Path, text: str) -> None:
    (tmp_path / "inference.json").write_text(text)
    with pytest.raises(ChosenError, match=r"inference\.json cannot be read .*--write-default 1\.5"):
        read_chosen(tmp_path)
