"""One notation for mathematics: what people, models and data sets write, as plain LaTeX.

`to_latex` unifies characters (−, ½, ², √, full-width digits), spellings of one command (\\dfrac12, \\tfrac{1}{2}), layout
(\\left, \\, $) and what calculators write (sqrt(3), x^(1/2), 2**3). Signs of currencies are left out. `split_outside`
and `read_group` find their way through brackets.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from rewards.typography import unify_typography

_GREEK = {
    **dict(zip("αβγδεζηθ", ("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta"), strict=True)),
    **dict(zip("ικλμνξπρ", ("iota", "kappa", "lambda", "mu", "nu", "xi", "pi", "rho"), strict=True)),
    **dict(zip("στφϕχψω", ("sigma", "tau", "phi", "phi", "chi", "psi", "omega"), strict=True)),
    **dict(zip("ΓΔΘΛΣΦΨΩ", ("Gamma", "Delta", "Theta", "Lambda", "Sigma", "Phi", "Psi", "Omega"), strict=True)),
}
_CHARACTERS = str.maketrans(
    {
        **dict.fromkeys("°º˚", r"^\circ "),
        **dict.fromkeys("·⋅∙•", r"\cdot "),
        **{"×": r"\times ", "÷": "/", "∕": "/", "⁄": "/", "∞": r"\infty ", "√": r"\sqrt ", "±": r"\pm ", "∓": r"\mp "},
        **{"≤": "<=", "⩽": "<=", "≥": ">=", "⩾": ">=", "≠": "!=", "≈": r"\approx "},
        **{"∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "∅": r"\emptyset ", "ℝ": r"\mathbb{R}", "⟨": "(", "⟩": ")"},
        **{letter: rf"\{name} " for letter, name in _GREEK.items()},
    }
)  # fmt: skip


def _write_power(match: re.Match[str]) -> str:
    return f"^{{{unicodedata.normalize('NFKC', match[0])}}}"


def _write_index(match: re.Match[str]) -> str:
    return f"_{{{unicodedata.normalize('NFKC', match[0])}}}"


_SCRIPTS = ((re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+"), _write_power), (re.compile("[₀₁₂₃₄₅₆₇₈₉₊₋]+"), _write_index))
_FRACTIONS = {c: unicodedata.normalize("NFKC", c).split("⁄") for c in "¼½¾⅐⅑⅒⅓⅔⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞"}

_LETTERS = r"(?![a-zA-Z])"
_SPELLINGS = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\\\\s*\[[^\]\n]*\]", r"\\\\ "),  # a row break with its height
        (r"(?<!\\)\\[()\[\]](?![a-zA-Z]*\\\\)", " "),  # \( \) \[ \]
        (r"(?<!\\)\$", ""),
        (r"\\(?:left|right|[bB]igg?[lrm]?|middle|displaystyle|textstyle|limits|mathop|rm|bf|it)" + _LETTERS + r"\.?", ""),
        (r"(\d)\s*(?:\{,\}|,\\!|\\,)\s*(?=\d{3}(?!\d))", r"\1"),  # marks of thousands
        (r"(?<!\\)\\[!,;:> ]|~|\\q?quad" + _LETTERS + "|\\\\hspace\\{[^}]*\\}|\\\\phantom\\{[^}]*\\}", " "),
        (r"\\(?:d|t|c)frac" + _LETTERS, r"\\frac"),
        (r"\\[dt]binom" + _LETTERS, r"\\binom"),
        (r"\\(?:text(?:bf|it|rm|normal|tt|sf|up|sc)?|mbox|emph|mathrm|mathbf|mathit|mathsf|bm|boldsymbol|operatorname)\*?"
         r"\s*\{", r"\\text{"),
        (r"\\text\{\s*(e|i|d|\\?pi)\s*\}", r"\1"),
        (r"\\text\{\s*([a-zA-Z])\s*\}(?=\s*[\^_=(])", r"\1"),
        (r"\\(?:leqslant|leq|le)" + _LETTERS, "<="),
        (r"\\(?:geqslant|geq|ge)" + _LETTERS, ">="),
        (r"\\(?:neq|ne)" + _LETTERS + r"|\\not\s*=", "!="),
        (r"\\lt" + _LETTERS, "<"),
        (r"\\gt" + _LETTERS, ">"),
        (r"\\(?:lor|vee)" + _LETTERS + r"|\\text\{\s*,?\s*or\s*\}", " or "),
        (r"\\(?:land|wedge)" + _LETTERS + r"|\\text\{\s*,?\s*and\s*\}", " and "),
        (r"\\(?:lbrace)" + _LETTERS, r"\\{"),
        (r"\\(?:rbrace)" + _LETTERS, r"\\}"),
        (r"\\(?:lbrack)" + _LETTERS, "["),
        (r"\\(?:rbrack)" + _LETTERS, "]"),
        (r"\\langle" + _LETTERS, "("),
        (r"\\rangle" + _LETTERS, ")"),
        (r"\\[lr]?vert" + _LETTERS, "|"),
        (r"\\(?:ldots|cdots|dots)" + _LETTERS, "..."),
        (r"\\div" + _LETTERS, "/"),
        (r"\*\*", "^"),
        (r"\*", r"\\cdot "),
        (r"\\(?:empty|varnothing)" + _LETTERS, r"\\emptyset"),
        (r"\\%", "%"),
        (r"\\\$|[£€¥₹]", ""),
        (r"\^\s*(?:\{\s*\\circ\s*\}|\\circ|\\degree)" + _LETTERS + r"|\\degree" + _LETTERS, r"^\\circ "),
        (r"(?<![\\a-zA-Z])(sqrt|sin|cos|tan|cot|sec|csc|arcsin|arccos|arctan|log|ln|exp|pi|theta|alpha|infty)" + _LETTERS,
         r"\\\1"),
        (r"(?<![\\a-zA-Z])(?:infinity|inf|oo)" + _LETTERS, r"\\infty "),
    )
]  # fmt: skip


def to_latex(text: str) -> str:
    """Return the same mathematics in one notation and single spaces."""
    for pattern, script in _SCRIPTS:
        text = pattern.sub(script, text)
    for character, (above, below) in _FRACTIONS.items():
        text = text.replace(character, rf" \frac{{{above}}}{{{below}}}")
    text = unify_typography(unicodedata.normalize("NFKC", text.translate(_CHARACTERS)))
    for pattern, replacement in _SPELLINGS:
        text = pattern.sub(replacement, text)
    return " ".join(_brace_arguments(text).split())


def read_group(text: str, start: int) -> int | None:
    """Return the position behind the bracket that closes the one at `start`; None if there is none."""
    for position, depth in _depths(text, start):
        if depth == 0:
            return position
    return None


def split_outside(text: str, separator: re.Pattern[str]) -> list[str]:
    """Return the parts of a text between separators outside of all brackets."""
    parts, start, open_until = [], 0, _closed_spans(text)
    for match in separator.finditer(text):
        if match.start() >= start and not open_until[match.start()]:
            parts.append(text[start : match.start()])
            start = match.end()
    return [*parts, text[start:]]


_BRACKETS = re.compile(r"\\begin\{|\\end\{[^}]*\}|\\[{}]|\\.|[()\[\]{}]", re.DOTALL)


def _depths(text: str, start: int = 0) -> Sequence[tuple[int, int]]:
    """Return the position behind each bracket, and the number of brackets that are open there."""
    found, depth = [], 0
    for match in _BRACKETS.finditer(text, start):
        token = match[0]
        step = 1 if token in ("(", "[", "{", r"\{") else -1 if token in (")", "]", "}", r"\}") else 0
        if token.startswith(r"\begin"):
            step = 2  # its name closes one
        elif token.startswith(r"\end"):
            step = -1
        if step:
            depth += step
            found.append((match.end(), depth))
    return found


def _closed_spans(text: str) -> list[bool]:
    """Whether each position is inside of brackets."""
    inside, depth, last = [], 0, 0
    for position, after in _depths(text):
        inside += [depth > 0] * (position - last)
        depth, last = after, position
    return inside + [depth > 0] * (len(text) + 1 - last)


_TAKES_ARGUMENTS = re.compile(r"\\frac(?![a-zA-Z])|\\sqrt(?![a-zA-Z])|\^(?=\s*\()")


def _brace_arguments(text: str) -> str:
    """Write the arguments of fractions, roots and powers in braces: \\frac12, \\sqrt3, \\sqrt(x+1), x^(1/2)."""
    parts, position = list[str](), 0
    while (match := _TAKES_ARGUMENTS.search(text, position)) is not None:
        parts.append(text[position : match.end()])
        position = match.end()
        if match[0] == r"\sqrt" and (index := re.compile(r"\s*\[[^\]]*\]").match(text, position)):
            parts.append(index[0].strip())
            position = index.end()
        for _ in range(2 if match[0] == r"\frac" else 1):
            argument, position = _read_argument(text, position, match[0] != r"\frac")
            parts.append(f"{{{argument}}}")
    return "".join(parts) + text[position:]


_SPACES = re.compile(r"\s*")
_ARGUMENT = re.compile(r"\s*(\\[a-zA-Z]+|.)", re.DOTALL)
_NUMBER_ARGUMENT = re.compile(r"\s+(\d+(?:\.\d+)?)")  # √12 is the root of 12, and \sqrt12 in LaTeX that of 1, times 2


def _read_argument(text: str, position: int, in_parentheses: bool) -> tuple[str, int]:
    """Return the argument at a position without its braces, itself unified, and the position behind it."""
    spaces = _SPACES.match(text, position)
    start = position if spaces is None else spaces.end()
    if text[start : start + 1] == "{" or (in_parentheses and text[start : start + 1] == "("):
        end = read_group(text, start)
        return ("", len(text)) if end is None else (_brace_arguments(text[start + 1 : end - 1]), end)
    match = (_NUMBER_ARGUMENT if in_parentheses else _ARGUMENT).match(text, position) or _ARGUMENT.match(text, position)
    return ("", position) if match is None else (match[1], match.end())
