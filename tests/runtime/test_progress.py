"""Phases of long work."""

from __future__ import annotations

import threading

import pytest

from difrl.runtime.progress import count_done, open_phases, phase


def test_work_is_counted_in_the_innermost_phase() -> None:
    assert open_phases() == ()
    count_done()  # nobody has opened a phase
    with phase("evaluation", total=256) as evaluation:
        count_done(64)
        with phase("decoding images", total=64) as decoding:
            count_done(16)
            assert open_phases() == (evaluation, decoding)
        count_done(32)
    assert (evaluation.done, decoding.done) == (96, 16)
    assert open_phases() == ()


def test_a_phase_ends_with_an_exception() -> None:
    with pytest.raises(ValueError, match="of a reward"), phase("scoring"):
        raise ValueError("of a reward")
    assert open_phases() == ()


def test_a_thread_counts_in_its_own_phases() -> None:
    with phase("rollout", total=8) as rollout:
        with phase("outer") as outer:
            thread = threading.Thread(target=count_done)
            thread.start()
            thread.join()
        assert (rollout.done, outer.done) == (0, 0)

        def score() -> None:
            with phase("reward ocr", total=2) as scoring:
                count_done(2)
                found.append((scoring, open_phases()))

        found: list[tuple[object, tuple[object, ...]]] = []
        thread = threading.Thread(target=score)
        thread.start()
        thread.join()
        (scoring, both) = found[0]
        assert both == (rollout, scoring)
        assert rollout.done == 0
