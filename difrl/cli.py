"""The command line. Each command reads its arguments, calls one function of the package and prints the result.

Heavy imports are inside the commands, so that help, lists and messages about recipes appear at once.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.markup import escape

from difrl.runtime.errors import UserError
from difrl.runtime.paths import expand_user

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="rich")
out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

RlgFirstSteps = Annotated[
    int | None,
    typer.Option(
        min=0, help="Steps (for texts: tokens) at w = 1 before RLG begins. Default: 0; in `difrl sample` the run's."
    ),
]
AdaptiveGuidance = Annotated[
    float | None,
    typer.Option(
        help="Stop the second evaluation of guidance and of RLG once the cosine of both outputs reaches this, e.g. 0.99."
    ),
]

MULTIPLE_VALUES = {"sample": ("--rlg", "--prompt", "--image"), "evaluate": ("--rlg", "--rewards")}
"""Command -> options that take several values after one flag, as in `--rlg 0 0.5 1`. Arguments come before them."""


def print_version(given: bool) -> None:
    """Print the installed version and exit, if the option is given."""
    if given:
        from importlib.metadata import version

        out.print(f"difrl {version('difrl')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Reinforcement-learning fine-tuning of image generators and language models."""


@app.command()
def train(
    config: Annotated[str, typer.Argument(help="A recipe: a YAML file, or a name from `difrl recipes`.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key.path=value …, e.g. train.steps=20")] = None,
    resume: Annotated[
        bool, typer.Option(help="Continue from the newest checkpoint, or start if there is none.")
    ] = False,
    print_config: Annotated[bool, typer.Option(help="Print the expanded recipe and stop.")] = False,
) -> None:
    """Train a model as a recipe describes."""
    from difrl.config.load import read_config, to_yaml

    recipe = read_config(config, overrides or [])
    if print_config:
        sys.stdout.write(to_yaml(recipe))
        return
    with _loading_libraries():
        from difrl.training import run as running

    running.train(recipe, resume=resume)


@app.command()
def check(
    config: Annotated[str, typer.Argument(help="A recipe: a YAML file, or a name from `difrl recipes`.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key.path=value …, e.g. train.steps=20")] = None,
    processes: Annotated[int, typer.Option(help="Number of processes that share the run.")] = 1,
) -> None:
    """Validate a recipe and estimate memory, evaluations and time, without loading weights."""
    from difrl.config.load import read_config

    recipe = read_config(config, overrides or [])
    with _loading_libraries():
        from difrl.training.cost.estimate import estimate
        from difrl.training.cost.table import estimate_table

    with _shown():
        found = estimate(recipe, processes)
    out.print(estimate_table(found))


