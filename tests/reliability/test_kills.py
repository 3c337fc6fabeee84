"""SIGKILL at random moments: the resumed run ends with the bytes of an undisturbed one."""

from __future__ import annotations

import random
import signal
from pathlib import Path
from typing import Any

from difrl.config import RunConfig
from difrl.training.checkpoint import find_all
from tests.recipes import FLOW_GRPO, text_recipe
from tests.reliability.runs import count_events, outcome, start
from tests.reliability.tally import Tally
from tests.training.test_run import CASES, small

MOODY = {"rewards": [{"import": "tests.training.test_lazy_parts:LazyMoody"}], "watch": [{"name": "judge"}], "guard": {}}
IMAGES: dict[str, tuple[int, dict[str, Any]]] = {
    "two processes": (2, {**CASES["forward"]}),
    "lora": (1, CASES["lora"]),
    "two updates": (1, {**FLOW_GRPO, "train": {"updates_per_step": 2}}),
    "a reward that draws, and a guard": (1, MOODY),
}
KINDS = [*IMAGES, "texts"]


def build(kind: str, models: tuple[Path, Path], folder: Path) -> tuple[int, RunConfig]:
    """Return the number of processes and the recipe of a run of four steps, with a checkpoint after each."""
    image, text = models
    if kind in IMAGES:
        processes, sections = IMAGES[kind]
        return processes, small(image, folder, **sections)
    prompts = folder.parent / "prompts.txt"
    prompts.write_text("1+2=\n30+4=\n2+2=\n17+5=\n")
    data = {"train": str(prompts), "evaluation": str(prompts), "prompts_per_step": 2, "group_size": 2}
    return 1, text_recipe(text, folder, data=data, train={"steps": 4}, eval={"images": 4, "show": 1})


def test_killed_and_resumed_is_the_same_run(tally: Tally, sd3: Path, lm: Path, tmp_path: Path) -> None:
    """Images and texts, one process and two, at any event from the first to the last. Some are killed twice."""
    undisturbed: dict[str, tuple[int, dict[str, Any]]] = {}
    for index in tally.trials(short=2, long=100):
        kind = KINDS[(index - 1) % len(KINDS)]
        if kind not in undisturbed:
            folder = tmp_path / kind.replace(" ", "-").replace(",", "")
            folder.mkdir()
            processes, config = build(kind, (sd3, lm), folder / "whole")
            undisturbed[kind] = count_events(config, processes), outcome(config.output_dir)
        events, expected = undisturbed[kind]
        chance = random.Random(index)
        folder = tmp_path / f"trial-{index}"
        folder.mkdir()
        processes, config = build(kind, (sd3, lm), folder / "run")
        at = chance.randrange(1, events + 1)
        with tally.trial(f"trial {index}, {kind}, killed at event {at} of {events}"):
            assert start(config, processes=processes, at=[at], number=signal.SIGKILL)[0] == -signal.SIGKILL
            if index % 3 == 2:  # once more, anywhere in the resumed run; it may have ended before
                again = chance.randrange(1, events + 1)
                start(config, resume=True, processes=processes, at=[again], number=signal.SIGKILL)
            assert set(start(config, resume=True, processes=processes)) == {0}
            found = outcome(config.output_dir)
            assert [name for name in expected | found if expected.get(name) != found.get(name)] == []
            left = [
                p.name for p in (config.output_dir / "checkpoints").iterdir() if p not in find_all(config.output_dir)
            ]
            assert left == []
