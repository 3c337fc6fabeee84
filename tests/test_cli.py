"""The commands as typed: their output and files, and one clear message for every mistake."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from PIL import Image
from rich.console import Console

from difrl import cli
from difrl.config.load import read_config, to_yaml
from difrl.config.yaml_source import ConfigError, parse
from difrl.data.jsonl import DataFileError
from difrl.inference.preference_pairs import PairsError
from difrl.inference.rlg_sweep import sweep_notes, sweep_table
from difrl.policies.errors import ModelError
from difrl.policies.logprob_check import FirstUpdateError
from difrl.reporting.catalog import published_models
from difrl.reporting.inference_defaults import InferenceDefaultsError
from difrl.reporting.metrics_file import MetricsError
from difrl.reporting.terminal import SilentDisplay
from difrl.runtime.distributed import ProcessError
from difrl.runtime.errors import MissingFile
from difrl.runtime.memory import MemoryShortage
from difrl.runtime.paths import recipes
from difrl.training import run as running
from difrl.training.checkpoint import CheckpointError
from difrl.training.run import Interrupted
from difrl.training.run_folder import RunFolderError
from difrl.training.trainer import TrainingError
from rewards import RewardError
from samplers.text import DecodingError
from tests.recipes import recipe

WIDTH = 80
NAMES = [name for name in recipes() if not name.startswith("pretrain/")]


class Ended(NamedTuple):
    """Exit status and output of a command."""

    status: Any
    out: str
    err: str


Command = Callable[..., Ended]


@pytest.fixture
def difrl(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run a command in this process, on a terminal of 80 columns."""
    monkeypatch.setenv("COLUMNS", str(WIDTH))
    monkeypatch.setenv("TERM", "dumb")

    def command(*arguments: object) -> Ended:
        with monkeypatch.context() as patched:
            patched.setattr(sys, "argv", ["difrl", *map(str, arguments)])
            patched.setattr(sys, "path", list(sys.path))
            capsys.readouterr()
            with pytest.raises(SystemExit) as caught:
                cli.main()
        return Ended(caught.value.code, *capsys.readouterr())

    return command