@app.command()
def sample(
    source: Annotated[str, typer.Argument(help="A run folder, a model folder, a hub id or a shipped model.")],
    prompt: Annotated[list[str], typer.Option(help="Prompts, one or more.")],
    image: Annotated[
        list[Path] | None,
        typer.Option(
            parser=expand_user,
            metavar="PATH",
            help="Input image of a model that edits or animates one: once for all prompts, or once for each.",
        ),
    ] = None,
    rlg: Annotated[
        list[str] | None,
        typer.Option(
            help="RLG weights: 0 is the base, 1 the trained model, 2 beyond; or a range 0:2:0.5. Default: the run's, else 1."
        ),
    ] = None,
    rlg_first_steps: RlgFirstSteps = None,
    adaptive_guidance: AdaptiveGuidance = None,
    best_of: Annotated[int | None, typer.Option(min=2, help="Show the best of N draws by --reward.")] = None,
    svdd: Annotated[
        int | None, typer.Option(min=2, help="Choose among M candidates by --reward at every step.")
    ] = None,
    alpha: Annotated[float, typer.Option(min=0, help="Temperature of --svdd. 0 takes the best.")] = 0.0,
    reward: Annotated[str | None, typer.Option(help="Reward by which --best-of and --svdd choose.")] = None,
    count: Annotated[int, typer.Option("-n", min=1, help="Number of samples of each prompt.")] = 4,
    seed: Annotated[int, typer.Option(help="Seed of the noise, which is the same at every weight.")] = 0,
    steps: Annotated[int | None, typer.Option(min=2, help="Number of denoising steps. Default: the run's.")] = None,
    guidance: Annotated[
        float | None, typer.Option(min=1, help="Scale of classifier-free guidance. Default: the run's.")
    ] = None,
    frames: Annotated[
        int | None, typer.Option(min=1, help="Number of frames of a video. Default: the run's; a plain model has none.")
    ] = None,
    height: Annotated[int | None, typer.Option(min=1, help="Pixels. Default: the run's, or the model's.")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Pixels. Default: the run's, or the model's.")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Maximum number of tokens of a text. Default: the run's.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0, help="Temperature of texts. 0 takes the likeliest token. Default: the run's.")
    ] = None,
    path: Annotated[
        Path | None,
        typer.Option(
            "--out",
            parser=expand_user,
            metavar="PATH",
            help="File of the samples. Default: samples.png for images, none for texts.",
        ),
    ] = None,
) -> None:
    """Draw samples at one or more RLG weights, side by side: images in a file, texts in the terminal."""
    from difrl.policies.model_paths import check_source

    _check_search(best_of, svdd, reward)
    check_source(source)
    with _loading_libraries():
        from difrl.data.prompts import Prompt
        from difrl.inference.loaded_run import open_run, with_images
        from difrl.inference.search import build_search, draw_sheet
        from difrl.reporting.number_format import pluralise

    prompts = [Prompt(text, {}) for text in prompt]
    prompts = with_images(prompts, image) if image else prompts
    with _shown():
        loaded = open_run(
            source,
            steps=steps,
            guidance=guidance,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            frames=frames,
            height=height,
            width=width,
        ).with_guidance(rlg_first_steps, adaptive_guidance)
        weights = [loaded.guidance.rlg] if rlg is None else parse_numbers(rlg)
        search = build_search(loaded, best_of, svdd, alpha, reward)
        sheet, notes = draw_sheet(loaded, search, prompts, count, weights, seed)
    sheet.show(out)
    file = path or sheet.default
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file = sheet.save(file)
        each = sheet.save_each(file)
    number, listed = len(prompts) * count * len(weights), ", ".join(f"{w:g}" for w in weights)
    trained = f" after {pluralise(loaded.step, 'step')} of training at w = {listed}" if loaded.is_run else ""
    written = "" if file is None else f": {escape(str(file))}"
    written += f", and each in {escape(str(file.with_suffix('')))}/" if file is not None and each else ""
    out.print(f"{pluralise(number, 'sample')}{trained}{written}", soft_wrap=True)
    for note in notes:
        out.print(escape(note), soft_wrap=True)


def _check_search(best_of: int | None, svdd: int | None, reward: str | None) -> None:
    if best_of is not None and svdd is not None:
        raise typer.BadParameter(
            "found --best-of and --svdd, expected one of them: the first searches after sampling, the second during it"
        )
    if (best_of or svdd) and reward is None:
        raise typer.BadParameter("--best-of and --svdd choose by a reward: add one, e.g. --reward judge")
    if reward is not None and not (best_of or svdd):
        raise typer.BadParameter("--reward is for --best-of and --svdd: add one of them")


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(parser=expand_user, metavar="PATH", help="A run folder.")],
    rlg: Annotated[
        list[str] | None, typer.Option(help="RLG weights, or a range such as 0:2:0.25. Default: 0:2:0.5.")
    ] = None,
    rlg_first_steps: RlgFirstSteps = None,
    adaptive_guidance: AdaptiveGuidance = None,
    rewards: Annotated[
        list[str] | None, typer.Option(help="Further rewards to measure, as listed by `difrl rewards`.")
    ] = None,
    images: Annotated[int, typer.Option(min=1, help="Number of samples for each weight.")] = 256,
    write_default: Annotated[
        str | None,
        typer.Option(
            help="Weight that becomes the run's default for `difrl sample`, or best: the one with the highest watched reward."
        ),
    ] = None,
) -> None:
    """Measure rewards and the distance to the base model at several RLG weights: a table, a plot and samples."""
    from difrl.policies.model_paths import check_run_folder

    check_run_folder(run)
    with _loading_libraries():
        from difrl.inference.rlg_sweep import evaluate_run, sweep_notes, sweep_table
        from difrl.policies.base import GuidanceSettings
        from difrl.reporting.inference_defaults import read_inference_defaults

    if write_default not in (None, "best"):
        parse_numbers([write_default], "--write-default", "a weight, or best")
    guidance = GuidanceSettings(first_steps=rlg_first_steps or 0, adaptive=adaptive_guidance)
    weights = parse_numbers(rlg or ["0:2:0.5"])
    with _shown():
        result = evaluate_run(run, weights, rewards or [], images, guidance, write_default)
    out.print(sweep_table(result))
    for note in sweep_notes(result):
        out.print(escape(note))
    defaults = read_inference_defaults(run)
    if write_default is not None and defaults is not None:
        out.print(f"the run's default is now w = {defaults.rlg:g} ({escape(defaults.why)})")
    out.print(f"written to {escape(str(run / 'rlg.json'))} and {escape(str(run / 'report.html'))}", soft_wrap=True)


