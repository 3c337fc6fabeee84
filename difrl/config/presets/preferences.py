"""Presets of language models that learn from preferences between two texts: DPO and its relatives.

A text is compared as a whole, by the sum of its tokens' log-ratios to the pretrained model. The pairs come from a file
(data.rows: pairs); without a file they are the best and the worst text of a sampled group.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from difrl.config.presets.preset import Preset


def _pairs(**objective: Any) -> dict[str, Any]:
    """Return the common settings of the losses of pairs."""
    return {
        "likelihood": {"kind": "tokens", "old": "detach"},
        "objective": {"kind": "preference", "beta": 0.1, "decisions": "sum", **objective},
        "anchors": [],
        "advantage": {"baseline": "mean", "std": "none"},
    }


PREFERENCES: Mapping[str, Preset] = {
    "dpo": Preset(
        summary="DPO: the better of two texts should gain more likelihood over the pretrained model",
        source="2305.18290",
        # Dialogues (HH) of eric-mitchell/direct-preference-optimization, README.md and its trainers, 2023-12-14: beta = 0.1. The
        # paper has 0.5 for summaries (appendix B). What differs: the optimizer is RMSprop there.
        settings=_pairs(),
    ),
    "f_dpo": Preset(
        summary="f-DPO: DPO with another divergence from the pretrained model than the reverse KL, here Jensen-Shannon",
        source="2309.16240",
        # IMDB of alecwangcq/f-divergence-dpo, scripts/imdb/run_jsd.sh, 2024-03-06, and its trainers, 2024-11-03: beta = 0.1;
        # scripts/hh/run_jsd.sh has 0.3 for dialogues. The other choices are forward_kl, and alpha with a value of alpha. What
        # differs: the optimizer is RMSprop there.
        settings=_pairs(divergence="jensen_shannon"),
    ),
    "rdpo": Preset(
        summary="rDPO: DPO's loss corrected for a share of wrong labels, so that its mean is that of clean labels",
        source="2403.00409",
        # A share of 0.1 (section 6) and beta = 0.1 (appendix B). No code of the authors was found; the loss is `robust` of
        # huggingface/trl, trl/trainer/dpo_trainer.py, 2026-07-21, and its index of papers has the same values.
        # The share depends on the labels, so a recipe should set its own.
        settings=_pairs(flip=0.1),
    ),
    "ipo": Preset(
        summary="IPO: the margin of a pair is regressed on 1 / 2β, which bounds it even for certain labels",
        source="2310.12036",
        # Eq. 17, for whole texts as in the trainers of eric-mitchell/direct-preference-optimization, 2023-11-24; no code of the
        # authors was found. The paper's values are 0.1 to 1, on bandits. What differs in huggingface/trl,
        # trl/trainer/dpo_trainer.py, 2026-07-21: log-ratios are means over tokens (decisions: mean), which its comment
        # attributes to the paper's authors.
        settings=_pairs(loss="squared"),
    ),
    "adpo": Preset(
        summary="ADPO: a softmax of log-ratios to the pretrained model is fitted to a softmax of rewards: soft labels",
        source="2510.18913",
        # Temperatures of 1 are the paper's plain form. For a pair the loss is DPO's at β = 1 / temperature with soft labels. What
        # differs in the author's online form (wk222/verlm, verl/trainer/config/adpo_trainer.yaml, 2025-11-28, and
        # verl/trainer/adpo/core_algos.py, 2026-05-26): temperatures of 0.8, adapted to the entropy, and 0.5, log-ratios to old
        # (reference: old) as means over tokens (decisions: mean), and rewards standardised within a group.
        settings={
            "likelihood": {"kind": "tokens", "old": "detach"},
            "objective": {
                "kind": "anchored_preference",
                "temperature": 1.0,
                "target_temperature": 1.0,
                "decisions": "sum",
            },
            "anchors": [],
            "advantage": {"baseline": "mean", "std": "none"},
        },
    ),
}
