"""A resumed run ends as if it had not been interrupted although parts are built at their first use, and draw for it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from difrl.reporting.terminal import SilentDisplay
from difrl.reporting.trackers import register_tracker
from difrl.scoring import diversity
from difrl.training import checkpoint
from difrl.training import run as running
from rewards import Scores
from tests.fakes import Moody
from tests.recipes import text_recipe
from tests.training.test_run import UNSEEN, Killed, assert_same, dies, results, small, train


class LazyMoody(Moody):
    """Builds a random network at its first call, and adds random numbers at every call."""

    network: torch.nn.Module | None = None

    def __call__(self, samples: Any, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Scores:
        if self.network is None:
            self.network = torch.nn.Linear(3, 1)
        scores = super().__call__(samples, prompts, metadata)
        return Scores(scores.values + self.network(samples.mean(dim=(2, 3)))[:, 0], scores.valid)


def features(images: torch.Tensor) -> torch.Tensor:
    """Features by a random network, which is built at the first call."""
    if not hasattr(features, "network"):
        features.network = torch.nn.Linear(3, 2)  # type: ignore[attr-defined]
    return features.network(images.mean(dim=(2, 3)))  # type: ignore[attr-defined,no-any-return]


class Drawing:
    """A tracker that draws a random name for itself."""

    def __init__(self, *_: Any) -> None:
        torch.rand(3)

    def write(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


register_tracker("drawing", Drawing)

LAZY = {"import": "tests.training.test_lazy_parts:LazyMoody"}
MOODY = {"import": "tests.fakes:Moody"}
CASES: dict[str, dict[str, Any]] = {
    "a trained reward": {"rewards": [LAZY], **UNSEEN},
    "the judge is watched": {"rewards": [MOODY], "watch": [{"name": "judge"}]},
    "a watched reward": {"rewards": [MOODY], "watch": [LAZY]},
    "diversity": {"rewards": [MOODY], "eval": {"diversity": ["judge", "tests.training.test_lazy_parts:features"]}},
    "a tracker": {"rewards": [MOODY], "trackers": ["drawing"], **UNSEEN},
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_with_a_lazy_part_is_resumed_with_the_same_bytes(
    sd3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    """Killed after the checkpoint of step 1, before and after which parts are built."""

    def start(config: Any, *, resume: bool = False) -> Path:
        diversity._load_judge.cache_clear()  # as in a process of its own
        vars(features).pop("network", None)
        torch.manual_seed(99 if resume else 98)
        return train(config, resume=resume)

    expected = results(start(small(sd3, tmp_path / "whole", **CASES[case])))
    config = small(sd3, tmp_path / "run", **CASES[case])
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "save", dies(checkpoint.save, 1, done=True))
        with pytest.raises(Killed):
            start(config)
    assert [checkpoint.parse_step(place) for place in checkpoint.find_all(config.output_dir)] == [1]
    assert_same(results(start(config, resume=True)), expected)


def model_files(run: Path) -> dict[str, bytes]:
    """Return the files of the saved model; of the weights, whose header may list them in any order, the names."""
    files = [path for path in sorted((run / "model").rglob("*")) if path.is_file()]
    found = {}
    for path in files:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as tensors:
                found[str(path.relative_to(run))] = repr(sorted(tensors.keys())).encode()
        else:
            found[str(path.relative_to(run))] = path.read_bytes()
    return found


@pytest.mark.parametrize("texts", [False, True], ids=["images", "texts"])
def test_the_saved_model_does_not_depend_on_when_the_run_was_killed(
    sd3: Path, lm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, texts: bool
) -> None:
    """Killed after its last checkpoint: the resumed run saves the model without a step of its own."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("1+2=\n30+4=\n2+2=\n17+5=\n")

    def config(name: str) -> Any:
        if texts:
            return text_recipe(lm, tmp_path / name, data={"evaluation": "prompts.txt"}, train={"steps": 2})
        return small(sd3, tmp_path / name, train={"steps": 2})

    running.train(config("whole"), display=SilentDisplay())
    expected = model_files(tmp_path / "whole")
    with monkeypatch.context() as patched:
        patched.setattr(running.Run, "_finish", dies(running.Run._finish, 1))
        with pytest.raises(Killed):
            running.train(config("run"), display=SilentDisplay())
    running.train(config("run"), resume=True, display=SilentDisplay())
    assert model_files(tmp_path / "run") == expected
    original = {path.name: path.read_bytes() for path in (lm if texts else sd3).rglob("tokenizer.json")}
    assert original["tokenizer.json"]
    for path in (tmp_path / "run" / "model").rglob("tokenizer.json"):
        found, before = json.loads(path.read_text()), json.loads(original["tokenizer.json"])
        assert (found["padding"], found["truncation"]) == (before["padding"], before["truncation"])
