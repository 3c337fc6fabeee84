"""Presets of language models that learn from which of two texts is better: DPO and its relatives.

A text is compared as a whole, by the sum of its tokens' log-ratios to the pretrained model. The pairs are those of a file
(data.rows: pairs); without one they are the best and the worst text of a group that is drawn.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from difrl.config.presets.preset import Preset


def _pairs(**objective: Any) -> dict[str, Any]:
    """What the losses of pairs share."""
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
        likelihood="tokens",
        objective="preference",
        anchor="none",
        advantage="none-std",
        settings=_pairs(),
    ),
    "f_dpo": Preset(
        summary="f-DPO: DPO held to the pretrained model by another divergence than the reverse KL, here Jensen-Shannon",
        source="2309.16240",
        likelihood="tokens",
        objective="preference",
        anchor="none",
        advantage="none-std",
        # Also forward_kl, and alpha with an alpha.
        settings=_pairs(divergence="jensen_shannon"),
    ),
    "rdpo": Preset(
        summary="rDPO: DPO's loss corrected for a share of labels that are wrong, so that its mean is that of clean labels",
        source="2403.00409",
        likelihood="tokens",
        objective="preference",
        anchor="none",
        advantage="none-std",
        # The share is that of the labels, so a recipe should say its own.
        settings=_pairs(flip=0.1),
    ),
    "ipo": Preset(
        summary="IPO: the margin of a pair is regressed on 1 / 2β, which bounds it where labels are certain",
        source="2310.12036",
        likelihood="tokens",
        objective="preference",
        anchor="none",
        advantage="none-std",
        settings=_pairs(loss="squared"),
    ),
    "adpo": Preset(
        summary="ADPO: a softmax of log-ratios to the pretrained model is fitted to a softmax of rewards: soft labels",
        source="2510.18913",
        likelihood="tokens",
        objective="anchored_preference",
        anchor="none",
        advantage="none-std",
        # Temperatures of 1, the paper's plain form; for a pair the loss is DPO's at β = 1 / temperature, with soft labels.
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
