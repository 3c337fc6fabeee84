"""A run's folder: one run at a time, and a run that never finished a step does not occupy it."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from difrl.config import RunConfig
from difrl.config.load import read_config, to_yaml
from difrl.inference.loaded_run import open_run
from difrl.inference.preference_pairs import make_pairs
from difrl.reporting.html import write_report
from difrl.runtime.distributed import DistributedContext, ProcessError
from difrl.runtime.lock import FolderInUse, lock_folder
from difrl.training import checkpoint
from difrl.training.run_folder import RunFolderError, lock_run
from rewards import RewardError
from tests.fakes import Brightness, in_threads
from tests.training.test_run import UNSEEN, assert_same, results, rows, small, train

ROOT = Path(__file__).parents[2]

WAITING = """
import time
from pathlib import Path

def brightness(images, prompts, metadata):
    folder = Path(__file__).parent
    (folder / "calls").write_text((folder / "calls").read_text() + "x")
    while (folder / "calls").read_text().count("x") >= 2 and not (folder / "go").exists():
        time.sleep(0.01)
    return images.mean(dim=(1, 2, 3))
"""


@pytest.fixture
def live(sd3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[RunConfig, Any]]:
    """A run in a process of its own, which waits in the reward of its second step until a file `go` is there."""
    (tmp_path / "waiting.py").write_text(WAITING)
    (tmp_path / "calls").write_text("")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    monkeypatch.syspath_prepend(tmp_path)
    config = small(sd3, tmp_path / "run", **UNSEEN, rewards=[{"import": "waiting:brightness"}], train={"steps": 3})
    path = tmp_path / "run.yaml"
    path.write_text(to_yaml(config))
    command = [sys.executable, "-c", "from difrl.cli import main; main()", "train", str(path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        while (tmp_path / "calls").read_text() != "xx":
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.02)
        yield config, process
    finally:
        process.kill()
        process.wait()
        sys.modules.pop("waiting", None)


def test_beside_a_live_run_others_are_refused_and_after_its_death_it_is_resumed(live: tuple[RunConfig, Any]) -> None:
    """A new run and a resumed one leave its folder as it is. Readers are not blocked. SIGKILL releases the folder."""
    config, process = live
    before = results(config.output_dir)
    for resume in (False, True):
        with pytest.raises(RunFolderError, match=f"in use by process {process.pid} since .* with output_dir="):
            train(config, resume=resume)
    assert_same(results(config.output_dir), before)
    assert open_run(config.output_dir, device="cpu").step == 1
    assert write_report([config.output_dir], config.output_dir / "report.html").is_file()
    process.kill()
    process.wait()
    (config.output_dir.parent / "go").touch()
    train(config, resume=True)
    assert [row["step"] for row in rows(config.output_dir)] == [1, 2, 3]
    assert not (config.output_dir / ".lock").exists()


def test_only_the_main_process_of_a_run_takes_the_lock(tmp_path: Path) -> None:
    def work(processes: DistributedContext) -> str:
        with lock_run(tmp_path / "run", processes):
            processes.wait()
            return "held"

    assert in_threads(3, work) == ["held"] * 3
    with lock_folder(tmp_path / "run"):
        for kind in (RunFolderError, ProcessError):

            def refused(processes: DistributedContext, kind: type[Exception] = kind) -> bool:
                with pytest.raises((RunFolderError, ProcessError)) as caught, lock_run(tmp_path / "run", processes):
                    pass
                return isinstance(caught.value, kind)

            assert in_threads(2, refused) == [kind is RunFolderError, kind is ProcessError]


def test_two_makers_of_pairs_do_not_share_a_folder(sd3: Path, tmp_path: Path) -> None:
    with lock_folder(tmp_path), pytest.raises(FolderInUse):
        make_pairs(small(sd3, tmp_path / "run"), tmp_path, 1)


class Unborn(Brightness):
    """A reward that never scores anything."""

    def __call__(self, *args: Any) -> Any:
        raise RewardError("unborn", "no key for the server")


GUARDED = {"guard": {}, "watch": [{"name": "judge"}]}  # saves a checkpoint before the first evaluation


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("sections", [UNSEEN, {}, GUARDED], ids=["in step 1", "in an evaluation", "after checkpoint 0"])
def test_a_run_without_a_finished_step_is_taken_over(
    sd3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resume: bool, sections: dict[str, Any]
) -> None:
    """With other settings, by a new run and by a resumed one: it ends like a run in a folder of its own."""
    folder = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr("difrl.scoring.scorer.build_reward", lambda config: Unborn())
        with pytest.raises(RewardError):
            train(small(sd3, folder, **sections))
    (folder / "notes.txt").write_text("mine")
    (folder / "samples" / "mine.png").write_text("mine")
    other = {**sections, "seed": 5, "train": {"lr": 2e-3, "steps": 2}}
    expected = results(train(small(sd3, tmp_path / "other", **other)))
    found = results(train(small(sd3, folder, **other), resume=resume))
    assert found.pop("mine.png") == b"mine"
    assert_same(found, expected)
    assert (folder / "notes.txt").read_text() == "mine"
    assert read_config(folder / "config.yaml").seed == 5


def test_a_recipe_of_the_users_own_in_the_folder_is_not_taken_over(sd3: Path, tmp_path: Path) -> None:
    """It looks like that of a run without a step, and would be replaced."""
    folder = tmp_path / "run"
    folder.mkdir()
    config = small(sd3, folder)
    (folder / "config.yaml").write_text(f"# my recipe\n{to_yaml(config)}")
    before = (folder / "config.yaml").read_bytes()
    with pytest.raises(RunFolderError, match="holds a run already"):
        train(config)
    with pytest.raises(RunFolderError, match="other settings of seed"):
        train(small(sd3, folder, seed=5), resume=True)
    assert (folder / "config.yaml").read_bytes() == before


def test_finished_steps_without_a_checkpoint_are_not_taken_over(sd3: Path, tmp_path: Path) -> None:
    config = small(sd3, tmp_path / "run", **UNSEEN, train={"steps": 2})
    train(config)
    for place in checkpoint.find_all(config.output_dir):
        for file in place.iterdir():
            file.unlink()
        place.rmdir()
    with pytest.raises(RunFolderError, match="holds a run already"):
        train(config)
    with pytest.raises(RunFolderError, match="other settings of seed"):
        train(config.model_copy(update={"seed": 5}), resume=True)


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_without_its_recipe_is_refused(sd3: Path, tmp_path: Path, resume: bool) -> None:
    config = small(sd3, tmp_path / "run", **UNSEEN, train={"steps": 1})
    train(config)
    (config.output_dir / "config.yaml").unlink()
    with pytest.raises(RunFolderError, match=r"config\.yaml is missing; restore it"):
        train(config, resume=resume)
