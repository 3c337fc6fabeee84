"""Tests of the validation of options."""

from __future__ import annotations

import pytest

from rewards.encoding import FORMATS
from rewards.options import check_at_least_one, check_choice


def test_a_choice_is_one_of_the_known() -> None:
    assert check_choice("far", "format", "jpeg", FORMATS) == "jpeg"
    with pytest.raises(ValueError, match="reward 'far': format is 'webp', expected one of png, jpeg"):
        check_choice("far", "format", "webp", FORMATS)


def test_numbers_below_one_are_named() -> None:
    check_at_least_one("far", batch_size=1, in_flight=7)
    with pytest.raises(ValueError, match="reward 'far': in_flight is 0, expected at least 1"):
        check_at_least_one("far", batch_size=1, in_flight=0)
