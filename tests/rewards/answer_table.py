"""The table of answers.txt: truths with right and wrong answers, and the texts in which these stand."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

PATH = Path(__file__).with_name("answers.txt")


class Entry(NamedTuple):
    """A truth with its answers."""

    truth: str
    right: list[str]
    wrong: list[str]


def read_table() -> list[Entry]:
    """Return all entries. `\\n` in a truth is a line break; lines that begin with # are headings, those with #### truths."""
    entries: list[Entry] = []
    for line in PATH.read_text(encoding="utf-8").splitlines():
        if line.startswith(("+ ", "- ")):
            (entries[-1].right if line[0] == "+" else entries[-1].wrong).append(line[2:])
        elif line and not line.startswith(("# ", "## ")):
            entries.append(Entry(line.replace(r"\n#", "\n#").replace(r".\n", ".\n"), [], []))
    return entries


def wrap(answer: str) -> list[str]:
    """Return texts with this final answer."""
    return [
        rf"\boxed{{{answer}}}",
        rf"First I thought \boxed{{77}}, which is wrong. So the answer is $\boxed{{{answer}}}$. I hope it is correct.",
        f"<think>Is it 77?</think> <answer>{answer}</answer>",
        f"<answer>77</answer> No.\n<answer> {answer} </answer>\n",
    ]
