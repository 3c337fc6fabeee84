"""Every file of a run folder with five kinds of damage: a resumed run ends with the same bytes, or says what is wrong."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from difrl.config import RunConfig
from difrl.runtime.errors import UserError
from difrl.training import checkpoint
from difrl.training import run as running
from tests.reliability.runs import outcome
from tests.reliability.tally import Tally
from tests.training.test_run import CASES, Killed, Spoken, dies, small, train
from tests.unprivileged import public_folder, unprivileged


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes() or b"\0")
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "none": lambda path: None,
    "missing": Path.unlink,
    "truncated": truncate,
    "flipped bit": flip,
    "empty": lambda path: path.write_bytes(b""),
    "unreadable": lambda path: path.chmod(0),
}


@pytest.fixture
def interrupted(sd3: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, RunConfig]]:
    """The folder of a run of four steps that was killed after the checkpoint of the third."""
    with public_folder() as place:
        model = shutil.copytree(sd3, place / "model")
        config = small(model, place / "run", **CASES["forward"])
        with monkeypatch.context() as patched:
            patched.setattr(checkpoint, "save", dies(checkpoint.save, 3, done=True))
            with pytest.raises(Killed):
                train(config)
        yield config.output_dir.rename(place / "interrupted"), config


def test_damage_is_harmless_or_said(tally: Tally, tmp_path: Path, interrupted: tuple[Path, RunConfig]) -> None:
    """An error or a message names the damaged file. Without a message, all bytes are those of an undisturbed run."""
    place, config = interrupted
    expected = outcome(train(config.model_copy(update={"output_dir": tmp_path / "whole"})))
    files = sorted(path.relative_to(place) for path in place.rglob("*") if path.is_file())
    cases = [(file, name) for file in files for name in DAMAGES if name != "none"]
    random.Random(0).shuffle(cases)
    cases.insert(0, (files[0], "none"))  # before root gives up its rights: it also imports what a resumed run needs
    for index in tally.trials(short=8, long=len(cases)):
        file, name = cases[index]
        shutil.rmtree(config.output_dir, ignore_errors=True)
        shutil.copytree(place, config.output_dir)
        with tally.trial(f"{file}, {name}"), ExitStack() as stack:
            if name == "unreadable":
                stack.enter_context(unprivileged(place.parent))
            DAMAGES[name](config.output_dir / file)
            display = Spoken()
            refused = ""
            try:
                running.train(config, resume=True, display=display)
            except UserError as error:
                refused = str(error)
            finally:
                if (config.output_dir / file).exists():
                    (config.output_dir / file).chmod(0o644)
            if refused:
                assert file.name in refused
                continue
            found = outcome(config.output_dir)
            different = {name for name in expected | found if expected.get(name) != found.get(name)}
            # Pictures of earlier evaluations, and rows of metrics, are not made again.
            assert not different or different == {file.name} or (different == {"metrics"} and display.messages), (
                different
            )
