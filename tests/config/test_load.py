"""Recipes are read strictly, in layers. Every error gives file, line, key, the value found and the value expected."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict

from difrl import config
from difrl.config import RunConfig
from difrl.config.load import (
    expand_preset,
    load_mapping,
    read_config,
    read_model,
    recipe_summary,
    to_yaml,
)
from difrl.config.presets import PRESETS
from difrl.config.schema.kernels import KERNEL_ENTRIES
from difrl.config.yaml_source import ConfigError, parse
from difrl.runtime import paths
from samplers import kernels
from tests.recipes import NAMED

BASE = """\
# A test.
algorithm: flow_grpo
model: {path: tiny-sd3}
data: {train: "shapes:train"}
rewards:
  - name: geneval
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(folder: Path, text: str) -> str:
    (folder / "recipe.yaml").write_text(text, encoding="utf-8")
    return "recipe.yaml"


def problems(folder: Path, text: str, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        read_config(write(folder, text), overrides)
    assert str(caught.value) == "\n".join(caught.value.problems)
    return list(caught.value.problems)


def test_layers_preset_file_overrides(folder: Path) -> None:
    text = BASE + "rollout: {noise_level: 0.5}\ntrain: {lr: 3e-5}\n"
    run = read_config(write(folder, text), ["train.steps=7", "rewards.0.weight=2", "rollout.steps=8"])
    assert run.rollout.kernel == "flow_sde"  # the preset's
    assert (run.rollout.noise_level, run.rollout.steps, run.train.steps) == (0.5, 8, 7)
    assert run.train.lr == 3e-5
    assert run.rewards[0].name == "geneval"
    assert run.rewards[0].weight == 2.0


def test_lists_are_replaced_whole_and_patched_by_number(folder: Path) -> None:
    assert read_config(write(folder, BASE + "anchors: []\n")).anchors == []
    patched = read_config(write(folder, BASE), ["anchors.0.coefficient=0.5"]).anchors
    assert [(a.to, a.divergence, a.coefficient) for a in patched] == [("base", "gaussian", 0.5)]


def test_another_kind_replaces_the_section(folder: Path) -> None:
    text = BASE + "likelihood: {kind: forward}\nanchors: []\n"
    assert read_config(write(folder, text)).likelihood == config.ForwardLikelihood(kind="forward")
    # In whatever order overrides are given.
    overrides = ["likelihood.weighting=t", "anchors=[]", "likelihood.kind=forward"]
    likelihood = read_config(write(folder, BASE), overrides).likelihood
    assert likelihood == config.ForwardLikelihood(kind="forward", weighting="t")


def test_an_override_may_choose_the_preset(folder: Path) -> None:
    run = read_config(write(folder, BASE), ["algorithm=cps"])
    assert (run.algorithm, run.rollout.kernel, run.anchors) == ("cps", "cps", [])


def test_expand_and_load_mapping(folder: Path) -> None:
    assert expand_preset({"seed": 1}) == {"seed": 1}
    assert expand_preset({"algorithm": "cps", "rollout": {"noise_level": 0.1}})["rollout"] == {
        **PRESETS["cps"].settings["rollout"],
        "noise_level": 0.1,
    }
    assert load_mapping(write(folder, "a: {b: 1e-4}\n"), ["a.c=[1, x]"]) == {"a": {"b": 1e-4, "c": [1, "x"]}}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train:\n  lrr: 1e-4\n", "recipe.yaml:8: train.lrr: unknown key; did you mean train.lr?"),
        ("train:\n  steps: ten\n", "recipe.yaml:8: train.steps: expected a whole number, found 'ten'"),
        ("train:\n  steps: '10'\n", "recipe.yaml:8: train.steps: expected a whole number, found '10'"),
        ("train:\n  steps: 1.5\n", "recipe.yaml:8: train.steps: expected a whole number, found 1.5"),
        ("train:\n  steps: -3\n", "recipe.yaml:8: train.steps: expected more than 0, found -3"),
        ("train:\n  lr: .nan\n", "recipe.yaml:8: train.lr: expected a finite number, found nan"),
        ("train:\n", "recipe.yaml:7: train: expected a mapping, found nothing"),
        ("lr: 1\n", "recipe.yaml:7: lr: unknown key here; did you mean train.lr?"),
        (
            "steps: 1\n",
            "recipe.yaml:7: steps: unknown key here; did you mean rollout.steps, train.steps or eval.steps?",
        ),
        ("checkpoint: {zzz: 1}\n", "recipe.yaml:7: checkpoint.zzz: unknown key; expected one of every, keep"),
        ("tensorboard: yes\n", "recipe.yaml:7: tensorboard: expected true or false, found 'yes'"),
        ("output_dir: 3\n", "recipe.yaml:7: output_dir: expected text, found 3"),
        ("watch: judge\n", "recipe.yaml:7: watch: expected a list, found 'judge'"),
        ("watch:\n- name: 5\n", "recipe.yaml:8: watch.0.name: expected text, found 5; put it in quotes"),
        (
            "watch:\n\n- weight: 1\n",
            "recipe.yaml:9: watch.0: give a reward either a name, an import or an ensemble, e.g. `- name: geneval`",
        ),
        (
            "rollout: {kernel: flowsde}\n",
            "recipe.yaml:7: rollout.kernel: expected 'ode', 'ddim', 'cps', 'precise', 'flow_sde' or 'dance_sde', "
            "found 'flowsde'; did you mean flow_sde?",
        ),
        (
            "likelihood: {kind: revers}\n",
            "recipe.yaml:7: likelihood.kind: expected reverse, forward or tokens, found 'revers'; did you mean reverse?",
        ),
        (
            "likelihood:\n  weighting: t\n",
            "recipe.yaml:8: likelihood.weighting: not a key of kind: reverse; it belongs to kind: forward",
        ),
        (
            "likelihood: {kind: forward, times: {low: 0.1}}\n",
            "recipe.yaml:7: likelihood.times.kind: missing; expected grid, uniform or logit_normal",
        ),
        (
            "train: {lr: fast}\n",
            "recipe.yaml:7: train.lr: expected a number, or a mapping with kind: constant, linear or cosine, "
            "found 'fast'",
        ),
        (
            "train: {lr: {kind: linaer}}\n",
            "recipe.yaml:7: train.lr.kind: expected constant, linear or cosine, found 'linaer'; did you mean linear?",
        ),
        (
            "train: {lr: {value: 1, start: 1}}\n",
            "recipe.yaml:7: train.lr.start: not a key of kind: constant; it belongs to kind: linear or cosine",
        ),
        (
            "snapshots: {ema: {dekay: 0.9}}\n",
            "recipe.yaml:7: snapshots.ema.dekay: unknown key; did you mean snapshots.ema.decay?",
        ),
        (
            "data: {train: p.txt}\n",
            "recipe.yaml:7: data: given twice, first in line 4; remove one",
        ),
        ("7: 8\n", "recipe.yaml:7: the top level: a key must be text, found 7; put it in quotes"),
        ("seed: &a [*a]\n", "recipe.yaml:7: seed.0: an alias that contains itself"),
        ("seed: !!python/name:os.system 3\n", "recipe.yaml:7: seed: cannot read '3' as !!python/name:os.system"),
        ("train: {steps: 3\nseed: 1\n", "recipe.yaml:8: not valid YAML: expected ',' or '}', but got ':'"),
    ],
)
def test_an_error_gives_place_cause_and_advice(folder: Path, text: str, expected: str) -> None:
    assert problems(folder, BASE + text) == [expected]


