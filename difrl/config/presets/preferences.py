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
        settings=_pairs(),
    ),
    "f_dpo": Preset(
        summary="f-DPO: DPO with another divergence from the pretrained model than the reverse KL, here Jensen-Shannon",
        source="2309.16240",
        # The other choices are forward_kl, and alpha with a value of alpha.
        settings=_pairs(divergence="jensen_shannon"),
    ),
    "rdpo": Preset(
        summary="rDPO: DPO's loss corrected for a share of wrong labels, so that its mean is that of clean labels",
        source="2403.00409",
        # The share depends on the labels, so a recipe should set its own.
        settings=_pairs(flip=0.1),
    ),
    "ipo": Preset(
        summary="IPO: the margin of a pair is regressed on 1 / 2β, which bounds it even for certain labels",
        source="2310.12036",
        settings=_pairs(loss="squared"),
    ),
    "adpo": Preset(
        summary="ADPO: a softmax of log-ratios to the pretrained model is fitted to a softmax of rewards: soft labels",
        source="2510.18913",
        # Temperatures of 1 are the paper's plain form. For a pair the loss is DPO's at β = 1 / temperature with soft labels.
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
