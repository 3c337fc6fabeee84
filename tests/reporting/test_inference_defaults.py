"""The default guidance of a run is written, read and checked for damage."""

from __future__ import annotations

from pathlib import Path

import pytest

from difrl.reporting.inference_defaults import InferenceDefaults, InferenceDefaultsError, read_inference_defaults


def test_what_is_written_is_read(tmp_path: Path) -> None:
    assert read_inference_defaults(tmp_path) is None
    for defaults in (InferenceDefaults(1.5, 2, 0.99, "highest judge of 9 weights"), InferenceDefaults(0.5)):
        assert defaults.write(tmp_path) == tmp_path / "inference.json"
        assert read_inference_defaults(tmp_path) == defaults
    assert [path.name for path in tmp_path.iterdir()] == ["inference.json"]


def test_a_file_with_the_weight_alone_is_enough(tmp_path: Path) -> None:
    (tmp_path / "inference.json").write_text('{"rlg": 2}')
    assert read_inference_defaults(tmp_path) == InferenceDefaults(2.0)


@pytest.mark.parametrize("text", ["{", "[1]", '{"rgl": 2}', '{"rlg": "two"}', '{"rlg": null}'])
def test_a_damaged_file_is_an_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "inference.json").write_text(text)
    with pytest.raises(InferenceDefaultsError, match=r"inference\.json cannot be read .*--write-default 1\.5"):
        read_inference_defaults(tmp_path)