def test_all_errors_are_reported_in_the_order_of_the_file(folder: Path) -> None:
    text = BASE + "eval: {every: -1}\ntrain: {steps: x, lrr: 1}\nseed: a\n"
    lines = [line.split(": ")[:2] for line in problems(folder, text, "checkpoint.every=no")]
    assert lines == [
        ["recipe.yaml:7", "eval.every"],
        ["recipe.yaml:8", "train.steps"],
        ["recipe.yaml:8", "train.lrr"],
        ["recipe.yaml:9", "seed"],
        ["override 'checkpoint.every=no'", "checkpoint.every"],
    ]


def test_missing_sections_come_with_their_description(folder: Path) -> None:
    found = problems(folder, "seed: 1\n")
    assert [line.split(": ")[1] for line in found] == ["model", "data", "rewards", "likelihood", "objective"]
    assert found[0] == "recipe.yaml:1: model: missing (the model that is trained, e.g. model: {path: tiny-sd3})"
    assert "algorithm: awm" in found[3]
    assert problems(folder, "# A comment.\n\nseed: 1\n")[0].startswith("recipe.yaml:3: model: missing")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.lrr=3", "override 'train.lrr=3': train.lrr: unknown key; did you mean train.lr?"),
        ("train.steps=", "override 'train.steps=': train.steps: expected a whole number, found nothing"),
        ("train.steps", "override 'train.steps': expected key.path=value, e.g. train.steps=50"),
        (".steps=3", "override '.steps=3': expected key.path=value, e.g. train.steps=50"),
        ("rewards.1.weight=2", "override 'rewards.1.weight=2': there is no entry 1, the list has entries 0 to 0"),
        ("watch.0.weight=2", "override 'watch.0.weight=2': watch: expected a list, found a mapping"),
        ("seed=[1", "override 'seed=[1': not valid YAML: expected ',' or ']', but got '<stream end>'"),
        (
            "algorithm=awmm",
            "override 'algorithm=awmm': algorithm: no preset is called 'awmm'; did you mean awm? "
            f"Presets: {', '.join(PRESETS)}",
        ),
    ],
)
def test_an_override_is_named_in_its_error(folder: Path, override: str, expected: str) -> None:
    assert problems(folder, BASE, override) == [expected]


