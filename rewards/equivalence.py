"""Comparison of an answer with the truth, as mathematics or as words.

    numbers      equal values. A decimal of at least six digits equals what it is the rounding of; others must be exact.
                 50% equals 0.5 and, the sign left out, 50. Units count only if both sides have one that is known.
    expressions  equal at random points to 80 digits, and by exact arithmetic if they are rational numbers
    lists, sets  the same parts in any order: 1, −2 equals x = −2 or x = 1, and 2 ± 1 equals {1, 3}
    tuples       equal parts in order, intervals with equal brackets too. x ∈ (1, 2] equals 1 < x ≤ 2
    equations    equal up to a factor. x = 5 equals 5, because its left side is only a name
    choices      equal letters: A, (A), \\textbf{(A)} 12
    words        equal up to case, articles, spaces and punctuation at the end

Where the truth is a number, the answer must be one: 47+38 or 170/2 is no answer where 85 is expected, because a model would
learn to repeat the question. 1/2 is a number, and so is 1.5e3.

This module runs in a worker (`rewards.workers`), because algebra may take forever.
"""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from latex2sympy2_extended import latex2sympy
from latex2sympy2_extended.latex2sympy2 import ConversionConfig
from sympy import E, Expr, Float, I, Rational, Symbol, simplify

from rewards.answer_forms import (
    Based,
    Choice,
    Expression,
    Form,
    Group,
    Matrix,
    Number,
    Relation,
    Words,
    is_empty,
    normalise_words,
    read,
)
from rewards.final_answer import final_answers, stated_answer
from rewards.patterns import last_match

CACHED = 4096
"""Number of expressions, truths and judged texts that are cached: samples of a prompt are often equal."""
ROUNDED_DIGITS = 6
"""Significant digits from which on a decimal may be a rounded value."""
DIGITS, AGREEMENT = 100, 80
"""Digits to which expressions are evaluated, and in which equal ones agree."""
POINTS = 4
MOST_PARTS = 200
"""Longer lists are not compared: it takes quadratic time in any order."""


def judge(truths: Sequence[str], text: str, extract: str | None) -> float | None:
    """Return 1 if the text's answer equals one of the truths, else 0; None if there is no truth.

    extract: a regular expression whose last match contains the answer, in the place of the whole text.
    """
    return _judge(tuple(truths), text, extract)


@functools.lru_cache(CACHED)
def _judge(truths: tuple[str, ...], text: str, extract: str | None) -> float | None:
    accepted = [truth for truth in map(_read_truth, truths) if not is_empty(truth)]
    if not accepted:
        return None
    found = [text] if extract is None else last_match(extract, text)
    answers = [read(answer) for part in found for answer in final_answers(part)]
    return float(any(_is_equal(truth, answer) for answer in answers if not is_empty(answer) for truth in accepted))


def _is_equal(truth: Form, answer: Form) -> bool:
    """Compare two answers. An answer that algebra cannot deal with differs from the truth."""
    try:
        return equal(truth, answer)
    except MemoryError:
        raise
    except Exception:  # of any kind: a nesting that is too deep, a division by zero
        return False


@functools.lru_cache(CACHED)
def _read_truth(truth: str) -> Form:
    return read(stated_answer(truth))


def equal(truth: Form, answer: Form) -> bool:
    """Whether an answer equals the truth. The form of the truth decides which forms of an answer are possible."""
    if truth == answer:
        return True
    match truth, answer:
        case (Choice(), _) | (_, Choice()):
            return _equal_choices(truth, answer)
        case Relation(sign="="), Relation(sign="="):
            return _equal_equations(truth, answer)
        case Relation(sign="="), _:
            return truth.name != "" and equal(truth.right, answer)
        case _, Relation(sign="="):  # not an equation such as 2x − y = 0 where 0 is expected
            return (answer.name != "" or _value(answer.right) != 0) and equal(truth, answer.right)
        case (Relation() | Group(kind="all"), _) | (_, Relation() | Group(kind="all")):
            return _equal_conditions(truth, answer)
        case Group(), Group():
            return _equal_groups(truth, answer)
        case Group(kind="list" | "set"), _:
            return len(distinct := _distinct(truth)) == 1 and equal(distinct[0], answer)
        case _, Group(kind="list" | "set"):
            return len(distinct := _distinct(answer)) == 1 and equal(truth, distinct[0])
        case Matrix(), Matrix():
            return len(truth.rows) == len(answer.rows) and all(map(_equal_in_order, truth.rows, answer.rows))
        case _:
            return _equal_scalars(truth, answer)


def _equal_scalars(truth: Form, answer: Form) -> bool:
    match truth, answer:
        case Number(), Number():
            return _same_units(truth.unit, answer.unit) and _equal_numbers(truth, answer)
        case Based(), Based():
            return False
        case (Based(literal=one), Number(literal=other)) | (Number(literal=one), Based(literal=other)):
            return one == other
        case Expression(), Expression():
            return _same_units(truth.unit, answer.unit) and _equal_expressions(truth.latex, answer.latex)
        case Expression(), Number():
            return _same_units(truth.unit, answer.unit) and _is_value_of(truth.latex, answer)
        case (Words(text=words), Expression(latex=latex)) | (Expression(latex=latex), Words(text=words)):
            return words == normalise_words(latex)
        case _:
            return False