@app.command()
def merge(
    source: Annotated[
        str, typer.Argument(metavar="RUN", help="A run folder, or a folder of trained parts (its model/).")
    ],
    folder: Annotated[Path, typer.Argument(parser=expand_user, metavar="OUT", help="Folder of the whole model.")],
) -> None:
    """Write the whole model of a run, for from_pretrained of diffusers or transformers. LoRA is merged into its weights."""
    from difrl.policies.model_paths import check_source

    check_source(source)
    with _loading_libraries():
        from difrl.inference.merge import merge as merge_model

    with _shown():
        merge_model(source, folder)
    out.print(escape(str(folder)), soft_wrap=True)


@app.command()
def pairs(
    config: Annotated[str, typer.Argument(help="A recipe, for its model, prompts, rewards and rollout.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key.path=value …, e.g. data.group_size=8")] = None,
    folder: Annotated[
        Path, typer.Option("--out", parser=expand_user, metavar="PATH", help="Folder of pairs.jsonl and its images.")
    ] = Path("data/pairs"),
    count: Annotated[int, typer.Option(min=1, help="Minimum number of pairs. A folder with fewer is continued.")] = 256,
    solved: Annotated[
        float | None,
        typer.Option(
            help="Instead of pairs, write all samples of groups with at least this mean reward to samples.jsonl."
        ),
    ] = None,
) -> None:
    """Make a preference file: draw groups, score them, keep the best and the worst sample of each."""
    from difrl.config.load import read_config

    recipe = read_config(config, overrides or [])
    with _loading_libraries():
        import torch

        from difrl.inference.preference_pairs import BestAndWorst, Selection, Solved, make_pairs

    device = "cuda" if torch.cuda.is_available() else "cpu"
    selection: Selection = BestAndWorst() if solved is None else Solved(solved)
    with _shown():
        made = make_pairs(recipe, folder, count, device, selection)
    dropped = f"{made.ties} groups left out, {made.unscored} that could not be scored"
    out.print(f"{made.pairs} rows in {escape(str(folder / selection.file))} ({dropped})", soft_wrap=True)


@app.command()
def report(
    runs: Annotated[
        list[Path], typer.Argument(parser=expand_user, metavar="PATH", help="Run folders. Several are compared.")
    ],
    path: Annotated[
        Path | None,
        typer.Option(
            "--out",
            parser=expand_user,
            metavar="PATH",
            help="File of the report. Default: report.html in the first folder.",
        ),
    ] = None,
) -> None:
    """Write a self-contained HTML page about one or more runs."""
    with _loading_libraries():
        from difrl.reporting.html import write_report

    with _shown():
        written = write_report(runs, path or runs[0] / "report.html")
    out.print(escape(str(written)), soft_wrap=True)


@app.command()
def recipes() -> None:
    """List the recipes, each with its place in the grid of methods."""
    from difrl.reporting.catalog import recipes_table

    out.print(recipes_table())


