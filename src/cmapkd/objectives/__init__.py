"""Distillation losses as pure functions of tensors: no parameters, no devices, no processes, no config."""

from cmapkd.objectives.bank import bank_divergence, bank_relation_distance
from cmapkd.objectives.between import crosswise_divergence, vertical_divergence
from cmapkd.objectives.classes import check_classes, labelled_cross_entropy, non_target_divergence
from cmapkd.objectives.common import similarities
from cmapkd.objectives.contrastive import contrastive_loss, sigmoid_loss
from cmapkd.objectives.divergence import kl_divergence
from cmapkd.objectives.feature import embedding_distance, feature_distance
from cmapkd.objectives.gradient import contrastive_gradients, gradient_distance
from cmapkd.objectives.interactive import interactive_divergence, interactive_loss
from cmapkd.objectives.level import hint_distance, level_distance
from cmapkd.objectives.masked_errors import mask_overlap, masked_error
from cmapkd.objectives.pyramid_alignment import prior_coupling, pyramid_divergence
from cmapkd.objectives.rank import kendall_tau
from cmapkd.objectives.reconstruction import direction_distance, patches_of, reconstruction_error
from cmapkd.objectives.relation import layer_relation_distance, relation_distance
from cmapkd.objectives.similarity import ensemble_divergence, similarity_divergence
from cmapkd.objectives.smooth import smooth_distance
from cmapkd.objectives.sparsity import sparsity_constraint, target_sparsity
from cmapkd.objectives.taid import TaidState, next_taid
from cmapkd.objectives.token_graph import context_distance, neighbour_divergence, token_contrast
from cmapkd.objectives.tokens import TokenDivergence
from cmapkd.objectives.top_tokens import top_divergence
from cmapkd.objectives.vocabulary import TokenLosses, token_losses

__all__ = [
    "TaidState",
    "TokenDivergence",
    "TokenLosses",
    "bank_divergence",
    "bank_relation_distance",
    "check_classes",
    "context_distance",
    "contrastive_gradients",
    "contrastive_loss",
    "crosswise_divergence",
    "direction_distance",
    "embedding_distance",
    "ensemble_divergence",
    "feature_distance",
    "gradient_distance",
    "hint_distance",
    "interactive_divergence",
    "interactive_loss",
    "kendall_tau",
    "kl_divergence",
    "labelled_cross_entropy",
    "layer_relation_distance",
    "level_distance",
    "mask_overlap",
    "masked_error",
    "neighbour_divergence",
    "next_taid",
    "non_target_divergence",
    "patches_of",
    "prior_coupling",
    "pyramid_divergence",
    "reconstruction_error",
    "relation_distance",
    "sigmoid_loss",
    "similarities",
    "similarity_divergence",
    "smooth_distance",
    "sparsity_constraint",
    "target_sparsity",
    "token_contrast",
    "token_losses",
    "top_divergence",
    "vertical_divergence",
]
