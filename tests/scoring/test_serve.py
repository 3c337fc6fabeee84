"""Tests of `difrl serve`: its arguments, its message, and a training run with its rewards."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from fastapi import FastAPI
from rich.console import Console

from difrl import cli
from difrl.config.yaml_source import ConfigError
from difrl.reporting.terminal import SilentDisplay
from difrl.scoring import serve as serving
from difrl.scoring.serve import build_start_message, parse_served
from difrl.training import run as running
from rewards import make, score
from rewards.server import Limits, create_app
from tests.loopback import serving as on_loopback
from tests.recipes import recipe

WIDTH = 80
MEMBERS = "[{name: jpeg_compressibility}, {name: jpeg_incompressibility}]"


def test_names_import_paths_and_options() -> None:
    found = parse_served(["geneval", "ocr", "tests.fakes:Ones", "ocr.threads=2", "geneval.exact=true"])
    assert [(one.label, one.name, one.import_, one.options) for one in found] == [
        ("geneval", "geneval", None, {"exact": True}),
        ("ocr", "ocr", None, {"threads": 2}),
        ("Ones", None, "tests.fakes:Ones", {}),
    ]


def test_a_file_of_rewards_and_options_on_top(tmp_path: Path) -> None:
    path = tmp_path / "rewards.yaml"
    path.write_text(
        "rewards:\n  - name: geneval\n    options: {exact: true, threshold: 0.5}\n  - import: tests.fakes:Ones\n"
    )
    found = parse_served([str(path), "ocr", "geneval.threshold=0.2"])
    assert [one.label for one in found] == ["geneval", "Ones", "ocr"]
    assert found[0].options == {"exact": True, "threshold": 0.2}


def test_a_reward_as_in_a_recipe() -> None:
    """The equals sign in it sets no option."""
    (found,) = parse_served(["{name: format, options: {pattern: 'x=y'}, on_error: drop}"])
    assert (found.label, found.options, found.on_error) == ("format", {"pattern": "x=y"}, "drop")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["geneval", "geneval"], "two rewards are called 'geneval'; give one another label"),
        (["{name: ocr, weight: 2}"], "reward 'ocr' has a weight"),
        ([f"{{ensemble: {MEMBERS}, label: both}}", "both.threads=2"], "option 'both.threads': an ensemble has none"),
        (["geneval", "genevall.exact=true"], "option 'genevall': .* did you mean geneval"),
        (["geneval", "geneval=true"], "expected REWARD.option=value"),
        (["missing.yaml"], "no config file 'missing.yaml'"),
    ],
)
def test_arguments_that_name_nothing(words: Sequence[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_served(words)


def test_a_file_is_checked_as_a_recipe_is(tmp_path: Path) -> None:
    path = tmp_path / "rewards.yaml"
    path.write_text("rewards:\n  - name: geneval\n    option: {exact: true}\n")
    with pytest.raises(ConfigError, match=r"rewards\.yaml:3: .*option.*did you mean .*options"):
        parse_served([str(path)])


def printed(url: str, has_token: bool) -> str:
    console = Console(width=WIDTH, highlight=False, no_color=True)
    rewards = {name: make(name) for name in ("geneval", "jpeg_incompressibility", "ocr")}
    with console.capture() as captured:
        console.print(build_start_message(url, rewards, has_token, 64, Limits()))
    return captured.get()


def test_the_start_message() -> None:
    text = printed("http://127.0.0.1:8000", False)
    assert max(map(len, text.splitlines())) <= WIDTH
    lines = [re.sub(r"  +", " ", line).strip() for line in text.splitlines()]
    assert lines == [
        "address http://127.0.0.1:8000",
        "rewards geneval images, metadata",
        "jpeg_incompressibility images",
        "ocr images, prompts",
        "token off",
        "a batch up to 64 rows, of one request or of several",
        "a request up to 256 rows, 64 MB, 64 megapixels decoded",
        "all requests up to 5000 MB of memory; more wait, and are then refused",
        "stop with Ctrl-C; requests in progress are answered first",
    ]


@pytest.mark.parametrize("url", ["http://0.0.0.0:8000", "http://[::]:8000", "http://192.168.1.2:80"])
def test_a_server_that_others_can_reach_without_a_token_is_warned_of(url: str) -> None:
    open_to_all = printed(url, False)
    assert "warning: no token, and others can reach this address" in open_to_all
    assert max(map(len, open_to_all.splitlines())) <= WIDTH
    assert "warning" not in printed(url, True)


def test_on_loopback_there_is_no_warning() -> None:
    for url in ("http://127.0.0.1:8000", "http://[::1]:8000"):
        assert "warning" not in printed(url, False)


def test_the_command_passes_its_options(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr(serving, "serve", lambda configs, **named: seen.update(named, configs=configs))
    monkeypatch.setenv("DIFRL_TOKEN", "s3cret")
    words = "serve geneval geneval.exact=true --port 0 --max-batch 3 --wait 20 --max-rows 5 --max-size 6 --max-pixels 7"
    monkeypatch.setattr(sys, "argv", ["difrl", *words.split(), "--max-memory", "8", "--device", "cpu"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 0
    assert seen["configs"] == parse_served(["geneval", "geneval.exact=true"])
    assert (seen["host"], seen["port"], seen["token"], seen["device"]) == ("127.0.0.1", 0, "s3cret", "cpu")
    assert (seen["max_batch"], seen["wait"], seen["limits"]) == (3, 0.02, Limits(5, 6, 7, memory=8))


def test_a_token_that_a_header_cannot_carry_is_one_clear_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["difrl", "serve", "jpeg_compressibility", "--token", "a b"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 1
    assert "difrl: --token: expected one or more visible ASCII characters without spaces" in capsys.readouterr().err


def test_an_ensemble_is_served_as_one_reward(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its members are an image's size and the negative size, whose mean is 0."""
    apps: list[FastAPI] = []
    monkeypatch.setattr(serving, "run", lambda app, _: apps.append(app))
    configs = parse_served([f"{{ensemble: {MEMBERS}, label: both}}"])
    console, limits = Console(quiet=True), Limits()
    common: dict[str, Any] = {"host": "127.0.0.1", "port": 0, "token": None, "max_batch": 4, "wait": 0.0}
    serving.serve(configs, limits=limits, device="cpu", console=console, **common)
    with on_loopback(apps[0]) as url:
        assert httpx.get(f"{url}/version", trust_env=False).json()["rewards"] == {
            "both": {"needs": ["images", "videos"]}
        }
        far = make("remote", url=url, reward="both")
        found = score(far, torch.rand(2, 3, 8, 8), ["a", "b"], [{}, {}])
    assert (found.values.tolist(), found.valid.tolist()) == ([0.0, 0.0], [True, True])