@pytest.mark.parametrize(
    ("overrides", "path"),
    [
        (["rollout.kernel=ode", "rollout.noise_level=0.0"], "rollout.kernel"),
        (["rollout.noise_level=0"], "rollout.noise_level"),
        (["rollout.kernel=cps", "rollout.noise_level=1.5"], "rollout.noise_level"),
        (["rollout.solver=UniPCMultistepScheduler"], "rollout.solver"),
        (["likelihood.kind=forward", "anchors=[]", "rollout.solver=UniPCMultistepScheduler"], "rollout.solver"),
        (["likelihood.kind=forward"], "anchors.0.divergence"),
        (
            ["likelihood={kind: forward, times: {kind: uniform, low: 0.5, high: 0.5}}", "anchors=[]"],
            "likelihood.times.low",
        ),
        (["likelihood={kind: forward, weighting: elbo}", "anchors=[]"], "likelihood.times.kind"),
        (
            ["likelihood={kind: forward, weighting: elbo, error: clean, times: {kind: uniform}}", "anchors=[]"],
            "likelihood.error",
        ),
        (
            [
                *("likelihood={kind: forward}", "anchors=[]", "rollout.kernel=ode", "rollout.noise_level=0"),
                "rollout.window={kind: fixed}",
            ],
            "rollout.window.kind",
        ),
        (["rollout.window.size=2"], "rollout.window.size"),
        (["rollout.window.start=2"], "rollout.window.start"),
        (["rollout.window={kind: fixed, start: 8, size: 2}"], "rollout.window"),
        (["rollout.window={kind: random, end: 10}"], "rollout.window.end"),
        (["rollout.window={kind: random, start: 3, end: 5, size: 3}"], "rollout.window"),
        (["rollout.window={kind: sliding, size: 4, end: 3}"], "rollout.window"),
        (["rollout.window={kind: sliding, size: 10}"], "rollout.window"),
        (["rollout.window={kind: fixed, end: 5}"], "rollout.window.end"),
        (["train.updates_per_step=5"], "train.updates_per_step"),
        (["train.updates_per_step=2", "likelihood.old=detach"], "likelihood.old"),
        (["likelihood.old=recompute"], "likelihood.old"),
        (["anchors.0.to=emma"], "anchors.0.to"),
        (["anchors=[{to: base}, {to: base}]"], "anchors.1.to"),
        (["rollout.snapshot=slow"], "rollout.snapshot"),
        (["snapshots.base.decay=0.5"], "snapshots.base"),
        (["watch=[{name: judge}, {import: 'my.module:judge'}]"], "watch.1"),
    ],
)
def test_conflicting_settings_are_refused(folder: Path, overrides: list[str], path: str) -> None:
    (found,) = problems(folder, BASE, *overrides)
    assert f": {path}: " in found
    # The place is that of the setting to change: an override, or a part of the preset that conflicts with an override.
    assert found.startswith("preset flow_grpo: " if path == "anchors.0.divergence" else "override '")


def test_highest_noise_levels_are_those_of_the_kernels() -> None:
    highest = {name: entry.highest for name, entry in kernels.KERNELS.items()}
    assert {name: KERNEL_ENTRIES[name].highest_noise for name in highest} == highest


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1.5E+3", 1500.0),
        (".5", 0.5),
        ("-.inf", float("-inf")),
        ("10", 10),
        ("0x1F", 31),
        ("012", "012"),
        ("1_000", "1_000"),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("no", "no"),
        ("True", True),
        ("~", None),
        ("'1e-4'", "1e-4"),
        ("shapes:train", "shapes:train"),
    ],
)
def test_scalars_are_yaml_1_2(text: str, value: object) -> None:
    found = parse(f"key: {text}", "t").data["key"]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize("name", PRESETS)
def test_to_yaml_reads_back_equal(folder: Path, name: str) -> None:
    named = [f"{section}={json.dumps(value)}" for section, value in NAMED.get(name, {}).items()]
    schedule = "train.lr={kind: cosine, start: 1e-5, end: 0}"
    run = read_config(write(folder, BASE), [f"algorithm={name}", schedule, *named])
    written = to_yaml(run)
    assert read_config(write(folder, written)) == run
    assert to_yaml(read_config("recipe.yaml")) == written
    assert list(load_mapping("recipe.yaml")) == list(RunConfig.model_fields)


class Anything(BaseModel):
    model_config = ConfigDict(strict=True)
    items: dict[str, list[str | int | float | bool | None]]


