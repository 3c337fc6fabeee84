"""The final answer of a text: which part of it counts.

Of several answers the last one counts. An answer is marked by \\boxed{…} (or \\fbox), <answer>…</answer>, "####", or words
such as "the answer is" before mathematics. The last mark counts, even if it is empty. Boxes with nothing but a comma, "and"
or "or" between them are one answer of several parts. A box that is never closed is an unfinished text without an answer.

Without a mark it is the last mathematics of the text, its last line, or the whole text. These are several readings of one
place, the end of the text.
"""

from __future__ import annotations

import re

from rewards.answer_forms import LONGEST, Words, read

_CUE = r"(?i:\b(?:answer|result|solution)(?:\s+(?:to|for|of)\b[^.\n:]{0,80})?\s*(?:is|:|=|was|are)\s*:?)[\s*]*"
_BEGINS_MATH = r"(?=[-+(\[$\\\d.−√]|[a-zA-Z]\s*=|\([A-Z]\)|[A-Z][.)*\s]*(?:$|\n))"
_BOX = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])")
_MARK = re.compile(
    rf"(?P<box>{_BOX.pattern})|<answer>(?P<tag>.*?)(?:</answer>|(?P<open>\Z))"
    rf"|(?:####\s*(?=[-+$\\\d.]|[^\n]*\s*\Z)|{_CUE}{_BEGINS_MATH})(?P<line>[^\n]*)",
    re.DOTALL,
)
_BETWEEN_BOXES = re.compile(
    r"[\s$.]*(?:\\[)\]])?[\s$]*(?:[,;&]|\\text\{\s*(?:and|or)\s*\}|,?\s*\b(?:and|or)\b)+[\s$]*(?:\\[(\[])?[\s$]*(?:[a-z]\s*=\s*)?"
)
_SENTENCE_END = re.compile(r"(?<=[^\d\s])[.!?](?=\s|$)|(?<=\d)[.!?](?=\s|$)")
_FORMULA = re.compile(
    r"\$\$(.+?)\$\$|(?<![\\\d])\$(?!\s)([^$\n]+?)(?<![\s\\])\$(?!\d)|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL
)
_COPULA = re.compile(r"(?i:\b(?:is|are|be|equals|was|option|choice|answer)\b|:)\s*")


def final_answers(text: str) -> list[str]:
    """Return the final answer in its possible readings; none if the text has no answer."""
    marked, kind = _last_mark(text)
    if kind is None:
        return _read_end(text)
    if kind == "box" or not isinstance(read(marked), Words):
        return [marked]
    return [marked, *_read_end(marked)]


def stated_answer(truth: str) -> str:
    """Return the answer of the metadata: what is marked in a whole solution, as in GSM8K and MATH, or all of it."""
    if "####" in truth or re.search(r"\\boxed\s*\{", truth):
        return _last_mark(truth)[0]
    return truth


def _last_mark(text: str) -> tuple[str, str | None]:
    """Return the last marked answer, and the kind of its mark; None if the text has no mark."""
    answer, kind = "", None
    boxes: list[str] = []
    position = box_end = 0
    while (match := _MARK.search(text, position)) is not None:
        position = match.end()
        if match["box"] is None:
            boxes, kind = [], "words"
            answer = match["tag"] or match["line"] or ""
            if match["open"] is not None:
                answer = ""
            elif _BOX.search(answer) is not None:
                position = match.start("tag" if match["tag"] is not None else "line")
        else:
            content, end = _read_box(text, position)
            joined = bool(boxes) and _BETWEEN_BOXES.fullmatch(text, box_end, match.start()) is not None
            boxes = [*(boxes if joined else []), content]
            position = box_end = max(end, position)
            answer, kind = ", ".join(dict.fromkeys(boxes)) if all(boxes) else "", "box"
    return answer, kind


def _read_box(text: str, start: int) -> tuple[str, int]:
    """Return what stands in a box, and the position behind it; nothing if the box is not closed."""
    while text[start : start + 1].isspace():
        start += 1
    if text[start : start + 1] != "{":
        match = re.compile(r"[^\s$]*").match(text, start)
        return ("", start) if match is None else (match[0], match.end())
    end = _read_braces(text, start)
    return ("", len(text)) if end is None else (text[start + 1 : end - 1], end)


_BRACES = re.compile(r"\\.|[{}]", re.DOTALL)


def _read_braces(text: str, start: int) -> int | None:
    """Return the position behind the brace that closes the one at `start`. Other brackets may be open: (1, 2]."""
    depth = 0
    for match in _BRACES.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return match.end()
    return None


def _read_end(text: str) -> list[str]:
    """Return readings of the end of a text without a mark."""
    text = text.strip()[-LONGEST:]
    line = text.rpartition("\n")[2].strip()
    readings = [text, line]
    sentence = [part for part in _SENTENCE_END.split(line) if part.strip(" *_`\"')")][-1:]
    readings += [part for end in sentence for part in (end, _COPULA.split(end)[-1])]
    formula = next(reversed([*_FORMULA.finditer(text)]), None)
    run = _last_run(text if formula is None else text[formula.end() :])
    if run is None and formula is not None:
        run = next(group for group in formula.groups() if group is not None)
    if run is not None:
        working, _, result = run.rpartition("=")
        if not re.search(r"\d", working) or re.search("[a-zA-Z]", _COMMAND.sub("", working)):
            result = run  # x = 5, in contrast to 47 + 38 = 85
        readings += [run, result]
        if formula is None or run not in formula[0]:
            readings.append(re.split(r"[,;]\s+|;|\s(?:and|or)\s", result)[-1])
    return [reading for reading in dict.fromkeys(readings) if reading.strip()]


_WORD = re.compile(r"\S+")
_COMMAND = re.compile(r"\\[a-zA-Z]+(?:\{[a-z]*matrix\})?")
_FUNCTIONS = re.compile(r"(?<![a-zA-Z])(?:sqrt|sin|cos|tan|log|ln|exp|pi|infinity|cm|mm|km|kg|st|nd|rd|th)(?![a-zA-Z])")


def _last_run(text: str) -> str | None:
    """Return the last words of a text that are mathematics, side by side within a sentence; None if there are none."""
    runs: list[tuple[int, int]] = []
    start, end = None, 0
    for match in _WORD.finditer(text):
        word = match[0].strip("*`_\"'")
        if not _is_math(word):
            if word not in ("and", "or"):
                start = None
            continue
        if start is None:
            runs.append((match.start(), match.end()))
            start = match.start()
        else:
            runs[-1] = (start, match.end())
        end = match.end()
        if text[end - 1] in ".!?:":
            start = None
    with_digits = [text[slice(*run)] for run in runs if re.search(r"[\d\\√π∞½]", text[slice(*run)])]
    return with_digits[-1] if with_digits else None


def _is_math(word: str) -> bool:
    """Whether a word of a text is mathematics: digits, operators, commands and single letters."""
    bare = _FUNCTIONS.sub("1", _COMMAND.sub("1", word)).rstrip(".,;:!?")
    if re.search(r"[a-zA-Z]{3}", bare) or not bare:
        return False
    if bare.isalpha():
        return len(bare) == 1 and bare not in "aAI"
    return re.search(r"[\d=<>+√π∞]|^[-−]$", bare) is not None
