"""Checkpoints: they restore the same bits, and a full disk or a damaged file costs only its own checkpoint."""

from __future__ import annotations

import hashlib
import json
import random
import resource
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from difrl.core import Constant
from difrl.policies.layout import Layout
from difrl.policies.snapshots import Snapshots
from difrl.runtime.distributed import DistributedContext, ProcessError
from difrl.runtime.errors import UserError
from difrl.training import checkpoint
from difrl.training.checkpoint import CheckpointError, DamagedCheckpoint, read, write
from tests.fakes import in_threads
from tests.unprivileged import public_folder, unprivileged

FILES = [f"{name}.safetensors" for name in ("optimizer", "random", "snapshots", "source", "trained")]


@pytest.fixture(scope="module")
def processes() -> DistributedContext:
    return DistributedContext()


@dataclass
class Noted:
    """A source whose state is some numbers."""

    known: torch.Tensor = field(default_factory=lambda: torch.zeros(0, 2))

    def state(self) -> dict[str, torch.Tensor]:
        return {"known": self.known}

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        self.known = torch.cat([self.known, state["known"]])


def trainer(rank: int = 3, prefix: str = "a", seed: int = 0) -> Any:
    """Return the parts of a trainer that a checkpoint holds, with a few numbers each."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {f"{prefix}.down": (rank, 4), f"{prefix}.up": (4, rank), f"{prefix}.bias": (2,)}
    parameters = {n: nn.Parameter(torch.randn(s, generator=generator)) for n, s in shapes.items()}
    snapshots = Snapshots(Layout(parameters), {"ema": Constant(0.9), "old": Constant(0.0)}, nullcontext)
    policy = SimpleNamespace(parameters=parameters, snapshots=snapshots)
    optimizer = torch.optim.AdamW(parameters.values(), lr=0.1)
    return SimpleNamespace(
        policy=policy, source=Noted(), optimizer=optimizer, evaluations=0, coefficients={}, weights={}
    )


def advance(trained: Any, start: int, stop: int) -> None:
    for step in range(start, stop):
        for p in trained.policy.parameters.values():
            p.grad = p.detach() ** 2 - 0.1 * step
        trained.optimizer.step()
        trained.policy.snapshots.update(step)
        trained.source.load({"known": torch.tensor([[step, step / 3]])})
        trained.evaluations += 7


def state_of(trained: Any) -> dict[str, torch.Tensor]:
    moments = {
        f"{name}/{key}": value
        for name, p in trained.policy.parameters.items()
        for key, value in trained.optimizer.state[p].items()
    }
    return {**trained.policy.parameters, **trained.policy.snapshots.state(), **trained.source.state(), **moments}


def contents(run: Path) -> dict[str, bytes]:
    """Return every file under checkpoints/, hidden ones included."""
    return {str(p.relative_to(run)): p.read_bytes() for p in (run / "checkpoints").rglob("*") if p.is_file()}


def test_a_resumed_trainer_goes_on_as_if_it_had_never_stopped(tmp_path: Path, processes: DistributedContext) -> None:
    uninterrupted, stopped, resumed = trainer(), trainer(), trainer(seed=1)
    advance(uninterrupted, 0, 6)
    advance(stopped, 0, 4)
    checkpoint.save(stopped, tmp_path, 4, 2, processes)
    place = checkpoint.find_latest(tmp_path)
    assert place == tmp_path / "checkpoints" / "step-000004"
    assert checkpoint.load(resumed, place, processes) == 4
    assert resumed.evaluations == 28
    advance(resumed, 4, 6)
    expected, found = state_of(uninterrupted), state_of(resumed)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.equal(value, found[name]), name


def test_a_checkpoint_before_the_first_update_has_no_moments(tmp_path: Path, processes: DistributedContext) -> None:
    fresh, loaded = trainer(), trainer()
    checkpoint.save(fresh, tmp_path, 0, 1, processes)
    checkpoint.load(loaded, checkpoint.checkpoint_folder(tmp_path, 0), processes)
    assert not loaded.optimizer.state


def saved_by(run: Path, *rows: int) -> Path:
    """Return a checkpoint of processes whose sources hold so many numbers: 0, 1, … in the first, 10, 11, … in the second."""

    def work(processes: DistributedContext) -> None:
        trained = trainer()
        first = 10.0 * processes.rank
        trained.source.known = torch.arange(first, first + rows[processes.rank])[:, None].expand(-1, 2)
        checkpoint.save(trained, run, 1, 1, processes)

    in_threads(len(rows), work)
    return checkpoint.checkpoint_folder(run, 1)


def known_to(place: Path, count: int) -> list[list[float]]:
    """Return the numbers that each of `count` processes loads from a checkpoint."""

    def work(processes: DistributedContext) -> list[float]:
        loaded = trainer()
        checkpoint.load(loaded, place, processes)
        found: list[float] = loaded.source.known[:, 1].tolist()
        return found

    return in_threads(count, work)


def test_every_process_knows_again_what_it_knew(tmp_path: Path) -> None:
    """The sizes of the states may differ."""
    assert known_to(saved_by(tmp_path / "a", 1, 3), 2) == [[0], [10, 11, 12]]
    assert known_to(saved_by(tmp_path / "b", 0, 0, 2), 3) == [[], [], [20, 21]]
    assert known_to(saved_by(tmp_path / "c", 0), 1) == [[]]


def test_more_or_fewer_processes_know_what_all_of_them_knew(tmp_path: Path) -> None:
    place = saved_by(tmp_path, 1, 2)
    assert known_to(place, 1) == [[0, 10, 11]]
    assert known_to(place, 3) == [[0, 10, 11]] * 3


def test_what_was_known_of_something_else_is_refused(tmp_path: Path) -> None:
    place = saved_by(tmp_path, 2)
    other = trainer()
    other.source.known = torch.zeros(0, 3)
    with pytest.raises(
        CheckpointError, match=r"for each prompt known \[2\] and this run needs known \[3\]: .*other references"
    ):
        checkpoint.load(other, place, DistributedContext())


def test_a_checkpoint_of_before_there_was_anything_to_know_is_read(tmp_path: Path) -> None:
    place = saved_by(tmp_path, 2)
    (place / "source.safetensors").unlink()
    state = json.loads((place / "state.json").read_text())
    del state["files"]["source.safetensors"], state["digests"]
    (place / "state.json").write_text(json.dumps(state))
    (place / "SHA256SUMS").unlink()
    assert known_to(place, 1) == [[]]


def test_global_random_states_come_back(tmp_path: Path, processes: DistributedContext) -> None:
    """States of torch, numpy and Python, in the middle of the pair of normals that numpy and Python draw at once."""

    def drawn() -> tuple[Any, ...]:
        return torch.rand(2).tolist(), np.random.standard_normal(3).tolist(), random.gauss(0, 1), random.random()

    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    np.random.standard_normal()
    random.gauss(0, 1)
    checkpoint.save(trainer(), tmp_path, 1, 1, processes)
    expected = drawn()
    torch.manual_seed(6)
    drawn()
    checkpoint.load(trainer(), checkpoint.checkpoint_folder(tmp_path, 1), processes)
    assert drawn() == expected


def test_every_process_finds_its_random_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The state of the second process follows that of the first in the file. Threads share a state, which is told apart here."""
    states = {rank: {"torch": torch.arange(16, dtype=torch.uint8) + rank} for rank in range(2)}
    found: dict[int, Any] = {}

    def work(processes: DistributedContext) -> None:
        here.rank = processes.rank
        checkpoint.save(trainer(), tmp_path, 1, 1, processes)
        checkpoint.load(trainer(), checkpoint.checkpoint_folder(tmp_path, 1), processes)

    here = threading.local()
    monkeypatch.setattr(write, "get_random_state", lambda: states[here.rank])
    monkeypatch.setattr(read, "set_random_state", lambda state: found.update({here.rank: state}))
    in_threads(2, work)
    assert {rank: state["torch"].tolist() for rank, state in found.items()} == {
        rank: state["torch"].tolist() for rank, state in states.items()
    }


