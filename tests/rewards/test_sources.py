"""A mistyped local folder is not looked for on the hub."""

from __future__ import annotations

from pathlib import Path

import pytest

from rewards.sources import explain_missing, resolve_source


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models/sd3").mkdir(parents=True)
    (tmp_path / "cache/models--models--fetched").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("source", "near"),
    [
        ("./models/sd3x", "./models/sd3"),
        ("models/sd3x", "models/sd3"),
        ("models/sd3x/unet", "models/sd3"),
        ("~/models/sd33", "/models/sd3"),
        ("model", "models"),
        ("tiny-sd33", "tiny-sd3"),
        ("/abs/nowhere", None),
        ("C:\\here\\sd3", None),
        ("models/foo/bar", None),
        ("x" * 300, None),
        ("", None),
    ],
)
def test_a_mistyped_path(source: str, near: str | None) -> None:
    problem = explain_missing(source, ["tiny-sd3"])
    assert problem is not None
    assert problem.startswith(f"no folder {source!r}")
    assert ("did you mean" in problem) == (near is not None)
    assert near is None or f"{near}'?" in problem
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        resolve_source(source)


def test_local_folders_and_hub_ids() -> None:
    assert [explain_missing(name) for name in ("stabilityai/sd-3.5", "a/b_c.d", "models/fetched")] == [None] * 3
    assert resolve_source("stabilityai/sd-3.5") == "stabilityai/sd-3.5"
    assert resolve_source("models/sd3") == "models/sd3"
    assert resolve_source("~/models/sd3") == str(Path.cwd() / "models/sd3")
