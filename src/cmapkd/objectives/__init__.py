"""Distillation losses as pure functions of tensors: no parameters, no devices, no processes, no config."""

from cmapkd.objectives.angle import angular_dispersion, squared_angle
from cmapkd.objectives.answers import answer_cross_entropy, answers_among
from cmapkd.objectives.attention_maps import attention_error, focused_distance
from cmapkd.objectives.bank import bank_divergence, bank_relation_distance
from cmapkd.objectives.between import crosswise_divergence, vertical_divergence
from cmapkd.objectives.classes import (
    agreeing,
    check_classes,
    labelled_cross_entropy,
    nearest_divergence,
    non_target_divergence,
    own_text_cross_entropy,
)
from cmapkd.objectives.common import similarities
from cmapkd.objectives.contrastive import contrast_of_views, contrastive_loss, sigmoid_loss
from cmapkd.objectives.divergence import kl_divergence
from cmapkd.objectives.experts import balance_divergence, mutual_divergence, routed_divergence
from cmapkd.objectives.feature import (
    absolute_distance,
    embedding_distance,
    feature_distance,
    labelled_distance,
    log_distance,
)
from cmapkd.objectives.gradient import contrastive_gradients, gradient_distance
from cmapkd.objectives.interactive import interactive_divergence, interactive_loss
from cmapkd.objectives.level import hint_distance, level_distance
from cmapkd.objectives.masked_errors import mask_overlap, masked_error
from cmapkd.objectives.own_negatives import contrast_with_negatives, own_negatives_loss
from cmapkd.objectives.pyramid_alignment import prior_coupling, pyramid_divergence
from cmapkd.objectives.rank import kendall_tau
from cmapkd.objectives.reconstruction import direction_distance, patches_of, reconstruction_error
from cmapkd.objectives.refine import hybrid_divergence, reference_distance
from cmapkd.objectives.relation import layer_relation_distance, relation_distance, token_relation_distance
from cmapkd.objectives.retention import reference_divergences
from cmapkd.objectives.similarity import ensemble_divergence, similarity_divergence
from cmapkd.objectives.smooth import smooth_distance
from cmapkd.objectives.soft_contrast import SoftContrast, soft_contrast
from cmapkd.objectives.sparsity import sparsity_constraint, target_sparsity
from cmapkd.objectives.taid import TaidState, next_taid
from cmapkd.objectives.token_graph import context_distance, neighbour_divergence, token_contrast
from cmapkd.objectives.tokens import TokenDivergence
from cmapkd.objectives.top_tokens import top_divergence
from cmapkd.objectives.vocabulary import TokenLosses, token_losses

__all__ = [
    "SoftContrast",
    "TaidState",
    "TokenDivergence",
    "TokenLosses",
    "absolute_distance",
    "agreeing",
    "angular_dispersion",
    "answer_cross_entropy",
    "answers_among",
    "attention_error",
    "balance_divergence",
    "bank_divergence",
    "bank_relation_distance",
    "check_classes",
    "context_distance",
    "contrast_of_views",
    "contrast_with_negatives",
    "contrastive_gradients",
    "contrastive_loss",
    "crosswise_divergence",
    "direction_distance",
    "embedding_distance",
    "ensemble_divergence",
    "feature_distance",
    "focused_distance",
    "gradient_distance",
    "hint_distance",
    "hybrid_divergence",
    "interactive_divergence",
    "interactive_loss",
    "kendall_tau",
    "kl_divergence",
    "labelled_cross_entropy",
    "labelled_distance",
    "layer_relation_distance",
    "level_distance",
    "log_distance",
    "mask_overlap",
    "masked_error",
    "mutual_divergence",
    "nearest_divergence",
    "neighbour_divergence",
    "next_taid",
    "non_target_divergence",
    "own_negatives_loss",
    "own_text_cross_entropy",
    "patches_of",
    "prior_coupling",
    "pyramid_divergence",
    "reconstruction_error",
    "reference_distance",
    "reference_divergences",
    "relation_distance",
    "routed_divergence",
    "sigmoid_loss",
    "similarities",
    "similarity_divergence",
    "smooth_distance",
    "soft_contrast",
    "sparsity_constraint",
    "squared_angle",
    "target_sparsity",
    "token_contrast",
    "token_losses",
    "token_relation_distance",
    "top_divergence",
    "vertical_divergence",
]
