"""Rewards: score images and texts. Usable without the trainer: ``from rewards import make, score``."""

from __future__ import annotations

from rewards.aesthetic import Aesthetic
from rewards.base import Answer, Reward, RewardError, Scores, score
from rewards.clip_score import ClipScore
from rewards.colors import ClipColors, Colors
from rewards.detectors import BACKGROUND, PALETTE, Detection, Detector, ShapesDetector
from rewards.failures import Failsafe, Late
from rewards.functions import Function
from rewards.geneval import GenEval
from rewards.hpsv2 import HPSv2
from rewards.image_reward import ImageReward
from rewards.jpeg import JpegSize
from rewards.judge import Judge, JudgeConfig, JudgeNetwork
from rewards.math_answers import MathAnswer
from rewards.ocr import Ocr
from rewards.pickscore import PickScore
from rewards.registry import Entry, available, find, make, register
from rewards.remote import Remote
from rewards.reward_model import RewardModel
from rewards.text_form import Format, Length
from rewards.text_match import ExactMatch, RegexMatch
from rewards.transformers_detector import TransformersDetector
from rewards.vlm_judge import VlmJudge

__all__ = [
    "BACKGROUND",
    "PALETTE",
    "Aesthetic",
    "Answer",
    "ClipColors",
    "ClipScore",
    "Colors",
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
    "Ocr",
    "PickScore",
    "RegexMatch",
    "Remote",
    "Reward",
    "RewardError",
    "RewardModel",
    "Scores",
    "ShapesDetector",
    "TransformersDetector",
    "VlmJudge",
    "available",
    "find",
    "make",
    "register",
    "score",
]