@pytest.fixture(scope="module")
def runs(sd3: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two finished runs with different seeds."""
    folders = [tmp_path_factory.mktemp("runs") / name for name in ("one", "two")]
    for seed, folder in enumerate(folders):
        sections = {"data": {"prompts_per_step": 2, "group_size": 2}, "eval": {"show": 1, "every": 1}}
        config = recipe(sd3, folder, seed=seed, train={"steps": 2}, **sections)
        running.train(config, display=SilentDisplay())
    return folders


@pytest.fixture
def run(runs: list[Path], tmp_path: Path) -> Path:
    """A copy that a command may write into."""
    return Path(shutil.copytree(runs[0], tmp_path / "run"))


def written(path: Path, model: Path, /, **sections: Any) -> Path:
    """Write a recipe to a file."""
    path.write_text(to_yaml(recipe(model, path.with_suffix(""), **sections)))
    return path


def assert_fits(text: str) -> None:
    assert max(map(len, text.splitlines())) <= WIDTH, text


def assert_one_message(ended: Ended, *parts: str) -> None:
    """Check for exit status 1 and a single message without a traceback."""
    assert ended.status == 1, ended
    assert sum(line.startswith("difrl: ") for line in ended.err.splitlines()) == 1  # beside warnings
    assert "Traceback" not in ended.err
    message = " ".join(ended.err.split())
    for part in parts:
        assert part in message, message


@pytest.mark.parametrize("name", NAMES)
def test_the_printed_config_reads_back_equal(difrl: Command, tmp_path: Path, name: str) -> None:
    ended = difrl("train", name, "--print-config")
    assert ended.status == 0
    path = tmp_path / "printed.yaml"
    path.write_text(ended.out)
    assert read_config(path) == read_config(name)


def test_overrides_are_in_the_printed_config(difrl: Command, tmp_path: Path) -> None:
    ended = difrl(
        "train", "quickstart", "train.steps=7", "rewards.0.weight=2", "output_dir=runs/mine", "--print-config"
    )
    (tmp_path / "printed.yaml").write_text(ended.out)
    config = read_config(tmp_path / "printed.yaml")
    assert (config.train.steps, config.rewards[0].weight, config.output_dir) == (7, 2.0, Path("runs/mine"))


def test_train_prints_a_line_a_step_and_where_everything_is(difrl: Command, sd3: Path, tmp_path: Path) -> None:
    path = written(tmp_path / "first.yaml", sd3, train={"steps": 2}, eval={"show": 1})
    ended = difrl("train", path)
    assert (ended.status, ended.err) == (0, "")
    assert [line for line in ended.out.splitlines() if line.startswith(("step 1/2", "step 2/2"))]
    for name in ("report.html", "before-after.png", "model"):
        assert name in ended.out
    assert (tmp_path / "first" / "report.html").is_file()
    again = difrl("train", path)
    assert_one_message(again, "holds a run already; continue it with --resume")
    assert difrl("train", path, "--resume", "train.steps=3").status == 0


def test_sample_draws_every_weight_side_by_side(difrl: Command, run: Path, tmp_path: Path) -> None:
    one, three = tmp_path / "new" / "one.png", tmp_path / "three.png"
    command = ("sample", run, "--prompt", "a red circle", "two blue squares", "-n", "2")
    assert difrl(*command, "--out", one).status == 0
    ended = difrl(*command, "--rlg", "0", "0.5", "1", "--out", three)
    assert ended.status == 0
    assert ended.out.startswith("12 samples after 2 steps of training at w = 0, 0.5, 1: ")
    with Image.open(one) as narrow, Image.open(three) as wide:
        assert wide.width * wide.height > 2 * narrow.width * narrow.height


def test_sample_of_a_plain_model_has_no_rlg(difrl: Command, sd3: Path, tmp_path: Path) -> None:
    command = ("sample", sd3, "--prompt", "a red circle", "--steps", "2", "--out", tmp_path / "x.png")
    plain = difrl(*command)
    assert plain.status == 0
    assert plain.out.startswith("4 samples: ")
    assert_one_message(difrl(*command, "--rlg", "0", "1"), "plain model; give a run folder")


def test_evaluate_writes_the_sweep_and_prints_a_table(difrl: Command, run: Path) -> None:
    """Every metric with its error, in 80 columns; a further reward is only watched."""
    ended = difrl("evaluate", run, "--rlg", "0:1:0.5", "2", "--rewards", "jpeg_incompressibility", "--images", "4")
    assert ended.status == 0, ended.err
    sweep = json.loads((run / "rlg.json").read_text())
    assert sweep["weights"] == [0.0, 0.5, 1.0, 2.0]
    for name in ("reward/jpeg_compressibility", "watch/jpeg_incompressibility"):
        assert len(sweep[name]) == len(sweep[f"{name}/stderr"]) == 4
    assert (run / sweep["picture"]).is_file()
    table = ended.out.partition("written to")[0]
    assert_fits(table)
    rows, _, note = table.partition("\n▲ ")
    assert [line.split()[0] for line in rows.splitlines()[-4:]] == ["0", "0.5", "1", "2"]
    assert re.fullmatch(
        r"jpeg_incompressibility \(watched\) is highest at w = [0-9.]+(, not clearly above w = 1)?",
        " ".join(note.split()),
    )
    assert table.count("▲") == 2  # in its column, and in the sentence
    assert sweep["divergence/base"][0] == 0.0
    assert 0 < sweep["divergence/base"][1] < sweep["divergence/base"][2] < sweep["divergence/base"][3]
    assert "divergence" in table
    assert "saved" not in table
    assert "rlg.json" in ended.out
    assert not (run / "inference.json").exists()
    assert "0.5" in (run / "report.html").read_text()


def test_evaluate_makes_a_weight_the_default_of_the_run(difrl: Command, run: Path, tmp_path: Path) -> None:
    """The weight with the highest watched reward and its settings; `sample` and the report use them."""
    command = ("evaluate", run, "--rlg", "0:2:1", "--rewards", "jpeg_incompressibility", "--images", "4")
    ended = difrl(*command, "--adaptive-guidance", "1.1", "--rlg-first-steps", "1", "--write-default", "best")
    assert ended.status == 0, ended.err
    assert_fits(ended.out.partition("written to")[0])
    assert "adaptive guidance at 1.1 saved 0.0 of" in ended.out
    assert "the first 1 steps at w = 1" in ended.out
    assert "(highest jpeg_incompressibility of 3 weights)" in ended.out
    sweep, found = (json.loads((run / name).read_text()) for name in ("rlg.json", "inference.json"))
    values = sweep["watch/jpeg_incompressibility"]
    best = sweep["weights"][values.index(max(values))]
    assert (found["rlg"], found["first_steps"], found["adaptive"]) == (best, 1, 1.1)
    assert found["why"] == "highest jpeg_incompressibility of 3 weights"
    assert f"The run is sampled at w = {best:g} by default" in (run / "report.html").read_text()
    assert difrl(*command, "--write-default", "0.5").status == 0
    sampled = difrl("sample", run, "--prompt", "a red circle", "-n", "1", "--out", tmp_path / "x.png")
    assert sampled.out.startswith("1 sample after 2 steps of training at w = 0.5: ")


def test_evaluate_refuses_a_default_that_makes_no_sense(difrl: Command, run: Path) -> None:
    assert difrl("evaluate", run, "--write-default", "highest").status == 2
    assert_one_message(
        difrl("evaluate", run, "--write-default", "best"), "the run watches no reward", "--rewards judge"
    )


def test_sample_searches_with_a_reward(difrl: Command, run: Path, tmp_path: Path) -> None:
    """The chosen samples are better than the draws, and the picture has as many samples as without a search."""
    command = ("sample", run, "--prompt", "a red circle", "two blue squares", "-n", "2", "--out", tmp_path / "x.png")
    chosen = difrl(*command, "--best-of", "4", "--reward", "jpeg_compressibility", "--rlg", "1", "2")
    assert chosen.status == 0, chosen.err
    assert chosen.out.startswith("8 samples after 2 steps of training at w = 1, 2: ")
    notes = re.findall(
        r"w = [12]: best of 4 by jpeg_compressibility: (\S+) over all draws, (\S+) over the chosen", chosen.out
    )
    assert len(notes) == 2
    assert all(float(all_draws) < float(best) for all_draws, best in notes)
    decoded = difrl(*command, "--svdd", "3", "--alpha", "0.1", "--reward", "jpeg_compressibility")
    assert decoded.status == 0, decoded.err
    assert re.search(r"SVDD with 3 candidates by jpeg_compressibility: \S+, 8.0 evaluations a sample", decoded.out)


def test_sample_counts_what_adaptive_guidance_saved(difrl: Command, run: Path, sd3: Path, tmp_path: Path) -> None:
    """Four steps under guidance at w = 2 are 16 evaluations; below -1 the first step alone is whole: 4 + 3."""
    command = ("--prompt", "a red circle", "-n", "1", "--guidance", "2", "--out", tmp_path / "x.png")
    adaptive = ("--adaptive-guidance", "-1.1")
    ended = difrl("sample", run, *command, *adaptive, "--rlg", "1", "2")
    assert "w = 1: adaptive guidance saved 3.0 of 8.0 evaluations a sample" in ended.out
    assert "w = 2: adaptive guidance saved 9.0 of 16.0 evaluations a sample" in ended.out
    later = difrl("sample", run, *command, *adaptive, "--rlg", "2", "--rlg-first-steps", "3")
    assert "adaptive guidance saved 3.0 of 10.0 evaluations a sample" in later.out
    plain = difrl("sample", sd3, *command, *adaptive, "--steps", "4")
    assert "adaptive guidance saved 3.0 of 8.0 evaluations a sample" in plain.out


def test_searches_that_make_no_sense_are_refused(difrl: Command, run: Path, tmp_path: Path) -> None:
    command = ("sample", run, "--prompt", "no prompt of the run", "-n", "1", "--out", tmp_path / "x.png")
    reward = ("--reward", "jpeg_compressibility")
    for wrong in (("--best-of", "2", "--svdd", "2", *reward), ("--best-of", "2"), ("--svdd", "2"), reward):
        assert difrl(*command, *wrong).status == 2
    assert_one_message(
        difrl(*command, "--svdd", "2", *reward, "--adaptive-guidance", "0.9"),
        "SVDD and adaptive guidance do not go together",
    )
    assert_one_message(difrl(*command, "--best-of", "2", "--reward", "geneval"), "metadata", "another --reward")
    assert not (tmp_path / "x.png").exists()


def test_many_metrics_are_tables_below_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    """No number is broken over lines, however many rewards there are."""
    names = [
        "reward/mean",
        "reward/geneval",
        "reward/jpeg_compressibility",
        "watch/judge",
        "watch/ocr",
        "diversity/pixels",
    ]
    result = {"weights": [0.0, 1.0], **{name: [-0.4512, None] for name in names}}
    result |= {f"{name}/stderr": [0.0123, None] for name in names}
    Console(width=WIDTH).print(sweep_table(result))
    printed = capsys.readouterr().out
    assert_fits(printed)
    assert printed.count("-0.451 ± 0.012") == len(names)
    assert printed.count("jpeg_compressibility") == 1


@pytest.mark.parametrize(("height", "end"), [(0.9, ""), (0.54, ", not clearly above w = 1"), (0.4, "")])
def test_a_peak_within_the_errors_is_called_within_the_errors(height: float, end: str) -> None:
    """Errors of 0.02 at either weight: two of their √2 · 0.02 are 0.057."""
    values, errors = [0.5, height], [0.02, 0.02]
    found = sweep_notes({"weights": [1.0, 2.0], "watch/judge": values, "watch/judge/stderr": errors})
    assert found == [f"▲ judge (watched) is highest at w = {1 if height < 0.5 else 2}{end}"]


def test_report_compares_runs(difrl: Command, runs: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "both.html"
    ended = difrl("report", *runs, "--out", out)
    assert ended.status == 0
    assert str(out) in ended.out.replace("\n", "")
    page = out.read_text()
    assert "one" in page
    assert "two" in page
    assert not re.search(r"""(src|href)=["']?https?://""", page)  # self-contained


def test_recipes_are_listed_with_their_place_in_the_grid(difrl: Command) -> None:
    ended = difrl("recipes")
    assert ended.status == 0
    assert_fits(ended.out)
    for name in NAMES:
        assert name in ended.out
    assert "arXiv:2509.25050" in ended.out


def test_rewards_are_listed(difrl: Command) -> None:
    ended = difrl("rewards")
    assert ended.status == 0
    assert_fits(ended.out)
    assert ended.out.index("rewards of images") < ended.out.index("geneval") < ended.out.index("rewards of texts")
    assert ended.out.index("rewards of texts") < ended.out.index("math")


def test_a_reward_is_shown_with_its_options(difrl: Command) -> None:
    ended = difrl("rewards", "geneval", "length")
    assert ended.status == 0
    assert_fits(ended.out)
    for words in ("partial", "bool = False", "longest", "reads: images, metadata"):
        assert words in ended.out
    assert "did you mean 'geneval'" in difrl("rewards", "genevall").err


def test_models_are_listed_with_their_memory(difrl: Command) -> None:
    ended = difrl("models")
    assert ended.status == 0
    assert_fits(ended.out)
    for name, row in published_models().items():
        assert name in ended.out
        assert row["pipeline"] in ended.out
        assert row["memory"].split()[-2] in ended.out
    assert "Every other pipeline of diffusers that has blocks" in ended.out


def test_a_model_is_shown_with_a_recipe_to_start_from(difrl: Command) -> None:
    ended = difrl("models", "flux1-dev")
    assert ended.status == 0
    assert_fits(ended.out)
    sections = parse(ended.out[ended.out.index("model:") :], "sections").data
    assert sections["model"]["path"] == "black-forest-labs/FLUX.1-dev"
    assert sections["rollout"] == {"height": 1024, "width": 1024, "steps": 28, "guidance": 1.0}
    assert "did you mean flux1-dev?" in difrl("models", "flux1-devv").err


def test_check_estimates_without_loading_weights(difrl: Command, sd3: Path, tmp_path: Path) -> None:
    ended = difrl("check", written(tmp_path / "recipe.yaml", sd3))
    assert ended.status == 0, ended.err
    assert_fits(ended.out)
    assert not (tmp_path / "recipe").exists()


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["trian.steps=3"], ["trian", "did you mean train?"]),
        (["train.step=3"], ["train.step", "did you mean train.steps?"]),
        (["train.steps=many"], ["train.steps", "many"]),
        (["data.group_size=1"], ["data.group_size", "found 1, and advantages compare the samples of a prompt"]),
        (["train.updates_per_step=3"], ["data.prompts_per_step: 4 is not a multiple of 3"]),
        (["model.path=./nowhere"], ["model.path: no folder './nowhere'"]),
        (["model.path=nobody/nothing"], ["'nobody/nothing' has no readable model_index.json"]),
        (["data.train=prompts.txt"], ["prompts.txt: no such file"]),
        (["data.train=shapes:trian"], ["shapes:trian", "did you mean shapes:train?"]),
        (
            ["rewards=[{name: jpeg_compresibility}]"],
            ["no reward 'jpeg_compresibility'", "did you mean 'jpeg_compressibility'?"],
        ),
        (["rewards=[{name: jpeg_compressibility, options: {qualty: 3}}]"], ["qualty", "it takes: quality"]),
        (["rewards=[{name: math}]"], ["rewards.0 (math): it reads texts, and the samples here are images"]),
        (["rewards=[{import: no_such_module:Mine}]"], ["cannot import the reward 'no_such_module:Mine'"]),
        (["rollout.kernel=flow_sd"], ["rollout.kernel", "did you mean flow_sde?"]),
        (["rollout.solver=NoSuchScheduler"], ["diffusers has no scheduler 'NoSuchScheduler'"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_a_wrong_recipe_is_one_clear_message(
    difrl: Command, sd3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str], parts: list[str]
) -> None:
    """No run folder is left behind, which would be in the way of the next attempt."""
    monkeypatch.chdir(tmp_path)
    path = written(tmp_path / "recipe.yaml", sd3)
    assert_one_message(difrl("train", path, *overrides), *parts)
    assert not (tmp_path / "recipe").exists()


def test_a_malformed_prompt_file_is_named_line_by_line(difrl: Command, sd3: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "a red circle"}\n{"prompt": \n{"text": "two squares"}\n')
    path = written(tmp_path / "recipe.yaml", sd3)
    ended = difrl("train", path, f"data.train={prompts}")
    assert_one_message(ended, "prompts.jsonl:2: not valid JSON", 'prompts.jsonl:3: "prompt" is missing')
    assert not (tmp_path / "recipe").exists()


def test_a_model_folder_without_its_weights_is_one_clear_message(difrl: Command, sd3: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(sd3, tmp_path / "model"))
    for file in (model / "transformer").glob("*.safetensors"):
        file.unlink()
    assert_one_message(difrl("train", written(tmp_path / "recipe.yaml", model)), "model.path", str(model))


def test_commands_about_runs_need_a_run(difrl: Command, sd3: Path, tmp_path: Path) -> None:
    nothing = tmp_path / "nothing"
    assert_one_message(difrl("train", nothing), "no config file")
    assert_one_message(difrl("report", nothing), "no run folder at")
    assert_one_message(difrl("sample", nothing, "--prompt", "a red circle"), "no folder")
    for folder in (nothing, sd3):
        assert_one_message(difrl("evaluate", folder), "is not a run folder: config.yaml not found in it")
    assert not (sd3 / "rlg.json").exists()


def test_a_reward_beside_the_recipe_is_found(
    difrl: Command, sd3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`import: module.function` looks in the working directory, also for the installed script."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(tmp_path))])
    (tmp_path / "found_here.py").write_text("def mine(images, prompts, metadata):\n    return images.mean((1, 2, 3))\n")
    path = written(tmp_path / "recipe.yaml", sd3, train={"steps": 1}, eval={"every": 0})
    ended = difrl("train", path, "rewards=[{import: found_here.mine}]")
    assert ended.status == 0, ended.err
    assert "reward/mine" in (tmp_path / "recipe" / "metrics.jsonl").read_text()


@pytest.mark.parametrize("word", ["two", "nan", "0:inf:1", "0:2", "2:0:1", "0:2:0"])
def test_a_wrong_weight_is_a_usage_error(difrl: Command, run: Path, word: str) -> None:
    ended = difrl("evaluate", run, "--rlg", word)
    assert ended.status == 2
    assert "expected a number or a range" in " ".join(ended.err.split())


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["0", "0.5", "2"], [0.0, 0.5, 2.0]),
        (["0:1:0.1"], [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]),
        (["0:1:0.4", "3"], [0.0, 0.4, 0.8, 3.0]),
        (["-1", "1:1:1"], [-1.0, 1.0]),
    ],
)
def test_numbers_and_ranges(words: list[str], expected: list[float]) -> None:
    assert cli.parse_numbers(words) == expected


