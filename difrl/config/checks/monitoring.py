"""Conflicts of reported rewards and of the guard."""

from __future__ import annotations

from collections.abc import Iterator

from difrl.config.checks.conflict import ConfigConflict
from difrl.config.schema.run import RunSections


def check_monitoring(config: RunSections) -> Iterator[ConfigConflict]:
    """Yield the conflicts of this part of a config."""
    yield from _rewards_have_own_names(config)
    yield from _guard_has_something_to_guard(config)


def _rewards_have_own_names(config: RunSections) -> Iterator[ConfigConflict]:
    seen: set[str] = set()
    for section, rewards in (("rewards", config.rewards), ("watch", config.watch)):
        for index, reward in enumerate(rewards):
            if reward.label in seen:
                problem = f"a second reward called {reward.label!r}; metrics need different names; set label"
                yield ConfigConflict((section, index), problem)
            seen.add(reward.label)


def _guard_has_something_to_guard(config: RunSections) -> Iterator[ConfigConflict]:
    guard, watched = config.guard, [reward.label for reward in config.watch]
    if guard is None:
        return
    if config.data.evaluation is None or config.eval.every == 0:
        yield ConfigConflict(
            ("guard",), "the guard compares evaluations; set data.evaluation and an eval.every above 0"
        )
    for index, name in enumerate(guard.rewards or []):
        if name not in watched:
            known = ", ".join(watched) or "none"
            problem = f"{name!r} is not a watched reward (watched: {known}); add it to watch"
            yield ConfigConflict(("guard", "rewards", index), problem)
    if guard.diversity is None and not (watched if guard.rewards is None else guard.rewards):
        yield ConfigConflict(("guard",), "nothing is guarded; add a reward to watch, or set guard.diversity: 0.25")
