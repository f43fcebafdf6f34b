"""Distillation losses as pure functions of tensors: no parameters, no devices, no processes, no config."""

from cmapkd.objectives.contrastive import contrastive_loss, sigmoid_loss
from cmapkd.objectives.divergence import kl_divergence
from cmapkd.objectives.feature import feature_distance
from cmapkd.objectives.interactive import interactive_loss
from cmapkd.objectives.similarity import similarity_divergence

__all__ = [
    "contrastive_loss",
    "feature_distance",
    "interactive_loss",
    "kl_divergence",
    "sigmoid_loss",
    "similarity_divergence",
]
