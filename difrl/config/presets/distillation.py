"""Presets of language models that learn from the distributions of another model, with or without a reward.

A recipe of g_opd or vopd sets its teacher (teachers: {teacher: {path: …}}) and gives its rewards weight 0: rewards are
reported, and the model learns from the anchors alone. A recipe of dph_rl sets the samples of its rehearsal.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from difrl.config.presets.preset import Preset
from difrl.config.presets.texts import OLD_IS_EVALUATED


def _distillation(anchors: list[dict[str, Any]]) -> dict[str, Any]:
    """Return settings of on-policy distillation: the anchors give every token its own advantage."""
    return {
        **OLD_IS_EVALUATED,
        "objective": {"kind": "clipped", "clip_low": 0.2, "clip_high": 0.2},
        "anchors": [{"divergence": "k1", "place": "decision", **anchor} for anchor in anchors],
        "advantage": {"baseline": "mean", "std": "none"},
        "train": {"aggregation": "decision"},
    }


DISTILLATION: Mapping[str, Preset] = {
    "g_opd": Preset(
        summary="G-OPD: on-policy distillation past the teacher, in the direction from a reference to the teacher",
        source="2602.12125",
        # ExOPD of RUCBM/G-OPD, verl/examples/g_opd/run_qwen3-4b-g-opd.sh and verl/verl/workers/actor/dp_actor.py, 2026-05-28.
        # λ = 1.25: the teacher at λ, the reference at 1 − λ. The reference is the pretrained student. The paper's reward
        # correction replaces it by the model that the teacher was trained from, as a second teacher. What differs: importance
        # weights of tokens drawn by vllm are bounded at 5 there (generation.correction), and AdamW has a weight decay of 0.01
        # (train.weight_decay).
        settings=_distillation([{"to": "teacher", "coefficient": 1.25}, {"to": "base", "coefficient": -0.25}]),
    ),
    "vopd": Preset(
        summary="vOPD: on-policy distillation, each token's log-ratio minus its mean over the vocabulary, for less variance",
        source="2605.07865",
        # holi-lab/vOPD/configs/training/vopd.yaml and src/opd_trainer.py, 2026-05-08, a trainer of huggingface/trl whose default
        # clip range it keeps. The baseline is over the full vocabulary. What differs: vopd-topk.yaml has a baseline over the
        # student's 100 most likely tokens, renormalised, which is not included.
        settings=_distillation([{"to": "teacher", "coefficient": 1.0, "centred": True}]),
    ),
    "dph_rl": Preset(
        summary="DPH-RL: a policy gradient, and forward KL on correct answers of the pretrained model against forgetting",
        source="2509.07430",
        # Forward KL at 0.01 to 0.05, or divergence: jensen_shannon at 0.05 to 0.2. What differs from the authors' code
        # (seamoke/DPH-RL, verl/workers/actor/dp_actor.py, 2025-09-12): there, rehearsed texts are micro-batches of the same
        # mini-batch as the step's own and share its mean, where the anchor here has a mean of its own. With a share s of
        # rehearsed texts, their coefficient c is c s / (1 - s) here, up to a factor that AdamW cancels. They also do not
        # sample for the rehearsed prompts; those prompts whose samples are all correct have no advantage anyway.
        settings={
            **OLD_IS_EVALUATED,
            "objective": {"kind": "clipped", "clip_low": 0.2, "clip_high": 0.28},
            "anchors": [
                {
                    "to": "base",
                    "divergence": "forward_kl",
                    "vocabulary": "sampled",
                    "samples": "rehearsal",
                    "coefficient": 0.01,
                }
            ],
            "advantage": {"baseline": "mean", "std": "group"},
            "train": {"aggregation": "decision"},
        },
    ),
}