@settings(max_examples=50)
@given(
    st.dictionaries(
        st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"])),
        st.lists(
            st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]))
            | st.sampled_from(["1e-4", "1.5e3", "0o17", "no", "null", "~", "012", "#", "- a", "a: b", "<<", "="])
            | st.integers()
            | st.floats(allow_nan=False, allow_infinity=False)
            | st.booleans()
            | st.none()
        ),
    )
)
def test_any_values_read_back_equal(items: dict[str, list[str | int | float | bool | None]]) -> None:
    assert parse(to_yaml(Anything(items=items)), "t").data == {"items": items}


def test_other_models_are_read_alike(folder: Path) -> None:
    class Stage(config.Section):
        steps: int
        work: Path

    name = write(folder, "steps: x\nwrok: a\n")
    with pytest.raises(ConfigError) as caught:
        read_model(Stage, name)
    assert caught.value.problems == (
        "recipe.yaml:1: steps: expected a whole number, found 'x'",
        "recipe.yaml:1: work: missing, and it has no default",
        "recipe.yaml:2: wrok: unknown key; did you mean work?",
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "recipe.yaml:1: expected keys such as `model:`, found an empty file"),
        ("- a\n", "recipe.yaml:1: expected keys such as `model:`, found a list"),
        ("awm\n", "recipe.yaml:1: expected keys such as `model:`, found 'awm'"),
        ("{seed: 1}}\n", "recipe.yaml:1: not valid YAML: expected '<document start>', but found '}'"),
    ],
)
def test_files_that_are_no_recipe(folder: Path, text: str, expected: str) -> None:
    assert problems(folder, text) == [expected]


def test_files_that_cannot_be_read(folder: Path) -> None:
    (folder / "latin.yaml").write_bytes(b"seed: 1\n# caf\xe9\n")
    with pytest.raises(ConfigError, match=r"latin\.yaml:2: not UTF-8"):
        read_config("latin.yaml")
    (folder / "run").mkdir()
    (folder / "run" / "config.yaml").touch()
    with pytest.raises(ConfigError, match=r"run is a folder; did you mean run/config\.yaml"):
        read_config("run")


def test_a_missing_file_brings_recipes_and_files_nearby(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(folder, BASE)
    monkeypatch.setattr(paths, "recipes", lambda: {"awm": folder / "awm.yaml"})
    with pytest.raises(ConfigError, match=r"no config file 'recip\.yaml'.*; nearby: recipe\.yaml"):
        read_config("recip.yaml")
    with pytest.raises(ConfigError, match="did you mean 'awm'"):
        read_config("configs/amw.yaml")


def test_summary_is_the_first_comment(folder: Path) -> None:
    assert recipe_summary(write(folder, BASE)) == "A test."
    assert recipe_summary(write(folder, "seed: 1\n")) == ""


def test_written_text() -> None:
    """Text is quoted wherever YAML 1.1 or 1.2 would read something else."""
    items: dict[str, list[str | int | float | bool | None]] = {
        "numbers": [1e-05, 1e-4, 2.0, 1, 1.5e20],
        "like_numbers": ["1e-4", "0o17", "012", "1:30", "1_000", "2024-01-01"],
        "like_others": ["no", "on", "null", "~", "true", "", "<<", "="],
        "text": ["shapes:train", "a: b", "don't", "'tis: so", "two\nlines", "\u2028", "π", "- a", "#"],
        "others": [None, True],
        "empty": [],
    }
    assert to_yaml(Anything(items=items)) == (
        "items:\n"
        "  numbers:\n    - 1.0e-05\n    - 0.0001\n    - 2.0\n    - 1\n    - 1.5e+20\n"
        "  like_numbers:\n    - '1e-4'\n    - '0o17'\n    - '012'\n    - '1:30'\n    - '1_000'\n    - '2024-01-01'\n"
        "  like_others:\n    - 'no'\n    - 'on'\n    - 'null'\n    - '~'\n    - 'true'\n    - ''\n    - '<<'\n    - '='\n"
        "  text:\n    - shapes:train\n    - 'a: b'\n    - don't\n    - \"'tis: so\"\n    - \"two\\nlines\"\n"
        "    - \"\\L\"\n    - π\n    - '- a'\n    - '#'\n"
        "  others:\n    - null\n    - true\n"
        "  empty: []\n"
    )


def test_an_error_that_quotes_a_long_name_is_cut(tmp_path: Path) -> None:
    name = "x" * 5000
    with pytest.raises(ConfigError) as caught:
        read_config("quickstart", [f"anchors=[{{to: {name}, coefficient: 0.1}}]", f"output_dir={tmp_path}"])
    (problem,) = caught.value.problems
    assert "anchors.0.to: 'xxx" in problem
    assert len(problem) < 1200
