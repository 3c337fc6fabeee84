"""Presets of image models. Clip ranges and step sizes are for latents of SD3.5 (65,536 numbers; those of DDPO for SD 1.x:
16,384). Recipes for another size set their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from difrl.config.presets.preset import Preset


def _reverse(
    kernel: str, noise_level: float, clip: float, *, window: Mapping[str, Any] | None = None, **more: Any
) -> dict[str, Any]:
    """Return the common settings of policy gradients on denoising steps: equal clip bounds, group z-scores, no anchor."""
    rollout = {"kernel": kernel, "noise_level": noise_level, "window": window or {"kind": "all"}}
    return {
        "rollout": rollout,
        "likelihood": {"kind": "reverse", "reduce": "mean", "old": "recorded"},
        "objective": {"kind": "clipped", "clip_low": clip, "clip_high": clip},
        "anchors": [],
        "advantage": {"baseline": "mean", "std": "group", "clip": 5.0},
        **more,
    }


def _average(decay: float, every: int = 1) -> dict[str, Any]:
    """Return settings under which an average of the weights is evaluated, saved and opened."""
    return {
        "snapshots": {"average": {"kind": "average", "decay": decay, "every": every}},
        "eval": {"snapshot": "average"},
    }


IMAGE_PRESETS: Mapping[str, Preset] = {
    "awm": Preset(
        summary="Advantage Weighted Matching: the pretraining loss, weighted by the advantage",
        source="2509.25050",
        # geneval_sd3_no_cfg of scxue/advantage_weighted_matching, advantage_weighted_matching/config/dgx_awm.py, 2026-03-27.
        # The coefficient to base is 0.001 there, 0.003 for OCR and 1e-4 for PickScore. They evaluate and save the average as
        # well as the weights themselves. What differs: their samples come from SA-Solver at 14 steps, the first of six times
        # is always the first of the sampler, and AdamW has a weight decay of 1e-4 (train.weight_decay).
        settings={
            "eval": {"snapshot": "average"},
            "rollout": {"kernel": "ode", "noise_level": 0.0},
            "likelihood": {
                "kind": "forward",
                "weighting": "ghuber",
                "times": {"kind": "grid", "fraction": 0.9},
                "decisions": 6,
                "old": "detach",
            },
            "objective": {"kind": "clipped", "clip_low": 1.0, "clip_high": 1.0},
            "snapshots": {
                "ema": {"decay": {"kind": "linear", "start": 0.0, "end": 0.3, "steps": 300}},
                **_average(0.99)["snapshots"],
            },
            "anchors": [
                {"to": "ema", "divergence": "velocity", "coefficient": 1.0},
                {"to": "base", "divergence": "velocity", "coefficient": 0.001},
            ],
            "advantage": {"baseline": "mean", "std": "global", "clip": 5.0, "scale": 0.2},
        },
    ),
    "ddpo": Preset(
        summary="DDPO: policy gradient on every step of the DDIM sampler at full noise",
        source="2305.13301",
        # DDPO_IS, with eta and clip range as in kvablack/ddpo-pytorch, config/base.py, 2023-11-16. What differs: their mean and
        # standard deviation are over a prompt's last rewards, here over a group. Advantages are clipped at 5 there, and AdamW
        # has a weight decay of 1e-4 (train.weight_decay).
        settings=_reverse("ddim", 1.0, 1e-4, advantage={"baseline": "mean", "std": "group", "clip": 10.0}),
    ),
    "flow_grpo": Preset(
        summary="Flow-GRPO: policy gradient on every step of the Flow-SDE sampler, KL to the base model",
        source="2505.05470",
        # geneval_sd3 of yifan123/flow_grpo, config/grpo.py, 2025-07-18, with the average of scripts/train_sd3.py. What differs:
        # their beta = 0.04 multiplies KL times |dt|, and |dt| is 0.1 on average in its ten steps. Advantages are divided by
        # the group's standard deviation, as in the paper; their recipes divide by that of all rewards. AdamW has a weight
        # decay of 1e-4 there (train.weight_decay).
        settings=_reverse(
            "flow_sde",
            0.7,
            1e-4,
            **_average(0.9, 8),
            anchors=[{"to": "base", "divergence": "gaussian", "coefficient": 0.004}],
        ),
    ),
    "flow_grpo_fast": Preset(
        summary="Flow-GRPO-Fast: Flow-GRPO on a random window of two steps, the others by the ODE",
        source="2505.05470",
        # As in the authors' later code (config/grpo.py and scripts/train_sd3_fast.py of zhtmike/flow_grpo, a copy of
        # yifan123/flow_grpo of 2025-11-04), with their average; in their first code a group also shared the steps before the
        # window. They keep the window in the first half of the path; a recipe sets `end` to match its steps. AdamW has a
        # weight decay of 1e-4 there (train.weight_decay).
        settings=_reverse(
            "flow_sde",
            0.8,
            1e-5,
            **_average(0.9, 8),
            window={"kind": "random", "start": 0, "size": 2},
            advantage={"baseline": "mean", "std": "global", "clip": 5.0},
        ),
    ),
    "dance_grpo": Preset(
        summary="DanceGRPO: policy gradient on steps of constant noise, without an anchor",
        source="2505.07818",
        # scripts/finetune/finetune_flux_grpo.sh of XueZeyue/DanceGRPO, 2025-10-16. What differs: the authors train a random 60 %
        # of the steps, start all samples of a group from the same noise, and have a weight decay of 1e-4 (train.weight_decay).
        settings=_reverse("dance_sde", 0.3, 1e-4),
    ),
    "cps": Preset(
        summary="Flow-CPS: policy gradient on coefficient-preserving sampling, which leaves no noise in the images",
        source="2509.05952",
        # geneval_sd3_fast_nocfg of the Flow-GRPO authors, whose code includes the method (config/grpo.py of zhtmike/flow_grpo,
        # a copy of 2025-11-04), with their average: the window stays in the first half. What differs: their clip range of
        # 1e-5 is for -|x - mean|^2 as log-likelihood, and the true one needs a larger range. AdamW has a weight decay of 1e-4
        # there (train.weight_decay).
        settings=_reverse(
            "cps",
            0.8,
            1e-4,
            **_average(0.9, 8),
            window={"kind": "random", "start": 0, "size": 3},
            advantage={"baseline": "mean", "std": "global", "clip": 5.0},
        ),
    ),
    "grpo_guard": Preset(
        summary="GRPO-Guard: Flow-GRPO on ratios with mean 1 and equal spread at every step, so that clipping takes effect",
        source="2510.22319",
        # general_ocr_sd3_rationorm of the authors (config/grpo_guard.py and scripts/train_sd3_GRPO_Guard.py of
        # zhtmike/flow_grpo, a copy of yifan123/flow_grpo of 2025-11-04), who evaluate and save the average. The clip range is
        # 2e-6, since a normalised ratio varies less than a plain one. What differs: AdamW has a weight decay of 1e-4 there
        # (train.weight_decay).
        settings={
            **_reverse("flow_sde", 0.7, 2e-6),
            **_average(0.9, 8),
            "likelihood": {"kind": "reverse", "reduce": "mean", "old": "recorded", "step_weight": "time_step"},
            "objective": {"kind": "ratio_normalised", "clip_low": 2e-6, "clip_high": 2e-6},
        },
    ),
    "flow_dppo": Preset(
        summary="Flow-DPPO: a trust region in the exact KL of a step; outside it only steps back towards old count",
        source="2606.11025",
        # examples/diffusion/sd3_flowdppo.yaml of Tencent-Hunyuan/UniRL, 2026-06-13: three random steps of the first half, not
        # necessarily adjacent; a recipe sets `end` to match its steps. They also sample with Flow-CPS. A trust region takes
        # effect from the second update of a rollout on.
        settings={
            **_reverse("flow_sde", 0.7, 1e-5, window={"kind": "random", "start": 0, "size": 3, "adjacent": False}),
            "objective": {"kind": "divergence_masked", "delta": 1e-5},
            "advantage": {"baseline": "mean", "std": "global", "clip": 5.0},
        },
    ),
    "mix_grpo": Preset(
        summary="MixGRPO: policy gradient on a window of four steps that moves over the trajectory",
        source="2507.21802",
        # scripts/finetune/finetune_flux_grpo_MixGRPO.sh of Tencent-Hunyuan/MixGRPO, 2025-08-08, for 25 steps, of which 300
        # iterations visit the first 15. What differs: at the end of the path the window stays, as in the paper; in the
        # authors' code it begins again. AdamW has a weight decay of 1e-4 there (train.weight_decay).
        settings=_reverse(
            "flow_sde", 0.7, 1e-4, window={"kind": "sliding", "start": 0, "size": 4, "stride": 1, "every": 25}
        ),
    ),
    "precise": Preset(
        summary="Precise: policy gradient on a sampler that solves Flow-SDE's equation for a fixed clean sample",
        source="2605.23522",
        # `--sde precise` of Tencent-Hunyuan/Precise, config/flux2_klein.py and precise_sde/diffusers_patch/sde_with_logprob.py,
        # 2026-05-22, for FLUX.2 klein; their trainer evaluates and saves the average. What differs: ratios are normalised there
        # as in grpo_guard and clipped at 4e-6, where this preset has the ratios and the clip range of Flow-GRPO. AdamW has a
        # weight decay of 1e-4 there (train.weight_decay).
        settings=_reverse("precise", 1.5, 1e-4, **_average(0.9, 8)),
    ),
    "crd": Preset(
        summary="Centred reward distillation: log-ratios regressed on rewards, both centred within a prompt",
        source="2603.14128",
        # SD3.5-M on OCR (table 3): examples/crd/lora/sd3_5/default.yaml and src/flow_factory/trainers/crd.py that the first
        # author added to X-GenGroup/Flow-Factory, 2026-05-02; other code was not found. Groups of 24, two updates a step, and
        # the decays min(0.25 + 0.005 n, 0.999) of old and min(0.0075 (n - 75), 0.999) of sampler, 0 until n = 75. What
        # differs: they compare 20 times a sample separately (a recipe can raise `decisions`), the first of the sampler's times
        # among them, which a grid here leaves out. They centre over the micro-batch of all processes, here over a prompt.
        # Evaluations take the framework's default average, and AdamW has a weight decay of 1e-4 (train.weight_decay).
        settings={
            "rollout": {"kernel": "ode", "noise_level": 0.0, "snapshot": "sampler"},
            "likelihood": {
                "kind": "forward",
                "weighting": "adaptive",
                "times": {"kind": "grid", "fraction": 1.0},
                "decisions": 1,
                "old": "recompute",
            },
            "objective": {"kind": "centred", "beta": 1.0, "bound": 5.0},
            "snapshots": {
                "old": {"decay": {"kind": "linear", "start": 0.25, "end": 0.999, "steps": 149.8}},
                "sampler": {"decay": {"kind": "linear", "start": 0.0, "end": 0.999, "steps": 133.2, "hold": 75}},
            },
            "anchors": [
                {
                    "to": "base",
                    "divergence": "velocity",
                    "coefficient": {"kind": "reward_adaptive", "value": 0.1, "floor": 1e-4, "limit": 5.0},
                    "guidance": 4.5,
                }
            ],
            "advantage": {"baseline": "mean", "std": "global", "clip": 5.0},
        },
    ),
    "nft": Preset(
        summary="DiffusionNFT: a mixture towards the trained weights fits good samples, a mixture away from them bad samples",
        source="2509.16117",
        # SD3.5-M on GenEval of NVlabs/DiffusionNFT, config/nft.py and scripts/train_nft_sd3.py, 2025-09-22, who evaluate and
        # save an average. The decay of old, which draws the samples, is min(0.001 n, 0.5). What differs: they choose nine of
        # the sampler's ten times at random, the first among them, which a grid here leaves out, and AdamW has a weight decay
        # of 1e-4 (train.weight_decay).
        settings={
            "rollout": {"kernel": "ode", "noise_level": 0.0, "snapshot": "old"},
            "likelihood": {
                "kind": "forward",
                "weighting": "adaptive",
                "error": "clean",
                "times": {"kind": "grid", "fraction": 1.0},
                "old": "recompute",
                "mix": 1.0,
            },
            "objective": {"kind": "negative_aware", "bound": 5.0},
            "eval": {"snapshot": "average"},
            "snapshots": {
                "old": {"decay": {"kind": "linear", "start": 0.0, "end": 0.5, "steps": 500}},
                **_average(0.9)["snapshots"],
            },
            "anchors": [{"to": "base", "divergence": "velocity", "coefficient": 1e-4}],
            "advantage": {"baseline": "mean", "std": "global", "clip": 5.0},
        },
    ),
    "diffusion_dpo": Preset(
        summary="Diffusion-DPO: the better of two samples should gain more likelihood over the base model",
        source="2311.12908",
        # SD 1.5 on Pick-a-Pic of SalesforceAIResearch/DiffusionDPO, launchers/sd15.sh, 2023-12-27: beta_dpo = 5000
        # with the factor 1/2, which is 2500 here, on squared errors averaged over dimensions, one (t, noise) a pair and uniform
        # t. What differs: pairs are the best and worst of a group drawn online, unless a recipe reads a file (data.rows:
        # pairs), and AdamW has a weight decay of 0.01 there (train.weight_decay).
        settings={
            "rollout": {"kernel": "ode", "noise_level": 0.0},
            "likelihood": {
                "kind": "forward",
                "weighting": "uniform",
                "times": {"kind": "uniform"},
                "decisions": 1,
                "share": ["t", "noise"],
                "old": "detach",
            },
            "objective": {"kind": "preference", "beta": 2500.0},
            "anchors": [],
            "advantage": {"baseline": "mean", "std": "none"},
        },
    ),
    "b2_diffurl": Preset(
        summary="B²-DiffuRL: the last denoising steps first, comparing samples that share the steps before",
        source="2503.11240",
        # hu-zijing/B2-DiffuRL, run_process.sh, config/stage_process.py, 2025-03-31: eta, clip range and bound
        # of the advantage, with branches of five. What differs: they keep only the best and the worst sample of a branch, if
        # they are half a standard deviation from the mean of the prompt's last eight rounds, and that distance is the
        # advantage. Here all samples are kept, with the branch as baseline. AdamW has a weight decay of 1e-4 there
        # (train.weight_decay).
        settings={
            **_reverse("ddim", 1.0, 0.1),
            "rollout": {
                "kernel": "ddim",
                "noise_level": 1.0,
                "window": {"kind": "progressive"},
                "branch": {"count": 1, "prefix": "kernel"},
            },
        },
    ),
    "ddim_inpo": Preset(
        summary="DDIM-InPO: Diffusion-DPO at the states from which the sampler generates the images, found by inversion",
        source="2503.18454",
        # SD 1.5 of JaydenLyh/InPO, examples/sd15.sh, 2025-06-29: beta_dpo = 2000 with the factor 1/2, which is 1000
        # here; SDXL has 5000. What differs: the paper inverts the reference, as this preset does; the authors' code inverts
        # the weights under training, adds a tenth of DDPM's noise, and takes t between the inverted times. AdamW has a weight
        # decay of 0.01 there (train.weight_decay).
        settings={
            "rollout": {"kernel": "ode", "noise_level": 0.0},
            "likelihood": {
                "kind": "forward",
                "weighting": "uniform",
                "times": {"kind": "grid", "fraction": 1.0},
                "noise": {"kind": "inversion", "snapshot": "base"},
                "decisions": 1,
                "share": ["t"],
                "old": "detach",
            },
            "objective": {"kind": "preference", "beta": 1000.0},
            "anchors": [],
            "advantage": {"baseline": "mean", "std": "none"},
        },
    ),
}
