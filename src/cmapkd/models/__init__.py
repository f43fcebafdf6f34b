"""Models behind contracts: `DualEncoder` embeds pictures and texts, `GenerativeModel` writes answers, `Classifier`
names classes.

One adapter for each library, imported when it is needed.
"""

from cmapkd.models.average import MovingAverage
from cmapkd.models.base import MAX_LOGIT_SCALE, DualEncoder, ImageEncoder, Model, Tokenizer
from cmapkd.models.classifier import Classifier
from cmapkd.models.config import FAMILIES, ModelConfig
from cmapkd.models.contracts import dual, writing
from cmapkd.models.generative import ChatProcessor, Decoding, GenerativeModel
from cmapkd.models.images import ImageSpec
from cmapkd.models.load import build_model, build_teacher, load_model
from cmapkd.models.teacher import FrozenTeacher, MomentumTeacher, Teacher
from cmapkd.models.token_types import LogitHead, Rows, Seen, TokenFeatures, TokenNeeds, TopTokens, Vocabulary
from cmapkd.models.types import Features, Level, LevelInfo, LevelRequest, TowerFeatures

__all__ = [
    "FAMILIES",
    "MAX_LOGIT_SCALE",
    "ChatProcessor",
    "Classifier",
    "Decoding",
    "DualEncoder",
    "Features",
    "FrozenTeacher",
    "GenerativeModel",
    "ImageEncoder",
    "ImageSpec",
    "Level",
    "LevelInfo",
    "LevelRequest",
    "LogitHead",
    "Model",
    "ModelConfig",
    "MomentumTeacher",
    "MovingAverage",
    "Rows",
    "Seen",
    "Teacher",
    "TokenFeatures",
    "TokenNeeds",
    "Tokenizer",
    "TopTokens",
    "TowerFeatures",
    "Vocabulary",
    "build_model",
    "build_teacher",
    "dual",
    "load_model",
    "writing",
]
