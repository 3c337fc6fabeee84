"""Save and load checkpoints: the state from which a run continues as if it had never stopped, in safetensors and JSON.

    step-000050/  trained.safetensors  optimizer.safetensors  snapshots.safetensors  source.safetensors  random.safetensors
                  state.json  SHA256SUMS

The format does not depend on the layout of the weights: the main process writes whole tensors, and reads them for all
processes. Rollouts draw keyed noise and the order of prompts depends on the step alone, so the step is the position in the
data. The global random states are saved for rewards that use them (random.safetensors, by process). So are the scores of
reference samples, which a reward might not give again (source.safetensors, by process).
"""

from __future__ import annotations

from difrl.training.checkpoint.folder import (
    CheckpointError,
    DamagedCheckpoint,
    check,
    checkpoint_folder,
    find_all,
    find_latest,
    find_result,
    find_whole,
    mark_result,
    parse_step,
    read_state,
    remove_partial,
    set_aside,
)
from difrl.training.checkpoint.read import load, load_snapshots, load_trained
from difrl.training.checkpoint.write import Writer, save

__all__ = [
    "CheckpointError",
    "DamagedCheckpoint",
    "Writer",
    "check",
    "checkpoint_folder",
    "find_all",
    "find_latest",
    "find_result",
    "find_whole",
    "load",
    "load_snapshots",
    "load_trained",
    "mark_result",
    "parse_step",
    "read_state",
    "remove_partial",
    "save",
    "set_aside",
]
