"""Image-text models behind one contract, `DualEncoder`; one adapter for each library, imported when it is needed."""

from cmapkd.models.average import MovingAverage
from cmapkd.models.base import MAX_LOGIT_SCALE, DualEncoder, Model, Tokenizer
from cmapkd.models.config import FAMILIES, ModelConfig
from cmapkd.models.images import ImageSpec
from cmapkd.models.load import build_model, build_teacher, load_model
from cmapkd.models.teacher import FrozenTeacher, MomentumTeacher, Teacher
from cmapkd.models.types import Features, Level, LevelInfo, LevelRequest, TowerFeatures

__all__ = [
    "FAMILIES",
    "MAX_LOGIT_SCALE",
    "DualEncoder",
    "Features",
    "FrozenTeacher",
    "ImageSpec",
    "Level",
    "LevelInfo",
    "LevelRequest",
    "Model",
    "ModelConfig",
    "MomentumTeacher",
    "MovingAverage",
    "Teacher",
    "Tokenizer",
    "TowerFeatures",
    "build_model",
    "build_teacher",
    "load_model",
]
