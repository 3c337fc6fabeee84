"""Rewards: score images, videos and texts. Usable without the trainer: ``from rewards import make, score``."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from rewards.compat import install_torchvision_hook
from rewards.registry import Entry, Summary, available, find, list_rewards, make, register

if TYPE_CHECKING:
    from rewards.aesthetic import Aesthetic
    from rewards.base import Answer, Reward, RewardError, Scores, score
    from rewards.clip_direction import ClipDirection
    from rewards.clip_score import ClipScore
    from rewards.colors import ClipColors, Colors
    from rewards.consistency import Consistency
    from rewards.detectors import BACKGROUND, PALETTE, Detection, Detector, ShapesDetector
    from rewards.failures import Failsafe, Late
    from rewards.frames import PerFrame
    from rewards.functions import Function
    from rewards.geneval import GenEval
    from rewards.hpsv2 import HPSv2
    from rewards.image_reward import ImageReward
    from rewards.jpeg import JpegSize
    from rewards.judge import Judge, JudgeConfig, JudgeNetwork
    from rewards.math_answers import MathAnswer
    from rewards.motion import Motion
    from rewards.ocr import Ocr
    from rewards.pickscore import PickScore
    from rewards.remote import Remote
    from rewards.reward_model import RewardModel
    from rewards.sharpness import Sharpness
    from rewards.text_form import Format, Length
    from rewards.text_match import ExactMatch, RegexMatch
    from rewards.transformers_detector import TransformersDetector
    from rewards.vlm_judge import VlmJudge

install_torchvision_hook()

# Imported when first used, so that listing the rewards does not wait for torch.
_MODULES = {
    "rewards.aesthetic": "Aesthetic",
    "rewards.base": "Answer Reward RewardError Scores score",
    "rewards.clip_direction": "ClipDirection",
    "rewards.clip_score": "ClipScore",
    "rewards.colors": "ClipColors Colors",
    "rewards.consistency": "Consistency",
    "rewards.detectors": "BACKGROUND PALETTE Detection Detector ShapesDetector",
    "rewards.failures": "Failsafe Late",
    "rewards.frames": "PerFrame",
    "rewards.functions": "Function",
    "rewards.geneval": "GenEval",
    "rewards.hpsv2": "HPSv2",
    "rewards.image_reward": "ImageReward",
    "rewards.jpeg": "JpegSize",
    "rewards.judge": "Judge JudgeConfig JudgeNetwork",
    "rewards.math_answers": "MathAnswer",
    "rewards.motion": "Motion",
    "rewards.ocr": "Ocr",
    "rewards.pickscore": "PickScore",
    "rewards.remote": "Remote",
    "rewards.reward_model": "RewardModel",
    "rewards.sharpness": "Sharpness",
    "rewards.text_form": "Format Length",
    "rewards.text_match": "ExactMatch RegexMatch",
    "rewards.transformers_detector": "TransformersDetector",
    "rewards.vlm_judge": "VlmJudge",
}

__all__ = [
    "BACKGROUND",
    "PALETTE",
    "Aesthetic",
    "Answer",
    "ClipColors",
    "ClipDirection",
    "ClipScore",
    "Colors",
    "Consistency",
    "Detection",
    "Detector",
    "Entry",
    "ExactMatch",
    "Failsafe",
    "Format",
    "Function",
    "GenEval",
    "HPSv2",
    "ImageReward",
    "JpegSize",
    "Judge",
    "JudgeConfig",
    "JudgeNetwork",
    "Late",
    "Length",
    "MathAnswer",
    "Motion",
    "Ocr",
    "PerFrame",
    "PickScore",
    "RegexMatch",
    "Remote",
    "Reward",
    "RewardError",
    "RewardModel",
    "Scores",
    "ShapesDetector",
    "Sharpness",
    "Summary",
    "TransformersDetector",
    "VlmJudge",
    "available",
    "find",
    "list_rewards",
    "make",
    "register",
    "score",
]


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names.split():
            return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module 'rewards' has no attribute {name!r}; it has {', '.join(__all__)}")
