"""The lifecycle of a run, from its recipe to its report.

runs/NAME/  config.yaml  inputs.json  metrics.jsonl  samples/  checkpoints/  model/  summary.json  rlg.json  report.html
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate.utils import set_seed
from safetensors import SafetensorError

from difrl.config import RunConfig
from difrl.config.checks import ConfigConflictError, find_conflicts
from difrl.config.load import read_config
from difrl.config.run import samples_base_at_end
from difrl.config.yaml_source import ConfigError
from difrl.data.jsonl import LISTED
from difrl.data.prompts import Prompt
from difrl.policies.load import load_policy
from difrl.policies.logprob_check import FirstUpdateError
from difrl.policies.warm_start import keep_warm_start
from difrl.reporting.html import write_report
from difrl.reporting.metrics_file import MetricsFile, digest_metrics, read_metrics
from difrl.reporting.terminal import Display, RunFacts, RunSummary, SilentDisplay, open_display
from difrl.reporting.trackers import TrackerFactory
from difrl.runtime.distributed import DistributedContext, ProcessError
from difrl.runtime.errors import UserError
from difrl.runtime.launcher import Shard
from difrl.runtime.log_capture import count_library_warnings, route_warnings
from difrl.runtime.memory import enough_for
from difrl.runtime.progress import phase
from difrl.runtime.quiet_libraries import without_bars
from difrl.training import checkpoint
from difrl.training.checkpoint import CheckpointError
from difrl.training.evaluation import Evaluator, samples_due
from difrl.training.guard import Guard
from difrl.training.inputs import load_inputs
from difrl.training.interrupts import stop_requested
from difrl.training.no_signal import SignalWatch
from difrl.training.run_folder import (
    RunFolderError,
    find_start,
    find_stretched_schedules,
    lock_run,
    prepare_folder,
)
from difrl.training.sample_outputs import SWEPT, run_sweep, save_before_after, save_step_samples
from difrl.training.trainer import Trainer, TrainingError
from rewards import RewardError
from rewards.random_state import get_random_state, preserved_random_state, set_random_state
from samplers import stable_seed


class Interrupted(UserError):
    """The run was stopped with Ctrl-C, after its checkpoint was written."""

    exit_code = 130


def train(
    config: RunConfig,
    *,
    resume: bool = False,
    display: Display | None = None,
    processes: DistributedContext | None = None,
) -> RunSummary:
    """Train the model of a recipe. Return a summary of the run, whose folder is `config.output_dir`.

    Seeds the global generators of torch, numpy and Python.
    """
    processes = processes or DistributedContext()
    config = with_launcher(config, processes.shard)
    display = (display or open_display()) if processes.is_main else SilentDisplay()
    try:
        show = display.message
        with (
            without_bars(),
            route_warnings(show),
            count_library_warnings(show),
            lock_run(config.output_dir, processes) as warning,
        ):
            return _train(config, resume, display, processes, warning)
    finally:
        display.close()


def with_launcher(config: RunConfig, shard: Shard | None) -> RunConfig:
    """Return the recipe with the value of `model.shard` that the launcher asks for, where the recipe has none of its own."""
    if shard is None or shard == config.model.shard:
        return config
    if config.model.shard != "none":
        raise ConfigError(
            f"model.shard: found {config.model.shard}, and accelerate launch asks for {shard}; remove one of the two"
        )
    found = config.model_copy(update={"model": config.model.model_copy(update={"shard": shard})})
    if conflicts := find_conflicts(found):
        raise ConfigError(str(ConfigConflictError(conflicts)))
    return found


def _train(
    config: RunConfig, resume: bool, display: Display, processes: DistributedContext, warning: str
) -> RunSummary:
    if config.train.threads is not None:
        torch.set_num_threads(config.train.threads)
    # For rewards and models that draw from the global generators. difrl's own noise is keyed and does not use them.
    set_seed(stable_seed(config.seed, "global", processes.rank) % 2**32)
    start = find_start(config, resume, processes)
    # Before the model, which may take minutes to load: a misspelt prompt file, tracker or reward is reported at once.
    inputs = load_inputs(config, processes.count, processes.device)
    inputs.scorer.preload()
    resumed = None if start.checkpoint is None else config.output_dir
    policy = load_policy(config, processes.device, keep_base=samples_base_at_end(config), run=resumed)
    policy.validate_prompts([*inputs.train, *inputs.evaluation])
    trainer = Trainer(config, policy, inputs.scorer, inputs.train, processes)
    evaluator = None
    if inputs.evaluation and config.eval.every > 0:
        evaluator = Evaluator(
            policy, inputs.scorer, inputs.evaluation, processes, config.seed, inputs.diversity, config.eval.snapshot
        )
    run = Run(config, trainer, evaluator, processes, display, inputs.trackers)
    try:
        for message in filter(None, (warning, *start.messages)):
            display.message(message)
        if start.checkpoint is not None:
            run.resume(start.checkpoint)
        policy.encode_prompts(run.prompts(), processes.rank / processes.count)
        if changed := prepare_folder(config, start, processes, inputs.images):
            listed = ", ".join(changed[:LISTED]) + (f" and {len(changed) - LISTED} more" if changed[LISTED:] else "")
            display.message(
                f"changed since the run was last started: {listed}; it ends differently from one without the change"
            )
        if start.checkpoint is None and processes.is_main:
            keep_warm_start(config)
        return run()
    except (OSError, SafetensorError) as error:  # Rewards and models raise errors of their own.
        raise RunFolderError(
            f"cannot write to {config.output_dir}: {error}. Earlier files are untouched; free some space or fix the "
            "permissions and continue with --resume"
        ) from error
    finally:
        if message := run.writer.close():
            display.message(message)


@dataclass
class Run:
    """A run in progress."""

    config: RunConfig
    trainer: Trainer
    evaluator: Evaluator | None
    processes: DistributedContext
    display: Display
    trackers: Sequence[TrackerFactory] = ()

    def __post_init__(self) -> None:
        self.folder = self.config.output_dir
        self.policy = self.trainer.policy
        self.guard = Guard(self.config.guard)
        self.signal = SignalWatch(self.config)
        self.metrics_file: MetricsFile | None = None
        self.writer = checkpoint.Writer(self.processes)
        self.step = 0
        """Number of completed steps."""
        self.saved = 0
        """Step of the newest checkpoint, which may still be being written."""
        self.complete = -1
        """Step up to which the rows of metrics are complete, with their evaluations."""
        self.seconds = 0.0
        """Time spent in the completed steps."""
        self.before: dict[str, float] = {}
        """eval/… metrics of the first evaluation."""
        self.after: dict[str, float] = {}
        """eval/… metrics of the last evaluation, or of the one that the guard chose."""
        self.unevaluated: Mapping[str, float] | None = None
        """Metrics of a step that was saved when its evaluation failed."""

    def resume(self, place: Path) -> None:
        """Restore the state of a checkpoint, and of the metrics up to it."""
        state = checkpoint.read_state(place)
        with phase("loading the checkpoint"):
            self.step = self.saved = checkpoint.load(self.trainer, place, self.processes, checked=True)
        rows = [row for row in read_metrics(self.folder) if row["step"] <= self.step]
        evaluated = [row for row in rows if _evaluation(row)]
        for row in (row for row in rows if row["step"] > 0):
            self.signal.observe(row)
        self.guard.rows = [{"step": row["step"], **_evaluation(row)} for row in evaluated]
        if evaluated:
            self.before, self.after = _evaluation(evaluated[0]), _evaluation(evaluated[-1])
        recorded = state.get("metrics")  # not in checkpoints of earlier versions
        if recorded is not None and digest_metrics(self.folder, recorded["step"]) != recorded["sha256"]:
            self.display.message(
                f"{self.folder / 'metrics.jsonl'} does not hold the rows that the run wrote up to step {recorded['step']}: some "
                "are missing or edited. The report shows them as they are now, and a guard decides by them"
            )
        last = next((row for row in rows if row["step"] == self.step), None)
        failed = (
            recorded is not None and recorded["step"] < self.step
        )  # the evaluation, and its row may have been amended since
        if self.step > 0 and samples_due(self.config, self.step) and (failed or (last and not _evaluation(last))):
            row = last or {"step": self.step}
            self.unevaluated = {k: v for k, v in row.items() if not k.startswith(("eval/", "guard/"))}
        self.complete = self.step - (self.unevaluated is not None or self.step == 0)
        self.seconds = sum(map(_seconds, rows))
        before = read_config(self.folder / "config.yaml")
        if changed := find_stretched_schedules(before, self.config):
            self.display.message(
                f"train.steps is {self.config.train.steps} and was {before.train.steps}: from here on {', '.join(changed)} "
                "span the new number, so the run differs from one that had it from the start"
            )
        threads = state["threads"]
        if threads != torch.get_num_threads():
            self.display.message(
                f"this process has {torch.get_num_threads()} CPU threads and the checkpoint was made with {threads}: "
                f"results agree to float order only (set train.threads={threads} for the same bits)"
            )

    def prompts(self) -> list[Prompt]:
        """Return the prompts of the remaining steps and of evaluations, with repetitions."""
        sources = [self.trainer.source, *([self.trainer.rehearsal.source] if self.trainer.rehearsal else [])]
        steps, settings = range(self.step, self.config.train.steps), self.config.eval
        found = [prompt for source in sources for prompt in source.prompts_of(steps)]
        if self.evaluator is not None:
            images = [settings.images, settings.final_images or settings.images]
            found += self.evaluator.prompts_of(images, [settings.show, min(SWEPT, settings.show)])
        return found

    def __call__(self) -> RunSummary:
        """Run the remaining steps with their evaluations and checkpoints, and finish the run."""
        self.display.start(self._facts())
        if self.processes.is_main:
            with preserved_random_state():  # a resumed run has restored it, and anybody's tracker may draw
                trackers = [build(self.config, self.step) for build in self.trackers]
            self.metrics_file = MetricsFile(self.folder, self.step, trackers)
            if not self.guard.ends:
                checkpoint.mark_result(self.folder, None)  # an earlier guard may have chosen a step; the run goes on
        with (
            stop_requested(self.display) as stop,
            self.metrics_file or nullcontext(),
        ):
            if self.step == 0 and self.evaluator is not None:
                self._evaluate_pretrained()
            if self.unevaluated is not None:
                self._complete(self.unevaluated)
            while not self._ended:
                self._train_step()
                stopping = self.processes.any(stop.requested)
                if stopping or self._checkpoint_due():
                    self._save()
                if stopping and not self._ended:
                    self.writer.finish()
                    raise Interrupted(
                        f"stopped after step {self.step}, which is saved; continue with the same command and --resume"
                    )
        self.writer.finish()
        self._apply_guard()
        return self._finish()

    @property
    def _ended(self) -> bool:
        return self.step >= self.config.train.steps or self.guard.ends

    def _evaluate_pretrained(self) -> None:
        """Evaluate the model before the first step."""
        if self.step in self.guard.kept:
            self._save()  # before the evaluation, which a run that is resumed here repeats
        found = self._evaluate()
        self.before = self.after
        self._write({"step": 0, "nfe": 0, **found})

    def _complete(self, unevaluated: Mapping[str, float]) -> None:
        """Repeat the evaluation that failed in an earlier process, and add it to the metrics of its step."""
        found = self._evaluate_step(unevaluated)
        if self.metrics_file is not None:
            self.metrics_file.amend({**unevaluated, **found})
        self.complete = self.step
        if self._checkpoint_due():
            self._save()

    def _train_step(self) -> None:
        """Run the next step and the evaluation after it. If the step fails, the steps before it are saved."""
        generators = get_random_state()
        try:
            metrics = {"step": self.step + 1, **self.trainer.step(self.step)}
        except Exception as error:
            raised_everywhere = isinstance(error, RewardError | ProcessError | TrainingError | FirstUpdateError)
            if raised_everywhere or self.processes.count == 1:
                self._save_before_failure(generators)
            raise
        self.step += 1
        self.seconds += _seconds(metrics)
        self.display.step(metrics)
        if hint := self.signal.observe(metrics):
            self.display.message(hint)
        self._write(metrics | self._evaluate_step(metrics, write_if_failed=True))

    def _evaluate_step(self, metrics: Mapping[str, float], *, write_if_failed: bool = False) -> dict[str, float]:
        """Evaluate the last step if it is due. If the evaluation fails, the step is saved, to be evaluated when resumed."""
        if not samples_due(self.config, self.step):
            return {}
        generators = get_random_state()
        try:
            return self._evaluate()
        except (RewardError, ProcessError):  # raised on every process
            if write_if_failed:
                self._write(metrics, complete=False)
            self._save_before_failure(generators)
            raise

    def _evaluate(self) -> dict[str, float]:
        """Evaluate on all processes, show the result to the guard, and save the sample grid. Return eval/… and guard/…"""
        assert self.evaluator is not None
        evaluations = self.policy.evaluations
        with enough_for("evaluation", f"lower rollout.batch (now {self.config.rollout.batch} samples)"):
            metrics = self.after = self.evaluator(samples_due(self.config, self.step))
        if self.config.eval.show > 0:
            save_step_samples(self.evaluator, self.config, self.folder, self.step)
        self.policy.evaluations = evaluations  # metrics report the cost of training only
        self.display.evaluation({"step": self.step, **metrics})
        verdict = self.guard.observe({"step": self.step, **metrics})
        if warning := self.guard.message(self.step):
            self.display.message(warning)
        return metrics | verdict

    def _write(self, metrics: Mapping[str, float], *, complete: bool = True) -> None:
        if complete:
            self.complete = self.step
        if self.metrics_file is not None:
            self.metrics_file.write(metrics)

    def _checkpoint_due(self) -> bool:
        every = self.config.checkpoint.every
        return self._ended or (every > 0 and self.step % every == 0) or self.step in self.guard.kept

    def _save(self) -> None:
        metrics: dict[str, int | str] | None = None
        if self.metrics_file is not None:
            self.metrics_file.sync()
            metrics = {"step": self.complete, "sha256": self.metrics_file.digest(self.complete)}
        keep, kept = self.config.checkpoint.keep, self.guard.kept
        with phase("checkpoint"):
            checkpoint.save(self.trainer, self.folder, self.step, keep, self.processes, kept, metrics, self.writer)
        self.saved = self.step

    def _save_before_failure(self, generators: Mapping[str, torch.Tensor]) -> None:
        """Save the last step, with the random states from before the failed step or evaluation, which is repeated."""
        unsaved = self.trainer.intact and self.step != self.saved
        try:
            if unsaved:
                set_random_state(generators)
                self._save()
            self.writer.finish()
        except (CheckpointError, OSError) as error:  # must not hide the failure itself
            self.display.message(f"step {self.step + 1} failed, and step {self.step} could not be saved: {error}")
        else:
            if unsaved:
                self.display.message(
                    f"step {self.step + 1} failed; step {self.step} is saved: continue with the same command and --resume"
                )

    def _apply_guard(self) -> None:
        """Load the weights that the guard chose as the result, on all processes."""
        result = self.guard.result(self.step)
        if self.processes.is_main:
            checkpoint.mark_result(self.folder, None if result == self.step else result)
        if result == self.step:
            return
        place = checkpoint.checkpoint_folder(self.folder, result)
        if not place.is_dir():
            raise CheckpointError(
                f"the guard takes the run back to step {result}, whose checkpoint is not in {self.folder} (the best one is kept "
                "only while the recipe has a guard); continue with --resume and guard.action=stop, or warn"
            )
        checkpoint.load_trained(self.policy.snapshots.layout, place, self.processes)
        checkpoint.load_snapshots(self.policy.snapshots, place, self.processes)
        self.after = _evaluation(next(row for row in self.guard.rows if row["step"] == result))

    def _finish(self) -> RunSummary:
        """Write the RLG sweep, the trained model, samples before and after training, the summary and the report."""
        picture = ""
        if self.evaluator is not None and self.config.eval.rlg:
            run_sweep(self.evaluator, self.config, self.folder)
        snapshots = self.policy.snapshots
        with (
            phase("saving the model"),
            snapshots.as_current(self.config.eval.snapshot),
            snapshots.layout.materialised(),
        ):
            if self.processes.is_main:
                self.policy.save(self.folder / "model")
        if self.evaluator is not None and self.config.eval.show > 0:
            picture = save_before_after(self.evaluator, self.config, self.folder)
        summary = RunSummary(
            self.before,
            self.after,
            self.step,
            self.seconds,
            self.trainer.evaluations,
            str(self.folder / "report.html"),
            picture,
            str(self.folder / "model"),
            self.guard.message(self.step),
        )
        if self.processes.is_main:
            (self.folder / "summary.json").write_text(summary.to_json())
            write_report([self.folder], self.folder / "report.html")
        self.processes.wait()
        self.display.finish(summary)
        return summary

    def _facts(self) -> RunFacts:
        config = self.config
        rank = config.model.lora.rank
        tuned = f"LoRA{f' r{rank}' if rank else ''}" if config.model.train == "lora" else "full"
        details = (
            config.algorithm or config.objective.kind,
            Path(config.model.path).name,
            tuned,
            f"seed {config.seed}",
        )
        samples = config.data.prompts_per_step * config.data.group_size
        # Where no reward is learnt from, their sum is 0. Recorded samples bring a reward of their own.
        summed = config.data.rows != "prompts" or not all(reward.silent for reward in config.rewards)
        reward = "mean" if summed else config.rewards[0].label
        return RunFacts(
            self.folder.name, config.train.steps, samples, details, str(self.folder), self.step, f"reward/{reward}"
        )


def _evaluation(row: Mapping[str, float]) -> dict[str, float]:
    return {k: v for k, v in row.items() if k.startswith("eval/")}


def _seconds(row: Mapping[str, float]) -> float:
    return sum(v for k, v in row.items() if k.startswith("time/"))