@app.command()
def rewards(
    names: Annotated[
        list[str] | None, typer.Argument(help="Rewards to show with their options: names, or your own by import path.")
    ] = None,
) -> None:
    """List the rewards, or show some of them with their options."""
    from difrl.reporting.catalog import reward_details, rewards_table
    from rewards import list_rewards

    if not names:
        out.print(rewards_table(list_rewards()))
    for name in names or []:
        out.print(reward_details(name))


@app.command()
def models(
    names: Annotated[list[str] | None, typer.Argument(help="Models to show with a recipe to start from.")] = None,
) -> None:
    """List published image and video models with the memory that they take, or show some of them."""
    from difrl.reporting.catalog import model_details, models_table

    if not names:
        out.print(models_table())
    for name in names or []:
        out.print(model_details(name))


@app.command()
def score(
    files: Annotated[list[Path], typer.Argument(parser=expand_user, metavar="PATH", help="Images, or texts in UTF-8.")],
    reward: Annotated[
        list[str], typer.Option(help="Rewards: names, import paths, or {name: …, label: …, options: …}.")
    ],
    prompt: Annotated[list[str] | None, typer.Option(help="The prompt: once for all files, or once for each.")] = None,
    image: Annotated[
        list[Path] | None,
        typer.Option(
            parser=expand_user,
            metavar="PATH",
            help="Input image, for rewards of edits: once for all files, or once for each.",
        ),
    ] = None,
    metadata: Annotated[str, typer.Option(help="Metadata of the prompt, in YAML, e.g. {answer: 85}.")] = "{}",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per file instead of a table.")] = False,
) -> None:
    """Score images or texts with one or more rewards."""
    from difrl.config.yaml_source import parse
    from difrl.runtime.files import check_exist

    check_exist([*files, *(image or [])])
    with _loading_libraries():
        from difrl.scoring.parse_reward import parse_reward
        from difrl.scoring.score_files import build_table, read_samples, score_files

    facts = parse(metadata, "--metadata").data
    if not isinstance(facts, dict):
        raise typer.BadParameter(f"--metadata: found {metadata!r}, expected keys and values such as {{answer: 85}}")
    with _shown():
        samples = read_samples(files, prompt or [""], image or [])
        found = score_files([parse_reward(text) for text in reward], samples, facts, _warn)
    if not as_json:
        out.print(build_table(samples, found))
        if any(column.unexplained for column in found.values()):
            out.print(
                "not scored: the reward found nothing to compare with; it may need --metadata or another --prompt"
            )
        return
    for row, sample in enumerate(samples):
        values = {name: column.values[row] for name, column in found.items()}
        sys.stdout.write(json.dumps({"file": str(sample.file), "prompt": sample.prompt, **values}) + "\n")


@app.command()
def serve(
    rewards: Annotated[
        list[str],
        typer.Argument(
            help="Rewards as for `difrl score`, or a YAML file with `rewards:` as in a recipe; then their options, "
            "REWARD.option=value, e.g. geneval ocr ocr.threads=2"
        ),
    ],
    host: Annotated[
        str, typer.Option(help="Address to listen on. 0.0.0.0 means all addresses of this machine.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on. 0 takes a free one.")] = 8000,
    token: Annotated[
        str | None,
        typer.Option(envvar="DIFRL_TOKEN", help="Token that requests must carry. As an option it is visible in ps."),
    ] = None,
    max_batch: Annotated[
        int, typer.Option(min=1, help="Maximum number of rows of several requests scored together.")
    ] = 64,
    wait: Annotated[float, typer.Option(min=0, help="Milliseconds that a request waits for others.")] = 5.0,
    max_rows: Annotated[int, typer.Option(min=1, help="Maximum number of rows of a request.")] = 256,
    max_size: Annotated[int, typer.Option(min=1, help="Maximum size of a request in megabytes.")] = 64,
    max_pixels: Annotated[
        int, typer.Option(min=1, help="Maximum size of decoded images of a request in megapixels.")
    ] = 64,
    max_memory: Annotated[
        int, typer.Option(min=1, help="Megabytes of memory that all requests together may take.")
    ] = 5000,
    device: Annotated[str | None, typer.Option(help="Device of the rewards. Default: a GPU if there is one.")] = None,
) -> None:
    """Serve rewards over HTTP, for the reward `remote` of recipes: docs/serving.md."""
    with _loading_libraries():
        import torch

        from difrl.scoring import serve as serving
        from rewards.server import Limits

    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    serving.serve(
        serving.parse_served(rewards),
        host=host,
        port=port,
        token=token,
        max_batch=max_batch,
        wait=wait / 1000,
        limits=Limits(max_rows, max_size, max_pixels, memory=max_memory),
        device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
        console=out,
    )


