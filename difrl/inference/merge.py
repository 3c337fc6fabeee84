"""A whole model of a run: `difrl merge`."""

from __future__ import annotations

from pathlib import Path

from difrl.config.load import read_config
from difrl.inference.loaded_run import load_result, plain_recipe
from difrl.policies.errors import ModelError
from difrl.policies.load import load_policy
from difrl.runtime.paths import expand_user
from difrl.runtime.progress import phase


def merge(source: str, out: Path) -> None:
    """Write the model of a run, or of a folder with trained parts, to the folder `out`, for from_pretrained of its library.

    LoRA is merged into the weights, in the precision of the run. Raise ModelError if `out` holds anything.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ModelError(f"{out} is not empty; give a folder that does not exist yet")
    run = expand_user(source)
    is_run = (run / "config.yaml").is_file()
    config = read_config(run / "config.yaml") if is_run else plain_recipe(source)
    # ΔW is added to the weights before they were quantized.
    plain = {"quantize": "none", "offload": "none", "compile": False, "shard": "none"}
    config = config.model_copy(update={"model": config.model.model_copy(update=plain)})
    policy = load_policy(config, "cpu", run=run if is_run else None)
    if is_run:
        load_result(policy, config, run)
    with phase("writing the model"):
        policy.merge(out)
