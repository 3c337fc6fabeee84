"""A run of a language model from its recipe to its report, and samples of it afterwards."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from difrl.cli import app, repeat_flags
from difrl.inference.loaded_run import open_run
from difrl.policies.errors import ModelError
from difrl.policies.load import is_language_model
from difrl.reporting.terminal import SilentDisplay
from difrl.training import run as running
from tests.texts import PROMPTS, prompt_file, shown_recipe


@pytest.fixture(scope="module")
def run(lm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    config = shown_recipe(lm, folder / "run", prompt_file(folder), eval={"rlg": [0.0, 1.0], "every": 1})
    running.train(config, display=SilentDisplay())
    return folder / "run"


def difrl(*words: object) -> Result:
    return CliRunner(env={"COLUMNS": "80"}).invoke(app, repeat_flags([str(word) for word in words]))


def test_the_folder_holds_sheets_of_texts(run: Path) -> None:
    names = sorted(path.name for path in (run / "samples").iterdir())
    steps = [f"step-00000{step}.{end}" for step in range(3) for end in ("json", "txt")]
    assert names == ["before-after.txt", *steps]
    sheet = json.loads((run / "samples" / "step-000000.json").read_text())
    assert sheet["prompts"] == [PROMPTS[0], PROMPTS[3]]
    (only,) = sheet["sets"]
    assert [len(row) for row in only["texts"]] == [2, 2]
    texts, scores = ([x for row in only[key] for x in row] for key in ("texts", "scores"))
    assert scores == [float(text.count("1")) for text in texts]
    written = (run / "samples" / "before-after.txt").read_text()
    assert written.startswith("0+0=\n  before")
    assert max(map(len, written.splitlines())) <= 80


def test_the_sweep_measures_the_divergence_of_completions(run: Path) -> None:
    sweep = json.loads((run / "rlg.json").read_text())
    assert sweep["divergence/base"][0] == 0.0 < sweep["divergence/base"][1]
    assert [one["label"] for one in sweep["samples"]["sets"]] == ["w = 0", "w = 1"]
    assert (run / sweep["picture"]).read_text().startswith("0+0=\n  w = 0")


def test_the_report_shows_prompts_before_after_and_reward(run: Path) -> None:
    page = (run / "report.html").read_text()
    for words in ("<th>step 0</th><th>step 2</th><th>reward</th>", "<b>0+0=</b>", "<th>w = 1</th>", "tokens generated"):
        assert words in page
    assert "Worth knowing about this run folder" not in page
    assert "<img" not in page


def test_samples_are_printed_with_the_rewards_of_the_runs_own_prompts(run: Path) -> None:
    found = difrl("sample", run, "--prompt", "1+1=", "22", "--rlg", 0, 1, 2, "-n", 2)
    assert found.exit_code == 0, found.output
    lines = found.output.splitlines()
    assert lines[0] == "1+1="
    assert [line.split()[:3] for line in lines[1:7:2]] == [["w", "=", str(w)] for w in range(3)]
    known, unknown = found.output.split("\n\n")[:2]
    assert all(f"{text.count('1'):.3f}"[:4] in line for line in known.splitlines()[1:] for text in [line[16:]])
    assert unknown.startswith("22\n  w = 0  ")
    assert ".000" not in unknown
    assert "12 samples after 2 steps of training at w = 0, 1, 2" in found.output
    assert max(map(len, lines)) <= 80


def test_the_best_of_several_are_saved_as_json(run: Path, tmp_path: Path) -> None:
    path = tmp_path / "best.json"
    found = difrl("sample", run, "--prompt", "1+1=", "--best-of", 3, "--reward", "Ones", "--out", path, "-n", 2)
    assert found.exit_code == 0, found.output
    assert "best of 3 by Ones" in found.output
    (only,) = json.loads(path.read_text())["sets"]
    assert [float(text.count("1")) for text in only["texts"][0]] == only["scores"][0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--steps", 4, "--guidance", 2],
            "is a language model, and steps and guidance are of image models; leave them out",
        ),
        (
            ["--svdd", 2, "--reward", "Ones"],
            "--svdd chooses among candidates of a denoising step, and this model has none",
        ),
        (["--adaptive-guidance", 0.9], "adaptive guidance is for image models"),
        (["--max-new-tokens", 80], "80 the model's context of 64 leaves room for -16"),
    ],
)
def test_what_texts_do_not_have_is_refused(run: Path, words: list[object], message: str) -> None:
    found = difrl("sample", run, "--prompt", "1+1=", *words)
    assert isinstance(found.exception, ModelError)
    assert message in str(found.exception)


def test_a_plain_model_is_known_by_its_folder(lm: Path, sd3: Path, tmp_path: Path) -> None:
    assert is_language_model(str(lm))
    assert not is_language_model(str(sd3))
    assert not is_language_model("tiny-sd3")
    with pytest.raises(ModelError, match=r"holds neither model_index\.json .* nor tokenizer_config\.json"):
        is_language_model(str(tmp_path))
    with pytest.raises(ModelError, match=r"no folder 'nowhere'; expected .* or a shipped model \(.*tiny-sd3"):
        is_language_model("nowhere")


def test_a_plain_model_writes_texts_at_weight_one(lm: Path) -> None:
    opened = open_run(lm, max_new_tokens=4, temperature=0.5)
    texts = opened.sample(["1+1="], per_prompt=2).texts
    assert texts is not None
    assert len(texts) == 2
    with pytest.raises(ModelError, match="is a plain model; give a run folder"):
        opened.sample(["1+1="], rlg=2.0)


def test_evaluate_sweeps_a_run_and_prints_a_table(run: Path) -> None:
    found = difrl("evaluate", run, "--rlg", "0:1:0.5", "--images", 4)
    assert found.exit_code == 0, found.output
    assert "divergence" in found.output
    assert max(map(len, found.output.splitlines())) <= 80 or "written to" in found.output.splitlines()[-1]
    assert json.loads((run / "rlg.json").read_text())["weights"] == [0.0, 0.5, 1.0]
