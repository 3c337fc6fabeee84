"""Sections of rewards: valid settings, refused settings, and messages with the key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from difrl.config import RewardConfig
from difrl.config.load import read_config, to_yaml
from difrl.config.yaml_source import ConfigError
from difrl.scoring import build_reward
from tests.recipes import AWM, recipe

PLAIN = {"name": "jpeg_compressibility"}
OTHER = {"name": "jpeg_incompressibility"}
JURY = {"ensemble": [PLAIN, OTHER]}
PAR = {"shape": {"kind": "par"}}
FIVE = {"references": {"count": 5}}
AT_LEAST = {"kind": "threshold", "at_least": 0.5}
NOISE = {"shape": {"kind": "noise", "false_positive": 0.1, "false_negative": 0.1}}
RANGE = {"shape": {"kind": "min_max", "low": -2.0, "high": 0.0}}
OWN_RANGE = {"shape": {"kind": "min_max"}}


def reward(**settings: Any) -> RewardConfig:
    return RewardConfig.model_validate(settings)


def test_labels() -> None:
    assert reward(name="geneval").label == "geneval"
    assert reward(**{"import": "my.rewards:Brightness"}).label == "Brightness"
    assert reward(name="geneval", label="mine").label == "mine"
    assert reward(**JURY).label == "ensemble"
    assert [m.label for m in reward(**JURY).members] == ["jpeg_compressibility", "jpeg_incompressibility"]
    assert [m.label for m in reward(**PLAIN).members] == ["jpeg_compressibility"]


def test_weights_of_evaluations() -> None:
    linear = {"kind": "linear", "start": 1.0, "end": 0.25}
    found = [
        reward(**PLAIN, weight=w) for w in (2.0, linear, AT_LEAST, {"kind": "threshold", "at_most": 1.0, "start": 3.0})
    ]
    assert [r.settled for r in found] == [2.0, 0.25, 1.0, -3.0]
    assert [r.varies for r in found] == [False, True, True, True]
    assert [r.adapts for r in found] == [False, False, True, True]
    assert [reward(**PLAIN, weight=w).silent for w in (0.0, linear)] == [True, False]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "either a name, an import or an ensemble"),
        ({**PLAIN, **JURY}, "either a name, an import or an ensemble"),
        ({"ensemble": [{"name": "a", "import": "b:c"}, OTHER]}, "either a name or an import"),
        ({"ensemble": [PLAIN]}, "at least 2 items"),
        ({"ensemble": [PLAIN, PLAIN]}, "give members with the same name different labels"),
        ({"ensemble": [{**PLAIN, "weight": 2.0}, OTHER]}, "Extra inputs"),
        ({**JURY, "options": {"a": 1}}, "give them to its members"),
        ({**JURY, "combine": "uncertainty"}, "give both, or neither"),
        ({**JURY, "penalty": 0.1}, "give both, or neither"),
        ({**PLAIN, "combine": "worst"}, "belong to an ensemble"),
        ({**PLAIN, "label": "mean"}, "set another label"),
        ({**PLAIN, "label": "a/b"}, "match pattern"),
        ({**PLAIN, "shape": {"kind": "clip"}}, "give low or high"),
        ({**PLAIN, "shape": {"kind": "clip", "low": 1.0, "high": 1.0}}, "low must be below high"),
        ({**PLAIN, "shape": {"kind": "min_max", "low": 1.0}}, "or neither"),
        ({**PLAIN, "shape": {"kind": "noise", "false_positive": 0.5, "false_negative": 0.5}}, "sum to 1 or more"),
        ({**PLAIN, "weight": {"kind": "threshold"}}, "either at_least or at_most"),
        ({**PLAIN, "weight": {**AT_LEAST, "start": 20.0}}, "start is at most highest"),
    ],
)
def test_a_reward_that_makes_no_sense_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        reward(**settings)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"rewards": [{**PLAIN, **PAR}]}, r"rewards\.0\.shape: par compares with reference samples"),
        ({"rewards": [{"ensemble": [PLAIN, {**OTHER, **PAR}]}]}, r"rewards\.0\.ensemble\.1\.shape: par compares"),
        ({"rewards": [PLAIN], **FIVE}, "references: no reward compares"),
        (
            {"rewards": [{**PLAIN, **PAR}], "references": {"snapshot": "ema"}, "snapshots": {"ema": {"decay": 0.9}}},
            r"references\.snapshot: 'ema' is not a snapshot that never changes; expected base, or",
        ),
        ({"rewards": [PLAIN, PLAIN]}, r"rewards\.1: a second reward called 'jpeg_compressibility'.*set label"),
        ({"rewards": [PLAIN], "watch": [{**OTHER, **RANGE}]}, r"watch\.0: a watched reward is reported without shapes"),
        (
            {"rewards": [PLAIN], "watch": [{**OTHER, "weight": AT_LEAST}]},
            r"watch\.0\.weight: a watched reward is not part of the sum",
        ),
        (
            {"rewards": [{"ensemble": [PLAIN, {**OTHER, **OWN_RANGE}], **PAR}], **FIVE},
            r"rewards\.0\.ensemble\.1\.shape: .*differently, so par cannot compare them; give min_max low and high",
        ),
        ({"rewards": [{**JURY, **NOISE}, PLAIN]}, r"rewards\.0\.shape: noise corrects a binary verifier"),
        ({"rewards": [{**PLAIN, **NOISE}]}, r"rewards\.0\.shape: noise is affine.*set advantage\.std: none"),
        ({"rewards": [{**PLAIN, **RANGE}]}, r"rewards\.0\.shape: min_max is affine"),
        ({"rewards": [{**PLAIN, **OWN_RANGE}]}, r"rewards\.0\.shape: min_max is affine"),
        (
            {"rewards": [{**PLAIN, **NOISE}, OTHER], "advantage": {"normalise": "each"}},
            r"rewards\.0\.shape: noise is affine",
        ),
        (
            {"rewards": [{**PLAIN, **NOISE}, OTHER], "advantage": {"std": "beta"}},
            r"rewards\.0\.shape: advantage\.std: beta is for rewards in \[0, 1\], which noise leaves",
        ),
        (
            {"rewards": [{**PLAIN, "weight": AT_LEAST}, OTHER], "advantage": {"normalise": "each"}},
            r"rewards\.0\.weight\.kind: .*normalise: each removes",
        ),
        ({"rewards": [{**PLAIN, "weight": AT_LEAST}]}, r"rewards\.0\.weight\.kind: .*there are none; give a number"),
        (
            {"rewards": [{**PLAIN, "weight": {"kind": "linear", "start": 0.0, "end": 0.0}}]},
            r"rewards\.0\.weight: every reward has weight 0",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        recipe("nowhere", **sections)


@pytest.mark.parametrize(
    "sections",
    [
        {"rewards": [{**PLAIN, **PAR}], **FIVE},
        {"rewards": [{"ensemble": [PLAIN, {**OTHER, "shape": {"kind": "log_sigmoid"}}]}], **FIVE},
        {
            "rewards": [{**PLAIN, **PAR}],
            "references": {"snapshot": "start"},
            "snapshots": {"start": {"decay": 1.0}},
        },
        {"rewards": [{"ensemble": [PLAIN, {**OTHER, **RANGE}], **PAR}], **FIVE},
        {"rewards": [{"ensemble": [{**PLAIN, **PAR}, OTHER], **OWN_RANGE}, OTHER], **FIVE},
        {"rewards": [{"ensemble": [{**PLAIN, **PAR}, {**OTHER, **OWN_RANGE}]}], **FIVE},
        {"rewards": [PLAIN, {**PLAIN, "label": "again"}]},
        {"rewards": [PLAIN], "watch": [{**JURY, "combine": "worst"}]},
        {"rewards": [{**PLAIN, **NOISE}], "advantage": {"std": "none"}},
        {"rewards": [{**PLAIN, **NOISE}, OTHER]},
        {"rewards": [{**PLAIN, **OWN_RANGE}], "advantage": {"std": "global"}},
        {"rewards": [{**PLAIN, "weight": AT_LEAST}, OTHER]},
        {"rewards": [{**PLAIN, "weight": AT_LEAST}], "anchors": [{"to": "base"}]},
        {"rewards": [{**PLAIN, "weight": {"kind": "cosine", "start": 0.0, "end": 1.0}}, OTHER]},
    ],
)
def test_what_goes_together_is_read_and_written_again(sections: dict[str, Any], tmp_path: Path) -> None:
    config = recipe("nowhere", **sections)
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    assert read_config(path) == config


@pytest.mark.parametrize(
    "sections",
    [
        {"rewards": [{**PLAIN, **RANGE}]},
        {"rewards": [{**PLAIN, "weight": {"kind": "linear", "start": 1.0, "end": 0.5}}]},
        {"rewards": [{**PLAIN, **PAR}], **FIVE},
    ],
)
def test_rewards_of_a_file_are_not_shaped(sections: dict[str, Any]) -> None:
    data = {"train": "samples.jsonl", "rows": "samples", "prompts_per_step": 4, "group_size": 2}
    with pytest.raises(ValidationError, match=r"data\.rows: samples"):
        recipe("nowhere", **{**AWM, **sections, "data": data, "advantage": {"std": "none"}})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{name: geneval, shape: {kind: parr}}", "rewards.0.shape.kind: expected .*did you mean par"),
        ("{name: geneval, weight: {kind: treshold}}", "rewards.0.weight.kind: expected .*did you mean threshold"),
        (
            "{name: geneval, weight: {kind: threshold, atleast: 1.0}}",
            "rewards.0.weight.atleast: unknown key; did you mean",
        ),
        ("{ensemble: [{name: a}, {nme: b}]}", "rewards.0.ensemble.1.nme: unknown key; did you mean"),
        ("{name: geneval, shapes: {kind: par}}", "rewards.0.shapes: unknown key; did you mean rewards.0.shape"),
        ("{name: geneval, weight: high}", "rewards.0.weight: expected a number, or a mapping with kind: .*threshold"),
    ],
)
def test_a_slip_in_a_file_is_told_with_its_key(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"algorithm: awm\nmodel: {{path: tiny-sd3}}\ndata: {{train: shapes:train}}\nrewards: [{text}]\n")
    with pytest.raises(ConfigError, match=message):
        read_config(path)


@pytest.mark.parametrize(
    ("reward", "frames", "message"),
    [
        ({"name": "geneval", "frames": "mean"}, None, r"rewards\.0\.frames: frames is for videos"),
        (
            {"ensemble": [{"name": "judge"}, {"name": "geneval", "frames": "worst"}]},
            None,
            "rewards.0.ensemble.1.frames: frames is for videos",
        ),
        ({"name": "geneval", "frames": {"sample": 6}}, 5, "found 6 sampled frames, and videos have rollout.frames: 5"),
        ({"name": "geneval", "frames": {"sample": 0}}, 5, "greater than 0"),
        ({"name": "geneval", "frames": "median"}, 5, "rewards.0.frames"),
    ],
)
def test_frames_that_do_not_fit_are_refused(reward: dict[str, Any], frames: int | None, message: str) -> None:
    with pytest.raises((ConfigError, ValidationError), match=message):
        recipe("nowhere", rewards=[reward], rollout={"frames": frames})


def test_frames_of_a_reward_that_reads_none(tmp_path: Path) -> None:
    for name, reads in (("motion", "videos"), ("format", "texts")):
        options = {"pattern": "1"} if name == "format" else {}
        with pytest.raises(ConfigError, match=f"frames: it reads {reads}, and not single frames; remove frames"):
            build_reward(RewardConfig.model_validate({"name": name, "options": options, "frames": "mean"}))