def test_an_address_that_is_taken_is_one_clear_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setattr(sys, "argv", ["difrl", "serve", "jpeg_compressibility", "--port", str(port)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
    assert caught.value.code == 1
    assert f"difrl: cannot listen on 127.0.0.1 port {port}: Address already in use" in capsys.readouterr().err


@pytest.mark.slow
def test_a_real_process_serves_and_stops_at_a_signal(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "difrl", "serve", "jpeg_compressibility", "--port", "0"]
    environment = {**os.environ, "COLUMNS": "80", "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            url = process.stdout.readline().split()[-1]
            assert httpx.get(f"{url}/health", timeout=60, trust_env=False).json()["ready"] is True
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 0
            shown = process.stderr.read().splitlines()
            assert [line for line in shown if not line.startswith("loading libraries")] == []  # on a slow machine
        finally:
            process.kill()


@pytest.mark.slow
def test_a_run_against_a_server_is_the_run_with_the_reward_itself(sd3: Path, tmp_path: Path) -> None:
    """The JPEG reward rounds to 8 bits, like a PNG. So every reward and every loss must be the same number."""
    far = create_app({"jpeg": make("jpeg_compressibility")}, version="1", token="s3cret")
    with on_loopback(far) as url, pytest.MonkeyPatch.context() as patched:
        patched.setenv("TOKEN_OF_TEST", "s3cret")
        options = {"url": url, "reward": "jpeg", "token_env": "TOKEN_OF_TEST", "batch_size": 5}
        metrics = {
            name: trained(recipe(sd3, tmp_path / name, rewards=[{"name": name, **own}], train={"steps": 2}), name)
            for name, own in (("jpeg_compressibility", {}), ("remote", {"options": options}))
        }
    assert [row["step"] for row in metrics["remote"]] == [0, 1, 2]
    assert metrics["remote"] == metrics["jpeg_compressibility"]


def trained(config: Any, name: str) -> list[dict[str, Any]]:
    """Return the metrics of each step without times. The reward's metric is called `reward/it`."""
    running.train(config, display=SilentDisplay())
    lines = (Path(config.output_dir) / "metrics.jsonl").read_text().splitlines()
    return [
        {key.replace(name, "it"): value for key, value in json.loads(line).items() if not key.startswith("time/")}
        for line in lines
    ]