def test_only_the_newest_are_kept(tmp_path: Path, processes: DistributedContext) -> None:
    """The order is by number, not by name. A copy that a user made is neither removed nor taken for a checkpoint."""
    trained = trainer()
    mine = tmp_path / "checkpoints" / "step-000001-best"
    mine.mkdir(parents=True)
    for step in (1, 2, 999_999, 1_000_000):
        checkpoint.save(trained, tmp_path, step, 2, processes)
    names = [p.name for p in checkpoint.find_all(tmp_path)]
    assert names == ["step-999999", "step-1000000"]
    assert checkpoint.find_latest(tmp_path) == checkpoint.checkpoint_folder(tmp_path, 1_000_000)
    assert mine.is_dir()


def test_a_run_without_checkpoints_has_no_latest(tmp_path: Path) -> None:
    assert checkpoint.find_latest(tmp_path) is None


def saved_twice(run: Path, processes: DistributedContext) -> Any:
    """Return a trainer with the checkpoints of two steps, after its third."""
    trained = trainer()
    for step in (1, 2):
        advance(trained, step - 1, step)
        checkpoint.save(trained, run, step, 2, processes)
    advance(trained, 2, 3)
    return trained


@pytest.mark.parametrize("name", [*FILES, "state.json"])
def test_a_write_that_fails_leaves_what_was_there(
    tmp_path: Path, processes: DistributedContext, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """For every file that may not fit on the disk: earlier checkpoints are untouched, and nothing partial stays behind."""
    trained = saved_twice(tmp_path, processes)
    before = contents(tmp_path)

    def failing(function: Any) -> Any:
        def attempt(path: Path, *content: Any) -> Any:
            if path.name == name:
                path.write_bytes(b"half of it")
                raise OSError(28, "No space left on device")
            return function(path, *content)

        return attempt

    with monkeypatch.context() as patched:
        patched.setattr(write, "write_tensors", failing(write.write_tensors))
        patched.setattr(write, "atomic_write_text", failing(write.atomic_write_text))
        with pytest.raises(CheckpointError, match=r"step-000003.*No space left.*untouched.*--resume"):
            checkpoint.save(trained, tmp_path, 3, 1, processes)
    assert contents(tmp_path) == before
    assert [p.name for p in (tmp_path / "checkpoints").iterdir() if p.name.startswith(".")] == []
    checkpoint.save(trained, tmp_path, 3, 1, processes)
    assert [p.name for p in checkpoint.find_all(tmp_path)] == ["step-000003"]


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Make writes past `size` bytes of a file fail, as on a full disk (errno differs)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_the_operating_system_refusing_a_write_is_a_checkpoint_error(
    tmp_path: Path, processes: DistributedContext
) -> None:
    """safetensors reports errors of the system by an exception that is not an OSError."""
    trained = trainer(rank=20_000)
    checkpoint.save(trained, tmp_path, 1, 2, processes)
    before = contents(tmp_path)
    with file_size_limit(400_000), pytest.raises(CheckpointError, match=r"File too large.*--resume"):
        checkpoint.save(trained, tmp_path, 2, 2, processes)
    assert contents(tmp_path) == before


def test_what_a_killed_process_left_half_written_is_cleared_away(tmp_path: Path, processes: DistributedContext) -> None:
    left = tmp_path / "checkpoints" / ".step-000007.partial"
    left.mkdir(parents=True)
    (left / "trained.safetensors").write_bytes(b"half")
    assert checkpoint.find_latest(tmp_path) is None
    checkpoint.save(trainer(), tmp_path, 9, 2, processes)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-000009"]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def scramble(path: Path) -> None:
    """Keep the size of a file and clear its content, as after a power failure."""
    path.write_bytes(bytes(path.stat().st_size))


def flip(path: Path) -> None:
    """Flip one bit in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [truncate, scramble, flip, empty, Path.unlink])
@pytest.mark.parametrize("name", [*FILES, "state.json", "SHA256SUMS"])
def test_damage_is_noticed(tmp_path: Path, processes: DistributedContext, name: str, damage: Any) -> None:
    """The message names the file, and the newest checkpoint without damage is the one before it."""
    saved_twice(tmp_path, processes)
    place = checkpoint.checkpoint_folder(tmp_path, 2)
    damage(place / name)
    with pytest.raises(DamagedCheckpoint) as caught:
        checkpoint.load(trainer(), place, processes)
    message = str(caught.value)
    assert str(place) in message
    assert name in message
    assert "--resume passes it over; the run has step-000001 beside it" in message
    whole, (damaged,) = checkpoint.find_whole(tmp_path)
    assert whole == checkpoint.checkpoint_folder(tmp_path, 1)
    assert damaged.place == place
    damage(whole / name)
    with pytest.raises(CheckpointError, match=r"no checkpoint of .* is whole \(step-000002: .*; step-000001: .*\)"):
        checkpoint.find_whole(tmp_path)


def test_only_the_files_that_are_read_are_compared(tmp_path: Path, processes: DistributedContext) -> None:
    """To open a run, the weights; the optimizer's moments may be large."""
    saved_twice(tmp_path, processes)
    place = checkpoint.checkpoint_folder(tmp_path, 2)
    flip(place / "optimizer.safetensors")
    checkpoint.load_trained(trainer().policy.snapshots.layout, place, processes)
    flip(place / "trained.safetensors")
    with pytest.raises(DamagedCheckpoint, match=r"trained\.safetensors is not as it was written"):
        checkpoint.load_trained(trainer().policy.snapshots.layout, place, processes)


def test_the_digests_are_those_of_sha256sum(tmp_path: Path, processes: DistributedContext) -> None:
    saved_twice(tmp_path, processes)
    lines = (checkpoint.checkpoint_folder(tmp_path, 2) / "SHA256SUMS").read_text().splitlines()
    assert sorted(line.split("  ")[1] for line in lines) == sorted([*FILES, "state.json"])
    for line in lines:
        digest, name = line.split("  ")
        content = (checkpoint.checkpoint_folder(tmp_path, 2) / name).read_bytes()
        assert hashlib.sha256(content).hexdigest() == digest


def test_a_step_that_is_not_that_of_the_folder_is_damage_in_any_version(
    tmp_path: Path, processes: DistributedContext
) -> None:
    saved_twice(tmp_path, processes)
    place = checkpoint.checkpoint_folder(tmp_path, 2)
    (place / "SHA256SUMS").unlink()
    state = json.loads((place / "state.json").read_text())
    del state["digests"]
    (place / "state.json").write_text(json.dumps(state))
    assert checkpoint.load(trainer(), place, processes) == 2
    (place / "state.json").write_text(json.dumps({**state, "step": 99}))
    with pytest.raises(DamagedCheckpoint, match=r"state\.json is of step 99"):
        checkpoint.load(trainer(), place, processes)


@pytest.mark.parametrize("name", [*FILES, "state.json", "SHA256SUMS", "."])
def test_a_file_that_may_not_be_read_is_no_damage(processes: DistributedContext, name: str) -> None:
    """It is not passed over, and there is no advice to remove it."""
    with public_folder() as run:
        saved_twice(run, processes)
        path = checkpoint.checkpoint_folder(run, 2) / name
        path.chmod(0)
        with unprivileged(run), pytest.raises(CheckpointError, match=r"Permission denied; make it readable") as caught:
            checkpoint.find_whole(run)
        assert f"cannot read {path}" in str(caught.value)
        assert not isinstance(caught.value, DamagedCheckpoint)
        path.chmod(0o755)
        with unprivileged():
            assert checkpoint.find_whole(run) == (checkpoint.checkpoint_folder(run, 2), [])


def test_a_folder_of_checkpoints_that_may_not_be_read_is_not_an_empty_one(processes: DistributedContext) -> None:
    with public_folder() as run:
        saved_twice(run, processes)
        (run / "checkpoints").chmod(0)
        with (
            unprivileged(run),
            pytest.raises(CheckpointError, match="checkpoints: Permission denied; make it readable"),
        ):
            checkpoint.find_latest(run)
        (run / "checkpoints").chmod(0o755)


def test_a_damaged_checkpoint_is_set_aside_under_a_free_name(tmp_path: Path, processes: DistributedContext) -> None:
    for expected in ("step-000002-damaged", "step-000002-damaged-2"):
        saved_twice(tmp_path, processes)
        before = contents(checkpoint.checkpoint_folder(tmp_path, 2).parent.parent)
        aside = checkpoint.set_aside(checkpoint.checkpoint_folder(tmp_path, 2))
        assert aside.name == expected
        assert before["checkpoints/step-000002/trained.safetensors"] == (aside / "trained.safetensors").read_bytes()
    assert [p.name for p in checkpoint.find_all(tmp_path)] == ["step-000001"]


@pytest.mark.parametrize("content", ["[]", "null", '{"step": 1}', '{"files": 3}', "{"])
def test_a_state_that_says_something_else_is_damage(tmp_path: Path, content: str) -> None:
    (tmp_path / "state.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"damaged: state\.json cannot be read"):
        checkpoint.read_state(tmp_path)


def test_a_step_without_checkpoint_says_which_there_are(tmp_path: Path, processes: DistributedContext) -> None:
    saved_twice(tmp_path, processes)
    with pytest.raises(CheckpointError, match=r"no checkpoint .*step-000005; the run has step-000001, step-000002"):
        checkpoint.read_state(checkpoint.checkpoint_folder(tmp_path, 5))


def test_another_model_is_refused(tmp_path: Path, processes: DistributedContext) -> None:
    checkpoint.save(trainer(), tmp_path, 1, 1, processes)
    with pytest.raises(CheckpointError, match=r"another model: .*a\.bias.*only one of the two"):
        checkpoint.load(trainer(prefix="b"), checkpoint.checkpoint_folder(tmp_path, 1), processes)


def test_other_snapshots_are_refused(tmp_path: Path, processes: DistributedContext) -> None:
    other = trainer()
    checkpoint.save(other, tmp_path, 1, 1, processes)
    del other.policy.snapshots.copies["old"]
    with pytest.raises(
        CheckpointError, match=r"\['old/a.bias', .* are in only one of the two; resume with the snapshots"
    ):
        checkpoint.load(other, checkpoint.checkpoint_folder(tmp_path, 1), processes)


def test_another_rank_is_refused(tmp_path: Path, processes: DistributedContext) -> None:
    checkpoint.save(trainer(rank=3), tmp_path, 1, 1, processes)
    with pytest.raises(CheckpointError, match=r"a\.down has shape \[3, 4\] there and \[5, 4\] here .*LoRA rank"):
        checkpoint.load(trainer(rank=5), checkpoint.checkpoint_folder(tmp_path, 1), processes)


def test_the_files_are_what_they_say(tmp_path: Path, processes: DistributedContext) -> None:
    """Plain safetensors and JSON: readable without difrl."""
    trained = trainer()
    advance(trained, 0, 2)
    checkpoint.save(trained, tmp_path, 2, 1, processes)
    place = checkpoint.checkpoint_folder(tmp_path, 2)
    weights = load_file(place / "trained.safetensors")
    assert torch.equal(weights["a.up"], trained.policy.parameters["a.up"])
    state = json.loads((place / "state.json").read_text())
    assert (state["step"], state["evaluations"], state["optimizer_steps"]) == (2, 14, 2)
    assert sorted(state["files"]) == FILES


def test_what_a_killed_process_left_aside_is_removed(tmp_path: Path) -> None:
    place = saved_by(tmp_path, 2)
    for name in (".step-000003.partial", ".step-000002.old.partial"):
        (place.parent / name).mkdir()
    checkpoint.remove_partial(tmp_path)
    assert [left.name for left in place.parent.iterdir()] == [place.name]


@contextmanager
def held_back(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Let the writing of files wait for an event, which is set at the end of the block."""
    may_write, write_tensors = threading.Event(), write.write_tensors

    def wait(*args: Any) -> str:
        assert may_write.wait(60)
        return write_tensors(*args)

    monkeypatch.setattr(write, "write_tensors", wait)
    try:
        yield may_write
    finally:
        may_write.set()


def test_training_goes_on_while_a_checkpoint_is_written(
    tmp_path: Path, processes: DistributedContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint is that of the moment of the call, and the next one waits for it."""
    trained, same, writer = trainer(), trainer(), checkpoint.Writer(processes)
    for one in (trained, same):
        advance(one, 0, 2)
    checkpoint.save(same, tmp_path / "at once", 2, 9, processes)
    with held_back(monkeypatch) as may_write:
        checkpoint.save(trained, tmp_path / "run", 2, 9, processes, writer=writer)
        advance(trained, 2, 3)
        assert checkpoint.find_latest(tmp_path / "run") is None
        threading.Timer(0.2, may_write.set).start()
        checkpoint.save(trained, tmp_path / "run", 3, 9, processes, writer=writer)
    writer.finish()
    assert [p.name for p in checkpoint.find_all(tmp_path / "run")] == ["step-000002", "step-000003"]
    expected = contents(tmp_path / "at once")
    found = {name: content for name, content in contents(tmp_path / "run").items() if name in expected}
    assert found == expected


def test_an_error_of_the_writer_is_raised_where_it_is_used_next(
    tmp_path: Path, processes: DistributedContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once, and with the message of a checkpoint that is written at once."""

    def full(*_: Any) -> str:
        raise OSError(28, "No space left on device")

    trained = trainer()
    for use in ("save", "finish", "close"):
        writer = checkpoint.Writer(processes)
        with monkeypatch.context() as patched:
            patched.setattr(write, "write_tensors", full)
            checkpoint.save(trained, tmp_path, 1, 9, processes, writer=writer)
            while writer._pending is not None and not writer._pending.done():
                time.sleep(0.01)
        if use == "close":
            assert "No space left" in writer.close()
            continue
        following = {
            "finish": writer.finish,
            "save": partial(checkpoint.save, trained, tmp_path, 2, 9, processes, writer=writer),
        }
        with pytest.raises(CheckpointError, match=r"cannot write .*step-000001: .*No space left.*untouched.*--resume"):
            following[use]()
        writer.finish()
        assert writer.close() == ""
    assert contents(tmp_path) == {}


def test_a_copy_that_would_fill_the_memory_is_not_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each tensor is written when it is gathered, by two processes too, and the file is the same. So is the error."""
    for name, free in (("ample", 2**40), ("scarce", 100)):
        monkeypatch.setattr(write, "available_memory", lambda free=free: free)
        threads: list[int] = []

        def noted(*args: Any, threads: list[int] = threads, write_tensors: Any = write.write_tensors) -> Any:
            threads.append(threading.get_ident())
            return write_tensors(*args)

        def work(processes: DistributedContext, name: str = name, threads: list[int] = threads) -> bool:
            trained, writer = trainer(), checkpoint.Writer(processes)
            advance(trained, 0, 2)
            checkpoint.save(trained, tmp_path / name, 2, 9, processes, writer=writer)
            writer.finish()
            return threading.get_ident() in threads

        with monkeypatch.context() as patched:
            patched.setattr(write, "write_tensors", noted)
            assert in_threads(2, work) == [name == "scarce", False]
    assert contents(tmp_path / "ample") == contents(tmp_path / "scarce")
    monkeypatch.setattr(write, "write_tensors", lambda *_: (tmp_path / "absent" / "file").touch())

    def fails(processes: DistributedContext) -> type[Exception]:
        with pytest.raises(UserError) as caught:
            checkpoint.save(trainer(), tmp_path / "scarce", 3, 9, processes, writer=checkpoint.Writer(processes))
        return caught.type

    assert in_threads(2, fails) == [CheckpointError, ProcessError]
    assert [p.name for p in checkpoint.find_all(tmp_path / "scarce")] == ["step-000002"]
