"""What is done with a model's features before an objective sees them: levels, projections, bridges, banks."""

from cmapkd.features.bank import BankStore, EmbeddingBank, References, sample_keys
from cmapkd.features.bridge import AlignmentBridge
from cmapkd.features.gather import gather_features, gather_rows, mean_over_processes, own_place
from cmapkd.features.key_tokens import KeyTokens, KeyTokensBy
from cmapkd.features.matching import LevelMatcher, Matched, Places
from cmapkd.features.projector import Adapter, PairProjector
from cmapkd.features.pyramid import standardise, with_means
from cmapkd.features.ring import pass_on
from cmapkd.features.taps import LANGUAGE_LEVELS, VISUAL_LEVELS, Depths, language_taps, visual_taps
from cmapkd.features.top_tokens import StoredTokens, narrowed, pack, pack_states, top_tokens, unpack
from cmapkd.features.words import Role, WordAligner, Words

__all__ = [
    "LANGUAGE_LEVELS",
    "VISUAL_LEVELS",
    "Adapter",
    "AlignmentBridge",
    "BankStore",
    "Depths",
    "EmbeddingBank",
    "KeyTokens",
    "KeyTokensBy",
    "LevelMatcher",
    "Matched",
    "PairProjector",
    "Places",
    "References",
    "Role",
    "StoredTokens",
    "WordAligner",
    "Words",
    "gather_features",
    "gather_rows",
    "language_taps",
    "mean_over_processes",
    "narrowed",
    "own_place",
    "pack",
    "pack_states",
    "pass_on",
    "sample_keys",
    "standardise",
    "top_tokens",
    "unpack",
    "visual_taps",
    "with_means",
]
