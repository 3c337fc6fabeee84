"""A run from its recipe to its report: builds the parts, drives the trainer, keeps the run folder.

runs/NAME/  config.yaml  metrics.jsonl  samples/  checkpoints/  model/  summary.json  rlg.json  report.html
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
from difrl.config.load import read_config
from difrl.config.run import samples_base_at_end
from difrl.data.modality import MODALITIES
from difrl.data.prompts import Prompt, load_prompts
from difrl.data.recorded_samples import training_prompts
from difrl.policies.base import Policy
from difrl.policies.load import load_policy
from difrl.reporting.html import write_report
from difrl.reporting.metrics_file import MetricsFile, read_metrics
from difrl.reporting.terminal import Display, RunFacts, SilentDisplay, Summary, open_display
from difrl.reporting.trackers import TrackerFactory, find_trackers
from difrl.runtime.distributed import DistributedContext, ProcessError
from difrl.runtime.errors import UserError
from difrl.runtime.log_capture import notices
from difrl.runtime.memory import enough_for
from difrl.scoring import Scorer
from difrl.scoring.diversity import Diversity
from difrl.training import checkpoint
from difrl.training.checkpoint import CheckpointError
from difrl.training.evaluation import Evaluator, samples_due
from difrl.training.guard import Guard
from difrl.training.interrupts import stop_requested
from difrl.training.run_folder import RunFolderError, checkpoint_to_resume, prepare_folder, stretched
from difrl.training.sample_outputs import save_before_after, save_step_samples, sweep
from difrl.training.trainer import Trainer, TrainingError
from rewards import RewardError
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
) -> Summary:
    """Trains what a recipe describes and returns what changed; the run folder is `config.output_dir`.

    Seeds the global generators of torch, numpy and Python.
    """
    processes = processes or DistributedContext()
    if config.train.threads is not None:
        torch.set_num_threads(config.train.threads)
    # For rewards and models that draw from the global generators: difrl's own noise is keyed and asks none of them.
    set_seed(stable_seed(config.seed, "global", processes.rank) % 2**32)
    place = checkpoint_to_resume(config, resume, processes)
    # Before the model, which may take minutes to load: a misspelt prompt file, tracker or reward is reported at once.
    prompts = Prompts.load(config)
    trackers = find_trackers(config)
    scorer = Scorer.build(config.rewards, config.watch, processes.device)
    scorer.check_modality(MODALITIES[config.likelihood.kind])
    policy = load_policy(config, processes.device, keep_base=samples_base_at_end(config))
    policy.validate_prompts([*prompts.train, *(prompts.evaluation or [])])
    run = Run(config, policy, scorer, prompts, processes, _display(display, processes), trackers)
    try:
        if place is not None:
            run.resume(place)
        prepare_folder(config, processes)
        return run()
    except (OSError, SafetensorError) as error:  # what rewards and models raise has names of its own
        raise RunFolderError(
            f"cannot write to {config.output_dir}: {error}. What was saved before is untouched; free some space or fix the "
            "permissions and continue with --resume"
        ) from error
    finally:
        run.display.close()


def _display(display: Display | None, processes: DistributedContext) -> Display:
    if not processes.is_main:
        return SilentDisplay()
    return display if display is not None else open_display()


@dataclass(frozen=True)
class Prompts:
    """What a run trains on, and what it is evaluated on."""

    train: Sequence[Prompt]
    evaluation: Sequence[Prompt] | None

    @classmethod
    def load(cls, config: RunConfig) -> Prompts:
        evaluation = config.data.evaluation
        return cls(training_prompts(config), None if evaluation is None else load_prompts(evaluation))


@dataclass
class Run:
    """A run in progress. `step` counts the steps that are done."""

    config: RunConfig
    policy: Policy
    scorer: Scorer
    prompts: Prompts
    processes: DistributedContext
    display: Display
    trackers: Sequence[TrackerFactory] = ()

    def __post_init__(self) -> None:
        config = self.config
        self.folder = config.output_dir
        self.trainer = Trainer(config, self.policy, self.scorer, self.prompts.train, self.processes)
        self.evaluator = self._evaluator()
        self.step = 0
        self.seconds = 0.0
        self.before: dict[str, float] = {}
        self.after: dict[str, float] = {}
        self.guard = Guard(config.guard)
        self.saved = 0
        """The step of the newest checkpoint."""
        self.unevaluated: Mapping[str, float] | None = None
        """The metrics of a step that was saved when its evaluation failed."""

    def _evaluator(self) -> Evaluator | None:
        if self.prompts.evaluation is None or self.config.eval.every == 0:
            return None
        diversity = Diversity.build(self.config.eval.diversity)
        return Evaluator(self.policy, self.scorer, self.prompts.evaluation, self.processes, self.config.seed, diversity)

    def resume(self, place: Path) -> None:
        """Continues from a checkpoint."""
        self.step = self.saved = checkpoint.load(self.trainer, place, self.processes)
        rows = [row for row in read_metrics(self.folder) if row["step"] <= self.step]
        self.guard.rows = [{"step": row["step"], **found} for row in rows if (found := _evaluation(row))]
        self.before = next((_evaluation(row) for row in rows if _evaluation(row)), {})
        self.after = next((_evaluation(row) for row in reversed(rows) if _evaluation(row)), {})
        if rows and self._evaluation_due() and not _evaluation(rows[-1]):
            self.unevaluated = rows[-1]
        self.seconds = sum(v for row in rows for k, v in row.items() if k.startswith("time/"))
        known = read_config(self.folder / "config.yaml")
        if changed := stretched(known, self.config):
            self.display.message(
                f"train.steps is {self.config.train.steps} and was {known.train.steps}: from here on {', '.join(changed)} "
                "span the new number, so the run differs from one that had it from the start"
            )
        threads = checkpoint.read_state(place)["threads"]
        if threads != torch.get_num_threads():
            self.display.message(
                f"this process has {torch.get_num_threads()} CPU threads and the checkpoint was made with {threads}: "
                f"results agree to float order only (set train.threads={threads} for the same bits)"
            )

    def __call__(self) -> Summary:
        """Runs the remaining steps, and what follows the last."""
        config = self.config
        self.display.start(self._facts())
        metrics_file = None
        if self.processes.is_main:
            metrics_file = MetricsFile(self.folder, self.step, [build(config, self.step) for build in self.trackers])
        if self.processes.is_main and not self.guard.ends:
            checkpoint.mark_result(self.folder, None)  # what an earlier guard decided, where the run now goes on
        with stop_requested(self.display) as stop, notices(self.display.message), metrics_file or nullcontext():
            if self.step == 0 and self.evaluator is not None:
                if self.step in self.guard.kept:
                    self._save(metrics_file)  # before the evaluation, with which a run that is resumed here begins
                found = self._evaluate(samples_due(config, 0))
                self.before = self.after
                self._write(metrics_file, {"step": 0, "nfe": 0, **found})
            if self.unevaluated is not None:
                found = self._evaluated(self.unevaluated, None)
                if metrics_file is not None:
                    metrics_file.amend({**self.unevaluated, **found})
                if self._checkpoint_due():
                    self._save(metrics_file)
            while self.step < config.train.steps and not self.guard.ends:
                metrics = {"step": self.step + 1, **self._step(metrics_file)}
                self.step += 1
                self.seconds += sum(v for k, v in metrics.items() if k.startswith("time/"))
                self.display.step(metrics)
                self._write(metrics_file, metrics | self._evaluated(metrics, metrics_file))
                stopping = self.processes.any(stop.requested)
                if self._checkpoint_due() or stopping:
                    self._save(metrics_file)
                if stopping and self.step < config.train.steps and not self.guard.ends:
                    raise Interrupted(
                        f"stopped after step {self.step}, which is saved; continue with the same command and --resume"
                    )
        return self._close()

    def _facts(self) -> RunFacts:
        config = self.config
        tuned = f"LoRA r{config.model.lora.rank}" if config.model.train == "lora" else "full"
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

    def _write(self, metrics_file: MetricsFile | None, metrics: Mapping[str, float]) -> None:
        if metrics_file is not None:
            metrics_file.write(metrics)

    def _checkpoint_due(self) -> bool:
        every, last = self.config.checkpoint.every, self.step == self.config.train.steps
        return last or (every > 0 and self.step % every == 0) or self.guard.ends or self.step in self.guard.kept

    def _save(self, metrics_file: MetricsFile | None) -> None:
        if metrics_file is not None:
            metrics_file.sync()
        keep, kept = self.config.checkpoint.keep, self.guard.kept
        checkpoint.save(self.trainer, self.folder, self.step, keep, self.processes, kept)
        self.saved = self.step

    def _step(self, metrics_file: MetricsFile | None) -> dict[str, float]:
        """The next step. If it fails before it has changed anything, the steps before it are saved."""
        before = checkpoint.random_state()
        try:
            return self.trainer.step(self.step)
        except (RewardError, ProcessError, TrainingError):  # raised on every process
            self._save_before_failure(before, metrics_file)
            raise
        except Exception:
            if self.processes.count == 1:
                self._save_before_failure(before, metrics_file)
            raise

    def _save_before_failure(self, generators: Mapping[str, torch.Tensor], metrics_file: MetricsFile | None) -> None:
        if not self.trainer.intact or self.step == self.saved:
            return
        checkpoint.set_random_state(generators)  # as they were before the step, or the evaluation, which is done again
        try:
            self._save(metrics_file)
        except (CheckpointError, OSError) as error:  # the failure itself is what must be heard
            self.display.message(f"step {self.step + 1} failed, and step {self.step} could not be saved: {error}")
        else:
            self.display.message(
                f"step {self.step + 1} failed; step {self.step} is saved: continue with the same command and --resume"
            )

    def _evaluation_due(self) -> bool:
        return samples_due(self.config, self.step) > 0

    def _evaluated(self, metrics: Mapping[str, float], metrics_file: MetricsFile | None) -> dict[str, float]:
        """The evaluation of the step that was just made. If it fails the step is saved, and evaluated when the run goes on."""
        before = checkpoint.random_state()
        try:
            return self._evaluate_if_due()
        except (RewardError, ProcessError):  # raised on every process
            self._write(metrics_file, metrics)
            self._save_before_failure(before, metrics_file)
            raise

    def _evaluate_if_due(self) -> dict[str, float]:
        samples = samples_due(self.config, self.step)
        return self._evaluate(samples) if samples else {}

    def _evaluate(self, images: int) -> dict[str, float]:
        """Evaluates on all processes, tells the guard, and draws the fixed grid on the first; eval/… and guard/… metrics."""
        assert self.evaluator is not None
        spent = self.policy.evaluations
        with enough_for("evaluation", f"lower rollout.batch (now {self.config.rollout.batch} samples)"):
            metrics = self.after = self.evaluator(images)
        if self.config.eval.show > 0:
            with self.processes.fail_together():
                if self.processes.is_main:
                    save_step_samples(self.evaluator, self.config, self.folder, self.step)
        self.policy.evaluations = spent  # what is logged is the cost of training
        self.display.evaluation({"step": self.step, **metrics})
        found = self.guard.observe({"step": self.step, **metrics})
        if said := self.guard.said(self.step):
            self.display.message(said)
        return metrics | found

    def _take_back(self) -> None:
        """Gives the policy the weights that the guard says are the result; all processes do."""
        result = self.guard.result(self.step)
        if self.processes.is_main:
            checkpoint.mark_result(self.folder, None if result == self.step else result)
        if result == self.step:
            return
        place = checkpoint.folder_of(self.folder, result)
        if not place.is_dir():
            raise CheckpointError(
                f"the guard takes the run back to step {result}, whose checkpoint is not in {self.folder} (the best one is kept "
                "only while the recipe has a guard); continue with --resume and guard.action=stop, or warn"
            )
        checkpoint.load_trained(self.policy.parameters, place)
        self.after = _evaluation(next(row for row in self.guard.rows if row["step"] == result))

    def _close(self) -> Summary:
        """The trained model, the sweep, the comparison and the report, after the last step."""
        picture = ""
        self._take_back()
        if self.evaluator is not None and self.config.eval.rlg:
            sweep(self.evaluator, self.config, self.folder, self.processes)
        if self.processes.is_main:
            self.policy.save(self.folder / "model")
            if self.evaluator is not None and self.config.eval.show > 0:
                picture = save_before_after(self.evaluator, self.config, self.folder)
        summary = Summary(
            self.before,
            self.after,
            self.step,
            self.seconds,
            self.trainer.evaluations,
            str(self.folder / "report.html"),
            picture,
            str(self.folder / "model"),
            self.guard.said(self.step),
        )
        if self.processes.is_main:
            (self.folder / "summary.json").write_text(summary.to_json())
            write_report([self.folder], self.folder / "report.html")
        self.processes.wait()
        self.display.finish(summary)
        return summary


def _evaluation(row: Mapping[str, float]) -> dict[str, float]:
    return {k: v for k, v in row.items() if k.startswith("eval/")}