@pytest.mark.parametrize(
    ("typed", "read"),
    [
        ("sample r --rlg 0 -1 2 --out x", "sample r --rlg 0 --rlg -1 --rlg 2 --out x"),
        ("sample r --prompt a b -n 2", "sample r --prompt a --prompt b -n 2"),
        ("sample r --rlg 0 --rlg 1", "sample r --rlg 0 --rlg 1"),
        ("train r train.steps=2 --resume", "train r train.steps=2 --resume"),
        ("evaluate r --rewards a b", "evaluate r --rewards a --rewards b"),
        ("score --reward ocr --prompt a b.png", "score --reward ocr --prompt a b.png"),
        ("", ""),
    ],
)
def test_several_values_after_one_flag(typed: str, read: str) -> None:
    assert cli.repeat_flags(typed.split()) == read.split()


def test_files_are_scored(difrl: Command, tmp_path: Path) -> None:
    for name, text in (("a.txt", "so it is 85"), ("b.txt", "17")):
        (tmp_path / name).write_text(text, encoding="utf-8")
    asked = ("score", "--reward", "math", "--prompt", "47+38=", tmp_path / "a.txt", tmp_path / "b.txt")
    shown = difrl(*asked, "--metadata", "{answer: 85}")
    assert shown.status == 0
    assert shown.out.split() == [
        "file",
        "math",
        str(tmp_path / "a.txt"),
        "1.000",
        str(tmp_path / "b.txt"),
        "0.000",
        "mean",
        "0.500",
    ]
    unscored = difrl(*asked)
    assert unscored.out.count("not scored") == 4
    assert "it may need --metadata" in unscored.out
    rows = [json.loads(line) for line in difrl(*asked, "--json", "--metadata", "{answer: 17}").out.splitlines()]
    assert [row["math"] for row in rows] == [0.0, 1.0]
    assert difrl(*asked, "--metadata", "85").status == 2


