"""Every metric of a run folder, defined once, with its estimator.

Keys are shell patterns over metric names, most particular first. The report shows a definition as a tooltip
beside the metric and lists those in use at its foot; `definition` serves whoever else needs one.
"""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

from difrl.reporting.summary import STDERR

DEFINITIONS: dict[str, str] = {
    "step": "One rollout with its updates; step 0 is the model before training.",
    "nfe": (
        "Denoiser evaluations that training has cost so far, for rollouts and updates, counted per sample "
        "(guidance counts two); for language models, tokens generated so far."
    ),
    "reward/mean": (
        "What is optimised: the sum of the trained rewards, shaped where the recipe says so, by the weights of the step, "
        "averaged over the valid samples of the step's rollout."
    ),
    "reward/*": (
        "One trained reward as it was scored, without any shape, averaged over the samples of the step's rollout that it "
        "could score; of an ensemble as combined, or of a member."
    ),
    "shaped/*": "What a shape makes of a trained reward: what its weight multiplies, or its ensemble combines.",
    "weight/*": "Weight of a trained reward in the step: by a schedule, or a Lagrange multiplier (arXiv:2310.04373).",
    "watch/*": "A watched reward, averaged over the step's rollout; it is scored and never optimised.",
    "diversity/*": (
        "Mean distance between two samples of one prompt, over all pairs, then over the step's prompts (pixels: "
        "root mean square over thumbnails of 16 × 16; ngrams: √(1 − cos) of the texts' 3-grams)."
    ),
    "kl/*": (
        "The divergence of the trained weights from this anchor, of the kind its setting names "
        "(velocity: mean squared difference of outputs; gaussian: closed form; k2, k3: from log-"
        "ratios), averaged over the step's decisions; of an anchor in the reward or on decisions, the log-ratio of the "
        "sampling weights to it (centred: its expectation), summed over a sample and averaged over samples; of rehearsed "
        "samples, averaged over their decisions."
    ),
    "coefficient/*": "What the divergence from this anchor was multiplied by, averaged over the step's decisions.",
    "divergence/*": (
        "Mean squared difference between the outputs of the sampled model and of this one, at the states of the "
        "sampled model's own run, averaged over its steps and over samples of the evaluation prompts. Of language models: "
        "KL(sampled ‖ this one) of whole completions, in nats: the exact KL of each next token, summed over a completion's "
        "tokens and averaged over completions."
    ),
    "cost/evaluations": "Denoiser evaluations that a sample cost (guidance counts two, and so does RLG).",
    "cost/saved": "Denoiser evaluations of a sample that adaptive guidance left out (arXiv:2312.12487).",
    "rollout/mismatch": (
        "|ℓ_here − ℓ_engine| of a token: how far the engine that drew the samples and the network that is trained are apart "
        "under the same weights; averaged over a sample's tokens, then over samples."
    ),
    "rollout/correction": (
        "Truncated importance weight of a token, min(exp(ℓ_here − ℓ_engine), generation.correction), averaged over a sample's "
        "tokens, then over samples; near 1 unless much is cut off."
    ),
    "ratio/mean": "Mean over the step's decisions of ρ = exp(ℓ_θ − ℓ_old).",
    "ratio/std": "Standard deviation over the step's decisions of ρ = exp(ℓ_θ − ℓ_old).",
    "ratio/normalised": (
        "Mean over the step's decisions of the normalised ratio exp(scale · (log ρ + bias)); 1 to first order "
        "(arXiv:2510.22319)."
    ),
    "ratio/*": "A statistic over the step's decisions of ρ = exp(ℓ_θ − ℓ_old).",
    "clip/high": ("Share of decisions with a positive advantage whose ratio passed the upper clipping bound."),
    "clip/low": "Share of decisions with a negative advantage whose ratio passed the lower clipping bound.",
    "approx_kl": "Mean over the step's decisions of the k3 estimate of KL(old‖θ), ρ − 1 − log ρ.",
    "covariance/mean": (
        "Covariance of log-probability and advantage over the step's decisions: about what a step of the policy gradient "
        "takes off the entropy (arXiv:2505.22617)."
    ),
    "covariance/held": (
        "Share of decisions that were held back for their covariance: out of the gradient (clip_cov), or penalised (kl_cov)."
    ),
    "trust/kl": "Exact KL(old‖θ) of a decision, averaged over the step's decisions.",
    "trust/dropped": "Share of decisions whose loss was dropped: far from old, and leading further away.",
    "centred/error": (
        "Squared difference between centred log-ratios times β and centred rewards, averaged over the step's decisions "
        "(arXiv:2603.14128)."
    ),
    "negative/*": (
        "−ℓ of the mixture towards (plus) or away from (minus) the trained weights, averaged over the step's decisions "
        "(arXiv:2509.16117)."
    ),
    "preference/margin": (
        "By how much the best sample of a group gained more over the reference than the worst, averaged over groups."
    ),
    "preference/accuracy": (
        "Share of groups whose best sample gained more over the reference than the worst; of softmaxes over a group, the "
        "probability of the samples whose target is above average."
    ),
    "preference/kl": "KL(target‖θ) of the two softmaxes over a group, averaged over groups (arXiv:2510.18913).",
    "invalid/*": "Share of the step's samples that this reward did not score: it could not, or its failure was dropped.",
    "references/invalid/*": (
        "Share of the step's samples whose prompt has no reference sample that this reward could score, so that there is "
        "nothing to compare with."
    ),
    "samples/invalid": (
        "Share of the step's samples that a trained reward, or its shape, could not give a number; they teach nothing."
    ),
    "groups/zero_std": ("Share of the step's prompts whose samples all had the same reward, so taught nothing."),
    "updates/skipped": "Updates of the step that were left out because none of their samples could be scored.",
    "guard/fallen": (
        "Watched measures that at this evaluation were clearly below their best while the trained reward was clearly above "
        "what it was then."
    ),
    "guard/strikes": "Evaluations in a row, up to this one, at which a guarded measure had fallen.",
    "guard/best_step": "Step of the evaluation with the highest trained reward at which nothing guarded had fallen.",
    "grad_norm": "Euclidean norm of the gradient before clipping, averaged over the step's updates.",
    "loss": ("The objective plus every anchor's term, averaged over the step's decisions; its size alone says little."),
    "loss/objective": "The objective without the anchors' terms, averaged over the step's decisions.",
    "lr": "Learning rate of the step's last update.",
    "time/rollout": "Seconds of the step spent drawing samples, decoding included.",
    "time/score": "Seconds of the step spent in the rewards, trained and watched.",
    "time/update": "Seconds of the step spent in likelihoods, gradients and optimizer.",
    "time/references": (
        "Seconds of the step spent drawing and scoring the reference samples of prompts it met first, or that lacked some."
    ),
    "time/*": "Seconds of the step spent in this stage.",
    "eval/reward/mean": (
        "Sum of the trained rewards as they were scored, without any shape, by weights that do not change (where a schedule "
        "ends, a multiplier starts), averaged over samples of the evaluation prompts, which are never trained on."
    ),
    "eval/reward/*": "One trained reward, averaged over samples of the evaluation prompts.",
    "eval/invalid/*": "Share of the evaluated samples that this reward did not score; means are of the others.",
    "eval/watch/*": "A watched reward, averaged over samples of the evaluation prompts.",
    "eval/diversity/*": "As diversity, over samples of the evaluation prompts.",
    "*/stderr": "Standard error of the mean: the standard deviation over what is averaged, divided by √n.",
    "rlg weight": (
        "w in out = out_base + w·(out_tuned − out_base), of denoisers' outputs or of logits: 0 is the base model, 1 the "
        "trained one, more extrapolates (arXiv:2508.21016)."
    ),
}


def definition(key: str) -> str:
    """Return the definition of a metric, or an empty string if it has none."""
    return DEFINITIONS.get(_pattern(key), "")


def entries(keys: Iterable[str]) -> list[tuple[str, str]]:
    """Return (pattern, definition) of the metrics in `keys`, each once, in the order of DEFINITIONS."""
    used = {_pattern(key) for key in keys}
    return [(pattern, text) for pattern, text in DEFINITIONS.items() if pattern in used]


def _pattern(key: str) -> str:
    if key.endswith(STDERR):
        return f"*{STDERR}"
    return next((pattern for pattern in DEFINITIONS if fnmatchcase(key, pattern)), "")
