"""One published method = one file. `METHODS` is the list: adding a method adds one line here."""

from cmapkd.methods.base import Method, MethodCard, MethodConfig, Term, TermsBeside
from cmapkd.methods.clip_kd import ClipKD
from cmapkd.methods.cmapkd import CMAPKD
from cmapkd.methods.contrastive import Contrastive
from cmapkd.methods.fitnet import FitNet
from cmapkd.methods.hinton import Hinton
from cmapkd.methods.stages import StageConfig
from cmapkd.models import DualEncoder, FrozenTeacher

METHODS: dict[str, type[Method]] = {
    "contrastive": Contrastive,
    "hinton": Hinton,
    "fitnet": FitNet,
    "clip_kd": ClipKD,
    "cmapkd": CMAPKD,
}


def build_method(
    config: MethodConfig, *, student: DualEncoder, teacher: FrozenTeacher | None, beside: TermsBeside | None = None
) -> Method:
    """The method that `config` names; a teacher it does not use is left out.

    Args:
        beside: terms that the run adds to the method's own.

    Raises:
        ConfigError: a setting does not fit the method's terms or levels.
        ValueError: the method needs a teacher and there is none, or the models lack what it reads.
    """
    kind = METHODS[config.name]
    method = kind(config, student=student, teacher=teacher if kind.uses_teacher else None)
    method.beside = beside
    if config.term_weighting is not None:
        method.weigh_terms(config.term_weighting)
    return method


__all__ = ["METHODS", "Method", "MethodCard", "MethodConfig", "StageConfig", "Term", "TermsBeside", "build_method"]