def test_a_reward_that_fails_is_reported_if_its_samples_are_left_out(difrl: Command, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("8", encoding="utf-8")
    breaking = "{import: tests.scoring.test_score_files:Picky, on_error: drop}"
    shown = difrl("score", "--reward", breaking, tmp_path / "a.txt")
    assert shown.status == 0
    assert shown.out.count("not scored") == 1  # in the table, without a guess at the reason
    assert "warning: reward 'picky' scored 0 of 1 samples: " in shown.err
    assert "KeyError: 'a digit'" in shown.err


def test_interrupted_is_130_to_the_shell(difrl: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*args: Any, **named: Any) -> None:
        raise Interrupted("stopped after step 2, which is saved")

    monkeypatch.setattr(running, "train", stop)
    ended = difrl("train", "quickstart")
    assert ended.status == 130
    assert "stopped after step 2, which is saved" in ended.err


USER_ERRORS = (
    CheckpointError,
    FirstUpdateError,
    InferenceDefaultsError,
    DataFileError,
    ConfigError,
    MemoryShortage,
    MetricsError,
    MissingFile,
    ModelError,
    PairsError,
    ProcessError,
    RunFolderError,
    Interrupted,
    TrainingError,
)


@pytest.mark.parametrize(
    "error",
    [*(kind("what to do") for kind in USER_ERRORS), RewardError("judge", "what to do"), DecodingError("what to do")],
)
def test_an_error_that_the_user_can_mend_is_one_message(
    error: Exception, difrl: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **named: Any) -> None:
        raise error

    monkeypatch.setattr(running, "train", fail)
    ended = difrl("train", "quickstart")
    assert ended.status == (130 if isinstance(error, Interrupted) else 1)
    assert ended.err == f"difrl: {error}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("sample", "nope", "--prompt", "x"), "no folder 'nope'; expected the folder of a run or of a model"),
        (("sample", "a/b/c", "--prompt", "x"), "no folder 'a/b/c'"),
        (("evaluate", "nope"), "nope is not a run folder: config.yaml not found"),
        (("report", "nope"), "no run folder at nope"),
        (("score", "nope.png", "--reward", "judge"), "nope.png: there is no such file"),
        (("score", ".", "--reward", "judge"), "there is no such file"),
    ],
)
def test_a_path_that_does_not_exist_is_reported_before_models_are_imported(
    difrl: Command, monkeypatch: pytest.MonkeyPatch, arguments: Sequence[str], message: str
) -> None:
    heavy = ("difrl.inference.loaded_run", "difrl.inference.rlg_sweep", "difrl.scoring.score_files")
    for module in heavy:
        monkeypatch.delitem(sys.modules, module, raising=False)
    ended = difrl(*arguments)
    assert_one_message(ended, message)
    assert not any(module in sys.modules for module in heavy)


