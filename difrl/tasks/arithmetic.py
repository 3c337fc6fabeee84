"""The arithmetic task: sums and differences of numbers below 100, three ways to solve them, and the split into train and eval.

    47+38=   85            answered at once
    47+38=   75            answered at once and carelessly: the carry is forgotten
    47+38=   15;8;=85      worked out: the units make 15, the tens with the carry 8
    52-37=   5;1;=15       worked out: the units 5, after borrowing, and the tens 1

There are 10,000 sums and 5,050 differences, none of them negative. A tenth is held out from pretraining and from reinforcement
learning, a+b always together with b+a. The metadata of a prompt hold the answer, which a verifiable reward compares. A text may
give the answer at once or at the end of a working.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from samplers.noise import stable_seed

Split = Literal["train", "eval", "all"]

OPERANDS = range(100)
HELD_OUT = 10
"""One problem in ten is an evaluation problem."""
CHARACTERS = "0123456789+-=;"
LONGEST = 10
"""Number of characters of the longest solution, 18;19;=198."""


@dataclass(frozen=True)
class Problem:
    """a + b or a − b, with 0 ≤ a, b < 100 and no negative answer."""

    a: int
    sign: Literal["+", "-"]
    b: int

    @property
    def text(self) -> str:
        """The prompt, such as `47+38=`."""
        return f"{self.a}{self.sign}{self.b}="

    @property
    def answer(self) -> int:
        return self.a + self.b if self.sign == "+" else self.a - self.b

    @property
    def careless(self) -> int:
        """The answer without carry or borrow. It is right where there is neither."""
        (tens_a, units_a), (tens_b, units_b) = divmod(self.a, 10), divmod(self.b, 10)
        if self.sign == "+":
            return 10 * (tens_a + tens_b) + (units_a + units_b) % 10
        return 10 * (tens_a - tens_b) + (units_a - units_b) % 10

    @property
    def worked(self) -> str:
        """The solution column by column, then `=` and the answer."""
        (tens_a, units_a), (tens_b, units_b) = divmod(self.a, 10), divmod(self.b, 10)
        if self.sign == "+":
            units = units_a + units_b
            return f"{units};{tens_a + tens_b + units // 10};={self.answer}"
        borrow = int(units_a < units_b)
        return f"{units_a + 10 * borrow - units_b};{tens_a - borrow - tens_b};={self.answer}"

    @cached_property
    def held_out(self) -> bool:
        """True for evaluation problems. A hash of the problem decides, so that no later change can move it."""
        operands = sorted((self.a, self.b)) if self.sign == "+" else (self.a, self.b)
        return stable_seed("arithmetic", self.sign, *operands) % HELD_OUT == 0

    @property
    def metadata(self) -> Mapping[str, Any]:
        return {"answer": str(self.answer), "operation": "sum" if self.sign == "+" else "difference"}


def list_problems(split: Split = "all") -> list[Problem]:
    """Return the problems of one side of the split, in a fixed order."""
    if split not in ("train", "eval", "all"):
        raise ValueError(f"unknown split {split!r} of the arithmetic task; expected train, eval or all")
    sums = [Problem(a, "+", b) for a in OPERANDS for b in OPERANDS]
    differences = [Problem(a, "-", b) for a in OPERANDS for b in OPERANDS if b <= a]
    return [p for p in sums + differences if split == "all" or p.held_out == (split == "eval")]
