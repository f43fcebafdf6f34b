"""One published method = one file. `METHODS` is the list: adding a method adds one line here."""

from cmapkd.methods.base import Method, MethodCard, MethodConfig, Term
from cmapkd.methods.clip_kd import ClipKD
from cmapkd.methods.cmapkd import CMAPKD
from cmapkd.methods.contrastive import Contrastive
from cmapkd.methods.hinton import Hinton
from cmapkd.methods.stages import StageConfig

METHODS: dict[str, type[Method]] = {
    "contrastive": Contrastive,
    "hinton": Hinton,
    "clip_kd": ClipKD,
    "cmapkd": CMAPKD,
}

__all__ = ["METHODS", "Method", "MethodCard", "MethodConfig", "StageConfig", "Term"]
