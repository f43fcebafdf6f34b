"""Distillation losses as pure functions of tensors: no parameters, no devices, no processes, no config."""

from cmapkd.objectives.bank import bank_divergence, bank_relation_distance
from cmapkd.objectives.contrastive import contrastive_loss, sigmoid_loss
from cmapkd.objectives.divergence import kl_divergence
from cmapkd.objectives.feature import embedding_distance, feature_distance
from cmapkd.objectives.gradient import contrastive_gradients, gradient_distance
from cmapkd.objectives.interactive import interactive_divergence, interactive_loss
from cmapkd.objectives.level import hint_distance, level_distance
from cmapkd.objectives.pyramid_alignment import prior_coupling, pyramid_divergence
from cmapkd.objectives.relation import layer_relation_distance, relation_distance
from cmapkd.objectives.similarity import similarity_divergence

__all__ = [
    "bank_divergence",
    "bank_relation_distance",
    "contrastive_gradients",
    "contrastive_loss",
    "embedding_distance",
    "feature_distance",
    "gradient_distance",
    "hint_distance",
    "interactive_divergence",
    "interactive_loss",
    "kl_divergence",
    "layer_relation_distance",
    "level_distance",
    "prior_coupling",
    "pyramid_divergence",
    "relation_distance",
    "sigmoid_loss",
    "similarity_divergence",
]