def _equal_choices(truth: Form, answer: Form) -> bool:
    """Compare the letters and the answers behind them, as far as both sides have them."""
    one, other = _as_choice(truth), _as_choice(answer)
    if one.label and other.label and one.label != other.label:
        return False
    if one.answer is None or other.answer is None:
        return one.label == other.label
    return equal(one.answer, other.answer)


def _as_choice(form: Form) -> Choice:
    """Return the form as a choice: a single letter, or an answer without a letter."""
    if isinstance(form, Choice):
        return form
    if isinstance(form, Expression) and re.fullmatch("[a-z]", form.latex):
        return Choice(form.latex.upper())
    return Choice("", form)


def _same_units(one: str, other: str) -> bool:
    return not (one and other) or one == other


def _equal_numbers(truth: Number, answer: Number) -> bool:
    if truth.percent == answer.percent:
        return _agree(truth, answer, Fraction(1))
    # The sign may be left out where the number of percent is above 1. Below 1, a number without a sign is a share.
    left_out = truth.value == answer.value and abs(truth.value) > 1
    return left_out or _agree(truth, answer, Fraction(1, 100) if answer.percent else Fraction(100))


def _agree(truth: Number, answer: Number, scale: Fraction) -> bool:
    """Whether truth = scale · answer, or whether the one that is a decimal is the other one, rounded."""
    if truth.value == scale * answer.value:
        return True
    if (truth.digits is None) == (answer.digits is None):
        return False
    return _rounds(answer, truth.value / scale) if truth.digits is None else _rounds(truth, scale * answer.value)


def _rounds(decimal: Number, exact: Any) -> bool:
    """Whether a decimal of at least six digits differs from a value by at most half a unit of its last digit."""
    mantissa, _, exponent = decimal.literal.partition("e")
    unit = Fraction(10) ** (int(exponent or 0) - len(mantissa.partition(".")[2]))
    return (decimal.digits or 0) >= ROUNDED_DIGITS and bool(2 * abs(exact - decimal.value) <= unit)


def _equal_groups(truth: Group, answer: Group) -> bool:
    kinds = {truth.kind, answer.kind}
    if kinds <= {"list", "set", "union"}:
        by_name = _are_named(truth) != _are_named(answer)  # x = 1, y = 2 against 1, 2
        return (_equal_in_order if by_name else _equal_in_any_order)(_distinct(truth), _distinct(answer))
    return (len(kinds) == 1 or kinds == {"list", "()"}) and _equal_in_order(truth.parts, answer.parts)


def _distinct(group: Group) -> tuple[Form, ...]:
    return tuple(dict.fromkeys(group.parts))


def _are_named(group: Group) -> bool:
    names = {part.name for part in group.parts if isinstance(part, Relation) and part.name}
    return len(names) == len(group.parts)


def _equal_in_order(truths: Sequence[Form], answers: Sequence[Form]) -> bool:
    return len(truths) == len(answers) and all(map(equal, truths, answers))


def _equal_in_any_order(truths: Sequence[Form], answers: Sequence[Form]) -> bool:
    if not len(truths) == len(answers) <= MOST_PARTS:
        return False
    left = list(answers)
    for truth in truths:
        partner = next((answer for answer in left if equal(truth, answer)), None)
        if partner is None:
            return False
        left.remove(partner)
    return True


def _equal_equations(truth: Relation, answer: Relation) -> bool:
    if truth.name and normalise_words(truth.name) == normalise_words(answer.name):
        return equal(truth.right, answer.right)
    return _equal_relations(truth, answer)


def _equal_conditions(truth: Form, answer: Form) -> bool:
    """Compare inequalities, or chains of them, with each other or with intervals."""
    variable = next(filter(None, map(_find_variable, (truth, answer))), Expression("x"))
    left = _as_conditions(answer, variable)
    for condition in (conditions := _as_conditions(truth, variable)):
        partner = next((each for each in left if _equal_relations(condition, each)), None)
        if partner is None:
            return False
        left.remove(partner)
    return bool(conditions) and not left


_ENDS = {"(": "<", ")": "<", "[": "<=", "]": "<="}


def _as_conditions(form: Form, variable: Expression) -> list[Relation]:
    """Return the inequalities that a form stands for; none if it is no condition."""
    match form:
        case Relation():
            return [form]
        case Group(kind="all", parts=parts):
            return [part for part in parts if isinstance(part, Relation)]
        case Group(kind="()" | "[]" | "(]" | "[)" as brackets, parts=(low, high)):
            ends = [Relation(_ENDS[brackets[0]], low, variable), Relation(_ENDS[brackets[1]], variable, high)]
            return [end for end in ends if not {r"\infty", r"-\infty"} & {_latex(end.left), _latex(end.right)}]
    return []