def test_an_error_message_does_not_load_the_trainer(difrl: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading it takes seconds."""
    monkeypatch.delitem(sys.modules, "difrl.training.trainer")
    monkeypatch.delitem(sys.modules, "difrl.training.run")
    assert_one_message(difrl("rewards", "genevall"), "did you mean 'geneval'")
    assert "difrl.training.trainer" not in sys.modules


@pytest.mark.parametrize("fault", [ZeroDivisionError, FileNotFoundError])
def test_faults_of_difrls_own_keep_their_traceback(monkeypatch: pytest.MonkeyPatch, fault: type[Exception]) -> None:
    """A file that difrl has lost itself is a fault too."""

    def fail(*args: Any, **named: Any) -> None:
        raise fault

    monkeypatch.setattr(running, "train", fail)
    monkeypatch.setattr(sys, "argv", ["difrl", "train", "quickstart"])
    with pytest.raises(fault):
        cli.main()


HEAVY = {"torch", "torchvision", "diffusers", "transformers", "numpy", "scipy", "matplotlib"}


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        ("--help", 0),
        ("train --help", 0),
        ("--version", 0),
        ("recipes", 0),
        ("rewards", 0),
        ("models", 0),
        ("models flux1-dev", 0),
        ("train quickstart --print-config", 0),
        ("train quickstart train.step=2", 1),
        ("train quikstart", 1),
        ("check quickstart train.step=2", 1),
        ("pairs quickstart train.step=2", 1),
    ],
)
def test_a_command_that_computes_nothing_imports_nothing_heavy(arguments: str, status: int) -> None:
    """Heavy imports take seconds."""
    source = f"""
import sys
from difrl import cli
sys.argv = ["difrl", *{arguments.split()!r}]
try:
    cli.main()
except SystemExit as end:
    assert end.code == {status}, end.code
assert not {HEAVY!r} & set(sys.modules), {HEAVY!r} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_version_is_printed(difrl: Command) -> None:
    assert difrl("--version") == (0, f"difrl {version('difrl')}\n", "")


@pytest.mark.slow
def test_the_module_is_the_command(tmp_path: Path) -> None:
    """`python -m difrl`, as accelerate starts it, and one error in a real process."""
    environment = {**os.environ, "COLUMNS": str(WIDTH)}

    def ended(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "difrl", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=600, env=environment)

    assert "evaluate" in ended("--help").stdout
    failed = ended("train", "quickstart", "train.step=2")
    assert failed.returncode == 1
    assert failed.stderr == "difrl: override 'train.step=2': train.step: unknown key; did you mean train.steps?\n"


NOISY = """
import torch, warnings
from tqdm import tqdm
from rewards import Scores
from transformers.utils import logging

class Noisy:
    name, needs = "noisy", ("texts",)

    def to(self, device):
        return self

    def __call__(self, samples, prompts, metadata):
        for number in tqdm(range(12), desc="Loading weights"):
            logging.get_logger("transformers.models").warning(f"text {number} was cut")
        list(logging.tqdm(range(3), desc="Writing model shards"))
        return Scores(torch.ones(len(samples)), torch.ones(len(samples)).bool())
"""


@pytest.mark.slow
def test_a_library_shows_no_bars_and_warns_once(tmp_path: Path) -> None:
    (tmp_path / "noisy_reward.py").write_text(NOISY)
    (tmp_path / "a.txt").write_text("a text")
    command = [sys.executable, "-m", "difrl", "score", "a.txt", "--reward", "noisy_reward:Noisy"]
    environment = {**os.environ, "COLUMNS": "200", "PYTHONPATH": str(Path(__file__).parents[1])}
    environment.pop("TQDM_DISABLE", None)
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    slow = ("loading", "reward")  # phases, on a slow machine
    assert [line for line in done.stderr.splitlines() if not line.startswith(slow)] == [
        "warning: transformers: text 0 was cut",
        "warning: 12 times: transformers: text 0 was cut",
    ]
