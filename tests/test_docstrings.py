"""Docstrings of public names begin with an imperative verb or a noun phrase. The first word decides, by lists."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import pytest

from difrl.runtime.paths import PACKAGE

ROOT = PACKAGE.parent
PACKAGES = ("difrl", "samplers", "rewards")
QUESTIONS = "what which who whose whom where when why how wherever whenever whatever whichever"
PREPOSITIONS = """
    of in at by for from with without to on onto over under between among after before behind beside besides as like unlike
    into through per during until till within across against along around about above below beyond inside outside since
    towards toward up down off out upon via
"""
PRONOUNS = """
    i you he she it we they me him us them my your his her its our their mine yours this that these those nothing everything
    something anything everybody somebody nobody anybody everyone someone whoever there here such
"""
CONJUNCTIONS = "if unless because while though although and but or nor so then than not only also yet"
AUXILIARIES = "is are was were has have had does did can could may might must shall should will would goes"
VERBS = """
    returns writes reads makes loads builds trains gives takes computes evaluates calculates creates generates
    raises checks keeps finds gets holds adds removes converts applies asks says tells knows wants wraps turns puts
    brings begins saves stores collects chooses selects picks decides declares mends
    registers installs imports imitates parses formats renders normalises
    combines reduces replaces restores resumes waits serves listens sends receives
    yields iterates lets leaves requires expects accepts allows describes represents contains provides
    implements handles manages controls performs executes runs
"""
VERBS_OR_NOUNS = """
    sums averages draws calls starts stops plots estimates measures counts splits
    moves updates shows prints clips joins merges means uses needs
"""
DETERMINERS = "a an the this these those every each all any some its their his her your one two both another"

BANNED = set(f"{QUESTIONS} {PREPOSITIONS} {PRONOUNS} {CONJUNCTIONS} {AUXILIARIES} {VERBS}".split())


class Documented(NamedTuple):
    """A public name with a docstring."""

    where: str
    docstring: str
    is_bool: bool
    """A field of this type, or a function that returns it. Their docstrings may begin with "Whether"."""


def find_problem(docstring: str, is_bool: bool = False) -> str | None:
    """Return the word or the two words that break the rule, if any."""
    words = re.findall(r"\S+", docstring)
    first, second = ([word.strip("`\"'“”().,:;?!…*") for word in words] + ["", ""])[:2]
    if first.lower() == "whether":
        return None if is_bool else first
    if first.lower() in BANNED:
        return first
    if first.lower() in VERBS_OR_NOUNS.split():
        is_noun = not second or second.lower() in f"{PREPOSITIONS} {CONJUNCTIONS} that which".split()
        return None if is_noun else f"{first} {second}"
    # "Scores of B samples" is a noun phrase, "Scores the samples" is a verb in the third person.
    if re.fullmatch(r"[A-Z]?[a-z]+s", first) and not first.endswith("ss") and second.lower() in DETERMINERS.split():
        return f"{first} {second}"
    return None


def find_documented(path: str, source: str) -> Iterator[Documented]:
    """Yield the public names of a module that have a docstring: module, classes, functions, methods, fields."""
    tree = ast.parse(source)
    if docstring := ast.get_docstring(tree):
        yield Documented(f"{path}:1", docstring, False)
    yield from _members(path, tree)


def _members(path: str, scope: ast.Module | ast.ClassDef) -> Iterator[Documented]:
    for node, following in pairwise([*scope.body, None]):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if re.match(r"_(?!_)", node.name):
                continue
            returns = None if isinstance(node, ast.ClassDef) else node.returns
            if docstring := ast.get_docstring(node):
                yield Documented(f"{path}:{node.lineno} {node.name}", docstring, _is_bool(returns))
            if isinstance(node, ast.ClassDef):
                yield from _members(path, node)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            private = all(isinstance(target, ast.Name) and target.id.startswith("_") for target in targets)
            match following:
                case ast.Expr(value=ast.Constant(value=str(docstring))) if not private:
                    annotation = node.annotation if isinstance(node, ast.AnnAssign) else None
                    yield Documented(f"{path}:{following.lineno}", docstring, _is_bool(annotation))


def _is_bool(annotation: ast.expr | None) -> bool:
    return annotation is not None and ast.unparse(annotation) in ("bool", "bool | None")


FILES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
NAMES = [path.relative_to(ROOT).as_posix() for path in FILES]


@pytest.mark.parametrize("name", NAMES)
def test_docstrings_begin_with_a_verb_or_a_noun(name: str) -> None:
    documented = find_documented(name, (ROOT / name).read_text(encoding="utf-8"))
    broken = [
        f"{one.where}: begins with “{problem}”: {one.docstring.splitlines()[0]}"
        for one in documented
        if (problem := find_problem(one.docstring, one.is_bool))
    ]
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize(
    "docstring",
    [
        "What a file holds.",
        "Of a run whose prompts have so many tokens each.",
        "Where training ends.",
        "Returns the loss.",
        "Trains the decoder.",
        "Scores the samples.",
        "Measures pi_w.",
        "It is the loss.",
        "Nothing to move.",
        "With an anchor.",
        "`What` a run needs.",
        "Whether it is one.",
        "If there is one.",
    ],
)
def test_other_beginnings_are_found(docstring: str) -> None:
    assert find_problem(docstring)


@pytest.mark.parametrize(
    "docstring",
    [
        "Return the loss.",
        "Number of groups a step.",
        "The recipe's table.",
        "Scores of B samples.",
        "Sums over decisions.",
        "[B, D] float32.",
        "`difrl pretrain FILE`: the command.",
        "π* ∝ ref exp(r/β).",
        "Rows that no call has taken.",
        "||out - ref||^2 per sample.",
    ],
)
def test_verbs_and_nouns_pass(docstring: str) -> None:
    assert find_problem(docstring) is None


def test_whether_is_for_booleans() -> None:
    assert find_problem("Whether it is one.", is_bool=True) is None


def test_every_public_docstring_is_seen() -> None:
    source = '''
"""M"""
LIMIT = 3
"""F"""
_hidden = 3
"""not seen"""
def f() -> bool:
    """B"""
def _g():
    """not seen"""
class C:
    """C"""
    field: bool
    """D"""
    def method(self) -> int:
        """E"""
    def __call__(self):
        """G"""
class _D:
    """not seen"""
'''
    found = [(one.docstring, one.is_bool) for one in find_documented("m.py", source)]
    assert found == [("M", False), ("F", False), ("B", True), ("C", False), ("D", True), ("E", False), ("G", False)]