def _find_variable(form: Form) -> Expression | None:
    """Return the side of a condition that is a single letter."""
    relations = form.parts if isinstance(form, Group) else (form,)
    sides = [side for each in relations if isinstance(each, Relation) for side in (each.left, each.right)]
    return next((side for side in sides if isinstance(side, Expression) and len(side.latex) == 1), None)


def _latex(form: Form) -> str:
    return form.latex.replace(" ", "").lstrip("+") if isinstance(form, Expression) else ""


def _equal_relations(truth: Relation, answer: Relation) -> bool:
    """Whether both relations compare the same difference with 0, up to a factor, which is positive for inequalities."""
    kinds = {_KINDS[truth.sign], _KINDS[answer.sign]}
    one, other = _difference(truth), _difference(answer)
    if len(kinds) == 2 or one is None or other is None:
        return False
    pairs = [(_at(one, point), _at(other, point)) for point in range(POINTS)]
    if any(a is None or b is None or a == 0 or b == 0 for a, b in pairs):
        return bool(one == other)
    ratios = [a / b for a, b in pairs]
    directed = kinds <= {"<", "<="}
    return all(_agree_in_digits(ratio, ratios[0]) for ratio in ratios) and (not directed or _is_positive(ratios[0]))


_KINDS = {"=": "=", "!=": "!=", "<": "<", ">": "<", "<=": "<=", ">=": "<="}


def _difference(relation: Relation) -> Any:
    """Return the expression that is 0 in an equation, and above 0 in an inequality; None if it cannot be parsed."""
    left, right = _value(relation.left), _value(relation.right)
    if left is None or right is None:
        return None
    return right - left if relation.sign.startswith("<") else left - right


def _value(form: Form) -> Any:
    """Return a number or an expression for sympy; None for other forms, and if it cannot be parsed."""
    if isinstance(form, Number):
        return Rational(form.value.numerator, form.value.denominator)
    return _parse(form.latex) if isinstance(form, Expression) else None


def _equal_expressions(truth: str, answer: str) -> bool:
    if truth.replace(" ", "") == answer.replace(" ", ""):
        return True
    one, other = _parse(truth), _parse(answer)
    if one is None or other is None:
        return False
    return _equal_values(one, other)


def _is_value_of(truth: str, answer: Number) -> bool:
    """Whether a number is the value of an expression, exactly or rounded."""
    value = _parse(truth)
    if value is None or value.free_symbols:
        return False
    scale = Fraction(1, 100) if answer.percent else Fraction(1)
    exact = scale * answer.value
    if _equal_values(value, Rational(exact.numerator, exact.denominator)):
        return True
    number = _at(value, 0)
    return number is not None and number.is_real is True and _rounds(answer, number / scale)


def _equal_values(one: Any, other: Any) -> bool:
    """Whether two expressions are equal: at random points, or as simplified if they have no value there."""
    if one == other:
        return True
    for point in range(POINTS):
        values = _at(one, point), _at(other, point)
        if values[0] is None or values[1] is None:
            return bool(simplify(one - other) == 0)
        if not _agree_in_digits(*values):
            return False
    difference = one - other if one.free_symbols or other.free_symbols else (one - other).doit()
    return not (difference.is_Rational and difference != 0)


def _agree_in_digits(one: Any, other: Any) -> bool:
    return bool(
        abs(one - other) <= Float(10, DIGITS) ** -AGREEMENT * max(abs(one), abs(other), Float(10) ** -AGREEMENT)
    )


def _is_positive(value: Any) -> bool:
    return value.is_real is True and bool(value > 0)


def _at(expression: Any, point: int) -> Any:
    """Return the value where the symbols are random numbers, of either sign after the first point; None if there is none."""
    values = {symbol: _draw(f"{symbol} {point}", signed=point > 0) for symbol in expression.free_symbols}
    number = expression.evalf(DIGITS, subs=values)
    return number if number.is_number and number.is_finite and not number.free_symbols else None


def _draw(seed: str, signed: bool) -> Any:
    chance = random.Random(seed)
    return Rational(chance.randint(301, 1200), chance.choice((-300, 300)) if signed else 300)


_DECIMAL = re.compile(r"\d*\.\d+|\d+\.")


@functools.lru_cache(CACHED)
def _parse(latex: str) -> Any:
    """Return an expression of sympy; None if it cannot be parsed. Decimals are exact, i is √−1 and e Euler's number."""
    exact = _DECIMAL.sub(lambda match: "{{\\frac{{{}}}{{{}}}}}".format(*Fraction(match[0]).as_integer_ratio()), latex)
    degrees = exact.replace(r"^\circ", r"\cdot{\frac{\pi}{180}}")
    try:
        config = ConversionConfig(lowercase_symbols=False)
        parsed = latex2sympy(degrees, is_real=True, normalization_config=None, conversion_config=config)
        return parsed.subs({Symbol("i", real=True): I, Symbol("e", real=True): E}) if isinstance(parsed, Expr) else None
    except Exception:  # of many kinds
        return None
