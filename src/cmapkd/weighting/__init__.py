"""How much each level or term counts, for each sample. `WEIGHTINGS` lists the strategies."""

from cmapkd.weighting.attention import AttentionConfig, AttentionWeighting
from cmapkd.weighting.bandit import BanditConfig, BanditWeighting
from cmapkd.weighting.base import Weighted, Weighting, WeightingConfig
from cmapkd.weighting.bilevel import BilevelConfig, BilevelWeighting
from cmapkd.weighting.gate import GateConfig, GateWeighting, entropy_floor
from cmapkd.weighting.gradient_alignment import GradientAlignmentConfig, GradientAlignmentWeighting
from cmapkd.weighting.joint import JointConfig, JointWeighting
from cmapkd.weighting.manual import ManualConfig, ManualWeighting
from cmapkd.weighting.policy import PolicyConfig, PolicyWeighting
from cmapkd.weighting.registry import WEIGHTINGS, for_items, make_weighting, weighting_config
from cmapkd.weighting.uncertainty import UncertaintyConfig, UncertaintyWeighting
from cmapkd.weighting.uniform import UniformConfig, UniformWeighting

__all__ = [
    "WEIGHTINGS",
    "AttentionConfig",
    "AttentionWeighting",
    "BanditConfig",
    "BanditWeighting",
    "BilevelConfig",
    "BilevelWeighting",
    "GateConfig",
    "GateWeighting",
    "GradientAlignmentConfig",
    "GradientAlignmentWeighting",
    "JointConfig",
    "JointWeighting",
    "ManualConfig",
    "ManualWeighting",
    "PolicyConfig",
    "PolicyWeighting",
    "UncertaintyConfig",
    "UncertaintyWeighting",
    "UniformConfig",
    "UniformWeighting",
    "Weighted",
    "Weighting",
    "WeightingConfig",
    "entropy_floor",
    "for_items",
    "make_weighting",
    "weighting_config",
]
