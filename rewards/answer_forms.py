"""The form of an answer: a number, an expression, words, a choice among letters, or several of them.

`read` decides what an answer is from its notation alone. It computes nothing and imports no algebra.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from rewards.notation import read_group, split_outside, to_latex
from rewards.typography import unify_typography

LONGEST = 2000
"""Number of characters above which a text is no mathematics."""
LARGEST_EXPONENT = 4000
"""Powers of ten above it are not computed."""


@dataclass(frozen=True)
class Number:
    """An integer, a decimal, a fraction of integers, a mixed or a scientific number."""

    value: Fraction
    literal: str
    digits: int | None = None
    """Number of significant digits of a decimal; None for a number that is exact."""
    percent: bool = False
    unit: str = ""


@dataclass(frozen=True)
class Based:
    """A number in the base that is written behind it."""

    literal: str
    base: str


@dataclass(frozen=True)
class Expression:
    """Any other mathematics, in LaTeX."""

    latex: str
    unit: str = ""


@dataclass(frozen=True)
class Words:
    """An answer that is no mathematics, in its normal form."""

    text: str


@dataclass(frozen=True)
class Choice:
    """A letter of multiple choice, with the answer that stands behind it."""

    label: str
    answer: Form | None = None


@dataclass(frozen=True)
class Relation:
    """An equation or an inequality."""

    sign: str
    left: Form
    right: Form
    name: str = ""
    """The left side of an equation that only names the right one: x, f(x), \\text{Area}, (x, y)."""


@dataclass(frozen=True)
class Group:
    """Several answers. The kind is list (1, 2), set, union, all (a < x < b), or the brackets of a tuple or an interval."""

    kind: str
    parts: tuple[Form, ...]


@dataclass(frozen=True)
class Matrix:
    """A matrix or a column."""

    rows: tuple[tuple[Form, ...], ...]


Form = Number | Based | Expression | Words | Choice | Relation | Group | Matrix


def read(text: str) -> Form:
    """Return the form of an answer. An empty text is empty words, and a text above `LONGEST` is words."""
    if len(text) > LONGEST:
        return Words(normalise_words(unify_typography(text)))
    form = _read(to_latex(text.strip(_AROUND).rstrip(_AROUND + ".")))
    in_dollars = isinstance(form, Number) and not form.unit and re.match(r"[\s${(]*[-−+]?\s*\\\$", text) is not None
    return replace(form, unit="dollar") if in_dollars and isinstance(form, Number) else form


def is_empty(form: Form) -> bool:
    """Whether there is no answer at all."""
    return form == Words("")


_AROUND = " \t\r\n*_`\"'"
_EDGES = re.compile(r"^(?:\s|[:,;.](?!\d)|=|\\approx(?![a-zA-Z])|\^\^?(?=\S*\^))+|[\s.,;:?\"]+$")
_BOX = re.compile(r"\\f?box(?:ed)?\s*\{")
_BRACE, _TEXT = re.compile(r"\{"), re.compile(r"\\text\s*\{")
_CHOICE = re.compile(r"\(?([A-Z])(?:\)\s*[.:]?|[.:](?=\s|$))\s*(?!and\b|or\b|[,;])(.*)|([A-Z])|\(?([a-z])\)", re.DOTALL)
_MATRIX = re.compile(r"[(\[]?\s*\\begin\{([pbBvV]?matrix|array)\}(?:\{[^}]*\})?(.*)\\end\{\1\}\s*[)\]]?", re.DOTALL)
_OR, _AND = re.compile(r"(?<![a-zA-Z\\])or(?![a-zA-Z])"), re.compile(r"(?<![a-zA-Z\\])and(?![a-zA-Z])")
_COMMA, _CUP, _IN = re.compile(r"[,;]"), re.compile(r"\\cup(?![a-zA-Z])"), re.compile(r"\\in(?![a-zA-Z])")
_SIGN = re.compile(r"<=|>=|!=|<|>|=")
_PLUS_MINUS = re.compile(r"\\[pm]{2}(?![a-zA-Z])")
_BRACKETS = {"(": "()", "[": "[]"}


def _read(text: str) -> Form:
    text = _unwrap(text)
    if (number := _read_scalar(text)) is not None:
        return number
    plain = re.sub(r"\\text\{([^{}]*)\}", r"\1", text).strip()
    if (match := _CHOICE.fullmatch(plain)) is not None:
        rest = re.sub(r"^\\text\{[^{}]*\}|^\(?[A-Z][).:]?\s*", "", text) if match[2] else ""
        return Choice((match[1] or match[3] or match[4]).upper(), _read(rest) if rest.strip() else None)
    if (match := _MATRIX.fullmatch(text)) is not None:
        return _read_matrix(match[2])
    return _read_several(text) or _read_bracketed(text) or _read_rest(text)


def _unwrap(text: str) -> str:
    """Remove what stands around an answer: punctuation, boxes, and braces."""
    while True:
        before = text
        text = _EDGES.sub("", text)
        for opening in (_BOX, _BRACE, _TEXT):
            match = opening.match(text)
            if match is not None and read_group(text, match.end() - 1) == len(text):
                text = text[match.end() : -1]
        if text == before:
            return text


def _read_several(text: str) -> Form | None:
    """Return lists, relations and unions; None for an answer of one part."""
    for separator, joins_all in ((_OR, False), (_COMMA, True), (_AND, True)):
        pieces = [piece for piece in split_outside(text, separator) if piece.strip()]
        if len(pieces) > 1:
            pieces = [re.sub(r"^\s*(?:and|or)\b(?=.*\S)", "", piece) for piece in pieces]
            return _join([_read(piece) for piece in pieces], joins_all)
    left, *rest = split_outside(text, _IN)
    if rest and _NAME.fullmatch(left.strip()):
        return _read(rest[0])
    sides = split_outside(text, _SIGN)
    if len(sides) > 1:
        return _read_relations(_signs_between(text, sides), sides)
    union = split_outside(text, _CUP)
    if len(union) > 1:
        return Group("union", tuple(map(_read, union)))
    return None


def _signs_between(text: str, sides: Sequence[str]) -> list[str]:
    """Return the signs between the sides into which they split a text."""
    signs, position = list[str](), 0
    for side in sides[:-1]:
        sign = _SIGN.match(text, position + len(side))
        assert sign is not None
        signs.append(sign[0])
        position = sign.end()
    return signs


def _read_relations(signs: Sequence[str], sides: Sequence[str]) -> Form:
    """Return an equation, of whose chain x = 2 + 3 = 5 the ends count; an inequality; or a chain of them."""
    if all(sign == "=" for sign in signs):
        first, last = sides[0].strip(), sides[-1]
        name = first if _NAME.fullmatch(first) else ""
        return Relation("=", _read(first), _read(last), name) if first else _read(last)
    forms = [_read(side) for side in sides]
    links = [Relation(*link) for link in zip(signs, forms, forms[1:], strict=False)]
    return links[0] if len(links) == 1 else Group("all", tuple(links))


def _join(parts: Sequence[Form], joins_all: bool) -> Form:
    """Return a list of parts; inequalities that hold at the same time are one condition."""
    flat = [
        each for part in parts for each in (part.parts if isinstance(part, Group) and part.kind == "list" else [part])
    ]
    bounds = joins_all and all(isinstance(part, Relation) and part.sign not in ("=", "!=") for part in flat)
    return Group("all" if bounds else "list", tuple(flat))


def _read_bracketed(text: str) -> Form | None:
    """Return a set, a tuple, an interval, or the answer in parentheses; None for other texts."""
    if text.startswith(r"\{") and read_group(text, 0) == len(text):
        return Group("set", tuple(_read(part) for part in split_outside(text[2:-2], _COMMA) if part.strip()))
    if text[:1] in _BRACKETS and text[-1:] in (")", "]") and read_group(text, 0) == len(text):
        parts = split_outside(text[1:-1], _COMMA)
        if len(parts) > 1:
            return Group(text[0] + text[-1], tuple(map(_read, parts)))
        if _BRACKETS[text[0]] == text[0] + text[-1]:
            return _read(text[1:-1])
    return None


def _read_matrix(body: str) -> Matrix:
    rows = [row for row in re.split(r"\\\\", body) if row.strip()]
    return Matrix(tuple(tuple(map(_read, row.split("&"))) for row in rows))


def _read_rest(text: str) -> Form:
    """Return two signed answers, words, or an expression."""
    if _PLUS_MINUS.search(text) and not _is_prose(text):
        plus = re.sub(r"^\s*\+", "", text.replace(r"\pm", "+").replace(r"\mp", "-"))
        return Group("list", (_read(plus), _read(text.replace(r"\pm", "-").replace(r"\mp", "+"))))
    body, unit = _split_unit(text)
    if not body or _is_prose(body):
        return Words(normalise_words(text))
    return Expression(re.sub(r"\s+", " ", body), unit)


_PLAIN = re.compile(r"(?<![a-zA-Z\\])[a-zA-Z]+")
_FORMULA = re.compile(r"(?=.*\d.*[A-Za-z]|.*[a-z]\d)(?:[A-Z][a-z]?(?:_?\{?\d+\}?)?){2,}")  # of chemistry: H2O
_VARIABLES = frozenset("abckmnpqrstuvwxyz")


def _is_prose(text: str) -> bool:
    """Whether a text contains words: three letters in a row, or two that are not both usual variables."""
    if r"\text" in text or ":" in text or not re.search(r"[0-9a-zA-Z]", text) or _FORMULA.fullmatch(text):
        return True
    bare = re.sub(r"\\[a-zA-Z]+|_\{[^{}]*\}", lambda match: " " * len(match[0]), text)
    runs = _PLAIN.findall(bare)
    whole = bare.replace(" ", "").isalpha()
    return any(len(run) > 3 or (whole and len(run) > 1 and not set(run) <= _VARIABLES) for run in runs) or (
        whole and len(runs) > 1 and "\\" not in text
    )


def normalise_words(text: str) -> str:
    """Return words without LaTeX, case, articles, quotes and spaces around punctuation."""
    bare = re.sub(
        r"\\(?:text\s*\{|[a-zA-Z]+)|[{}_\"`*]|\\", lambda m: "" if "text" in m[0] or len(m[0]) == 1 else m[0], text
    )
    bare = re.sub(r"\s*([^\w\s])\s*", r"\1", " ".join(bare.casefold().split()))
    return re.sub(r"^(?:an?|the) (?=\w)", "", bare).strip(" .,;:!?'")


_LETTERS = r"\(\s*[a-zA-Z](?:\s*,\s*[a-zA-Z])*\s*\)"
_NAME = re.compile(
    r"(?:\\text\{[^{}]*\}|[a-zA-Z ]+|(?:m\s*)?\\[a-zA-Z]+(?:\s+[a-zA-Z]+|\{[a-zA-Z]+\})?)\s*(?:_\{?\w+\}?)?'*"
    rf"(?:{_LETTERS})?|{_LETTERS}"
)
"""A side of an equation that only names the other side: x, x_1, f(x), (x, y), \\text{Area}, \\angle ABC."""


_UNITS = {
    name: unit
    for unit, names in {
        "mm": "millimeter millimetre",
        "cm": "centimeter centimetre",
        "m": "meter metre",
        "km": "kilometer kilometre",
        "in": "inch inches",
        "ft": "foot feet",
        "yd": "yard",
        "mi": "mile",
        "s": "sec second",
        "min": "minute",
        "h": "hr hour",
        "day": "",
        "week": "",
        "month": "",
        "year": "yr",
        "mg": "milligram",
        "g": "gram",
        "kg": "kilogram",
        "lb": "pound",
        "oz": "ounce",
        "ml": "milliliter millilitre",
        "l": "liter litre",
        "mph": "",
        "dollar": "usd",
        "euro": "",
        "cent": "",
        "degree": "deg",
        "radian": "rad",
        "unit": "",
    }.items()
    for name in (unit, *names.split())
}
_UNIT_TEXT = re.compile(
    r"\s*(?:\\text\{([^{}]*)\}|(?<![a-zA-Z\\_^{])([a-zA-Z.]+(?:[ /][a-zA-Z]+){0,3}))\s*(?:\^\{?([23])\}?)?$"
)
_FUNCTION = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)")
_DEGREES = re.compile(r"\s*\^\\circ\s*(?:\\text\{[CF]\}|[CF])?$")


def _split_unit(text: str) -> tuple[str, str]:
    """Return an answer without its unit, and the unit; the unit is empty if there is none, or an unknown one."""
    if (match := _DEGREES.search(text)) is not None:
        return (text, "") if _FUNCTION.search(text) else (text[: match.start()], "degree")
    match = _UNIT_TEXT.search(text)
    body = "" if match is None else text[: match.start()].strip()
    if match is None or not body:
        return text.strip(), ""
    if match[1] is not None:
        return (text.strip(), "") if _is_prose(body) else (body, _name_unit(match[1], match[3]))
    if body[-1] not in "0123456789})":
        return text.strip(), ""
    known, separate, behind_digit = bool(_name_unit(match[2], match[3])), text[len(body)] == " ", body[-1].isdigit()
    if (known and separate) or (behind_digit and len(match[2]) > (2 if separate else 1) and (known or separate)):
        return body, _name_unit(match[2], match[3])
    return text.strip(), ""


def _name_unit(words: str, power: str | None) -> str:
    names = words.lower().replace(".", "").split()
    if names and names[0] in ("square", "sq", "cubic"):
        power, names = {"cubic": "3"}.get(names[0], "2"), names[1:]
    name = " ".join(names)
    known = _UNITS.get(name) or _UNITS.get(name.removesuffix("s")) or ""
    return known + (power or "") if known else ""


_INTEGER = r"\d{1,3}(?:,\d{3})+(?!\d)|\d{1,3}(?: \d{3})+(?!\d)|\d+"
_DECIMAL = rf"(?:{_INTEGER})(?:\.\d*)?|\.\d+"
_NUMBER = re.compile(rf"([+-]?)\s*({_DECIMAL})")
_REPEATING = re.compile(r"([+-]?)\s*(\d*)\.(\d*)\\(?:overline|bar|dot)\s*\{?(\d+)\}?")
_SCIENTIFIC = re.compile(
    rf"([+-]?)\s*({_DECIMAL})\s*(?:[eE]([+-]?\d+)|(?:\\times|\\cdot|x)\s*10\s*\^\s*(?:\{{\s*([+-]?\d+)\s*\}}|([+-]?\d+)))"
)
_FRACTION = re.compile(
    rf"([+-]?)\s*(?:\\frac\{{\s*([+-]?)\s*({_INTEGER})\s*\}}\{{\s*([+-]?)\s*({_INTEGER})\s*\}}"
    rf"|({_INTEGER})\s*/\s*([+-]?)\s*({_INTEGER}))"
)
_MIXED = re.compile(r"([+-]?)\s*(\d+)\s*(?:\\frac\{\s*(\d+)\s*\}\{\s*(\d+)\s*\}|[\s]\s*(\d+)\s*/\s*(\d+))")
_PERCENT = re.compile(r"\s*(?:%|\\text\{\s*(?:percent|%)\s*\}|percent)(?:age)?\s*$")
_ORDINAL = re.compile(r"(?<=\d)\s*(?:\^?\{?\\text\{\s*(?:st|nd|rd|th)\s*\}\}?|\^?\{?(?:st|nd|rd|th)\}?)$")
_BASED = re.compile(r"([0-9][0-9A-Z]*|[A-Z]+[0-9][0-9A-Z]*)_\{?\s*(\d+|two|three|four|five|six|seven|eight|nine)\s*\}?")
_BASES = {"two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7", "eight": "8", "nine": "9"}


def _read_scalar(text: str) -> Form | None:
    """Return a number, with a percent sign or a unit, or one in a base; None for everything else."""
    if (match := _BASED.fullmatch(re.sub(r"\\text\{([^{}]*)\}", r"\1", text))) is not None:
        return Based(match[1].lstrip("0") or "0", _BASES.get(match[2], match[2]))
    percent = _PERCENT.search(text)
    body, unit = (text[: percent.start()], "") if percent else _split_unit(text)
    found = _read_number(_ORDINAL.sub("", body).strip())
    if found is None:
        return None
    value, literal, digits = found
    return Number(value, literal, digits, percent is not None, unit)


def _read_number(text: str) -> tuple[Fraction, str, int | None] | None:
    """Return the value, the literal and the number of significant digits of a number; None for anything else."""
    try:
        if match := _NUMBER.fullmatch(text):
            return _read_decimal(match[1], match[2])
        if match := _SCIENTIFIC.fullmatch(text):
            exponent = int(match[3] or match[4] or match[5])
            if abs(exponent) > LARGEST_EXPONENT:
                return None
            value, literal, digits = _read_decimal(match[1], match[2])
            return value * Fraction(10) ** exponent, f"{literal}e{exponent}", digits
        if match := _REPEATING.fullmatch(text):
            return _read_repeating(*match.groups())
        if match := _MIXED.fullmatch(text):
            sign, whole, above, below = match[1], match[2], match[3] or match[5], match[4] or match[6]
            part = Fraction(int(above), int(below))
            return None if part >= 1 else (_signed(sign, int(whole) + part), text, None)
        if match := _FRACTION.fullmatch(text):
            above, below = _to_int(match[3] or match[6]), _to_int(match[5] or match[8])
            value = _signed(
                match[1], _signed(match[2] or "", _signed(match[4] or match[7] or "", Fraction(above, below)))
            )
            return None if value.denominator == 1 and below != 1 and above != 0 else (value, text, None)
    except (ValueError, ZeroDivisionError):  # more digits than Python reads; a division by zero
        return None
    return None


def _read_decimal(sign: str, literal: str) -> tuple[Fraction, str, int | None]:
    plain = literal.replace(",", "").replace(" ", "")
    digits = None if "." not in plain else len(plain.replace(".", "").lstrip("0"))
    value = _signed(sign, Fraction(plain.rstrip(".") if plain.endswith(".") else plain))
    return value, plain, digits


def _read_repeating(sign: str, whole: str, fixed: str, repeated: str) -> tuple[Fraction, str, int | None]:
    scale = 10 ** len(fixed)
    value = Fraction(int(whole + fixed or "0"), scale) + Fraction(int(repeated), scale * (10 ** len(repeated) - 1))
    return _signed(sign, value), f"{whole}.{fixed}({repeated})", None


def _signed(sign: str, value: Fraction) -> Fraction:
    return -value if sign == "-" else value


def _to_int(text: str) -> int:
    return int(text.replace(",", "").replace(" ", ""))