@app.command()
def pretrain(
    config: Annotated[Path, typer.Argument(help="A file of configs/pretrain.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key.path=value …")] = None,
) -> None:
    """Train a shipped model from scratch. A killed command continues when it is run again."""
    with _loading_libraries():
        from difrl.pretraining.pretrain import pretrain as run

    with _shown():
        # After the display of phases has taken over standard error.
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
        run(config, overrides or [])


@contextmanager
def _loading_libraries() -> Iterator[None]:
    """Show that libraries are imported during the block, which takes seconds, on a slow disk many."""
    from difrl.reporting.terminal import show_phases
    from difrl.runtime.progress import phase

    with show_phases(), phase("loading libraries"):
        yield


@contextmanager
def _shown() -> Iterator[None]:
    """Show long phases of a command, and warnings, on standard error during the block."""
    from difrl.reporting.terminal import show_phases
    from difrl.runtime.log_capture import count_library_warnings, route_warnings

    with show_phases(), route_warnings(_warn), count_library_warnings(_warn):
        yield


def _warn(text: str) -> None:
    err.print(f"[bold yellow]warning:[/] {escape(text)}", soft_wrap=True)


def parse_numbers(
    words: Sequence[str], option: str = "--rlg", expected: str = "a number or a range such as 0:2:0.25"
) -> list[float]:
    """Return the numbers, with ranges START:STOP:STEP expanded, the stop included."""
    numbers: list[float] = []
    for word in words:
        try:
            parts = [float(part) for part in word.split(":")]
        except ValueError:
            parts = []
        if not all(map(math.isfinite, parts)):
            parts = []
        if len(parts) == 1:
            numbers += parts
        elif len(parts) == 3 and parts[2] > 0 and parts[1] >= parts[0]:
            start, stop, step = parts
            numbers += [round(start + i * step, 6) for i in range(int((stop - start) / step + 1e-9) + 1)]
        else:
            raise typer.BadParameter(f"{option}: found {word!r}, expected {expected}")
    return numbers


def repeat_flags(arguments: Sequence[str]) -> list[str]:
    """Rewrite `--rlg 0 1 2` as `--rlg 0 --rlg 1 --rlg 2`, the form that the parser expects."""
    result: list[str] = []
    flag, fresh = None, False
    multiple = MULTIPLE_VALUES.get(arguments[0], ()) if arguments else ()
    for word in arguments:
        if word.startswith("-") and not _is_number(word):
            flag, fresh = (word if word in multiple else None), True
        elif flag is not None and not fresh:
            result.append(flag)
        else:
            fresh = False
        result.append(word)
    return result


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def main() -> NoReturn:
    """Run the command line. Print an error that the user can mend as one message, without a traceback."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # phases are shown by difrl itself, not by bars of the libraries
    sys.path.append(os.getcwd())  # where `import: my_module:my_reward` is looked for
    try:
        app(repeat_flags(sys.argv[1:]))
    except UserError as error:
        _exit(error)
    except Exception as error:
        # The errors of packages that know nothing of difrl. Imported here, because torch comes with them.
        from rewards import RewardError
        from samplers.text import DecodingError

        if not isinstance(error, RewardError | DecodingError):
            raise
        _exit(error)
    sys.exit(0)


def _exit(error: Exception) -> NoReturn:
    text = str(error).encode("utf-8", "backslashreplace").decode()  # file names need not be UTF-8
    with suppress(OSError):  # the terminal may be gone
        err.print(f"[bold red]difrl:[/] {escape(text)}", soft_wrap=True)
    sys.exit(error.exit_code if isinstance(error, UserError) else 1)
