"""One published method = one file. `METHODS` is the list: adding a method adds one line here, or an entry point."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from cmapkd.config import ConfigError, Registry
from cmapkd.data.templates import ClassPrompts
from cmapkd.methods.acam_kd import AcamKD
from cmapkd.methods.albef import Albef
from cmapkd.methods.align_kd import AlignKD
from cmapkd.methods.base import Method
from cmapkd.methods.biomedcoop import BiomedCoOp
from cmapkd.methods.c2kd import C2KD
from cmapkd.methods.card import MethodCard, MethodConfig
from cmapkd.methods.clip_cid import ClipCid
from cmapkd.methods.clip_kd import ClipKD
from cmapkd.methods.clip_ping import ClipPing
from cmapkd.methods.clip_rd import ClipRD
from cmapkd.methods.clip_refine import ClipRefine
from cmapkd.methods.cmapkd import CMAPKD
from cmapkd.methods.contrastive import Contrastive
from cmapkd.methods.cosmos import Cosmos
from cmapkd.methods.dc_clip import DCClip
from cmapkd.methods.dclip import Dclip
from cmapkd.methods.degla import Degla
from cmapkd.methods.dho import DHO
from cmapkd.methods.dmae import DMAE
from cmapkd.methods.dual import LABELS, DualEncoderMethod, task_loss
from cmapkd.methods.fitnet import FitNet
from cmapkd.methods.hinton import Hinton
from cmapkd.methods.lelp import Lelp
from cmapkd.methods.linearize import Linearize
from cmapkd.methods.llava_kd import LlavaKD
from cmapkd.methods.llava_mod import LLaVAMoD
from cmapkd.methods.makd import Makd
from cmapkd.methods.masking_kd import MaskingKD
from cmapkd.methods.masters import Masters
from cmapkd.methods.mobileclip import MobileCLIP
from cmapkd.methods.move_kd import MoveKD
from cmapkd.methods.mst_distill import MstDistill
from cmapkd.methods.mulki import Mulki
from cmapkd.methods.ola_vlm import OlaVLM
from cmapkd.methods.promptkd import PromptKD
from cmapkd.methods.radio import Radio
from cmapkd.methods.sft import SFT
from cmapkd.methods.sgva_clip import SgvaClip
from cmapkd.methods.specvlm import SpecVLM
from cmapkd.methods.stages import StageConfig
from cmapkd.methods.step import StepInfo
from cmapkd.methods.supervised import Supervised
from cmapkd.methods.switch_kd import SwitchKD
from cmapkd.methods.taid import TAID
from cmapkd.methods.terms import AuxiliaryTerms, Term
from cmapkd.methods.tinyclip import TinyCLIP
from cmapkd.methods.tipsv2 import TIPSv2
from cmapkd.methods.token_kd import TokenKD
from cmapkd.methods.trg_token_graph import TokenGraph
from cmapkd.methods.unpaired import Unpaired, UnpairedPictures
from cmapkd.methods.vidlankd import VidLanKD
from cmapkd.methods.vl2lite import VL2Lite
from cmapkd.methods.vl2v_adip import VL2VADiP
from cmapkd.methods.vlm_distill_ood import VlmDistillOod
from cmapkd.methods.zscl import ZSCL
from cmapkd.models import Classifier, DualEncoder, FrozenTeacher, Model
from cmapkd.models.generative import GenerativeModel
from cmapkd.models.types import BOTH

_OWN: dict[str, type[Method]] = {
    "contrastive": Contrastive,
    "albef": Albef,
    "hinton": Hinton,
    "supervised": Supervised,
    "dho": DHO,
    "vl2lite": VL2Lite,
    "makd": Makd,
    "mst_distill": MstDistill,
    "promptkd": PromptKD,
    "biomedcoop": BiomedCoOp,
    "sgva_clip": SgvaClip,
    "lelp": Lelp,
    "c2kd": C2KD,
    "dc_clip": DCClip,
    "fitnet": FitNet,
    "acam_kd": AcamKD,
    "dmae": DMAE,
    "clip_kd": ClipKD,
    "clip_rd": ClipRD,
    "clip_refine": ClipRefine,
    "clip_ping": ClipPing,
    "clip_cid": ClipCid,
    "cmapkd": CMAPKD,
    "mobileclip": MobileCLIP,
    "degla": Degla,
    "cosmos": Cosmos,
    "dclip": Dclip,
    "radio": Radio,
    "tinyclip": TinyCLIP,
    "vlm_distill_ood": VlmDistillOod,
    "vl2v_adip": VL2VADiP,
    "trg_token_graph": TokenGraph,
    "tipsv2": TIPSv2,
    "sft": SFT,
    "zscl": ZSCL,
    "mulki": Mulki,
    "token_kd": TokenKD,
    "taid": TAID,
    "llava_mod": LLaVAMoD,
    "switch_kd": SwitchKD,
    "llava_kd": LlavaKD,
    "align_kd": AlignKD,
    "ola_vlm": OlaVLM,
    "move_kd": MoveKD,
    "masking_kd": MaskingKD,
    "masters": Masters,
    "vidlankd": VidLanKD,
    "specvlm": SpecVLM,
    "linearize": Linearize,
}

METHODS: Registry[type[Method]] = Registry("cmapkd.methods", _OWN, base=Method)
"""Every method by name: cmapkd's own, and those of installed packages."""


def build_method(
    config: MethodConfig,
    *,
    student: Model,
    teacher: FrozenTeacher | None,
    more_teachers: Sequence[FrozenTeacher] = (),
    auxiliary: Callable[[Any], AuxiliaryTerms | None] | None = None,
    classes: ClassPrompts | None = None,
    unpaired: UnpairedPictures | None = None,
) -> Method:
    """The method that `config` names; teachers it does not use are left out.

    Args:
        more_teachers: besides the first, each with a role of its own.
        auxiliary: makes the terms that the run adds to the method's own, for the student as the method trains it.
        classes: of the training source; read where `config.reads_classes`, and left out elsewhere.
        unpaired: the streams of pictures without captions, where the data have any.

    Raises:
        ConfigError: a setting does not fit the method's terms or levels, or it takes one teacher only.
        ValueError: the method needs a teacher and there is none, or the models lack what it reads.
    """
    kind = METHODS[config.name]
    _check_contract(config.name, kind, student, "student", kind.reads)
    if teacher is not None and kind.uses_teacher:
        _check_contract(config.name, kind, teacher.model, "teacher", kind.learns_from or kind.reads)
    options: dict[str, Any] = {"classes": classes} if config.reads_classes else {}
    if more_teachers and kind.uses_teacher:
        check_teachers(config.name, [further.role for further in more_teachers])
        for further in more_teachers:
            _check_contract(config.name, kind, further.model, f"teacher {further.role}", kind.learns_from or kind.reads)
        options["more_teachers"] = more_teachers
    method = kind(config, student=student, teacher=teacher if kind.uses_teacher else None, **options)
    method.auxiliary = auxiliary(method.student) if auxiliary is not None else None
    if config.several_positives:
        if not isinstance(method, DualEncoderMethod):
            raise ConfigError(f"method {config.name} compares no pictures with texts: leave several_positives out")
        if config.name in _OWN and set(method.term_names).isdisjoint(method.contrasts):
            raise ConfigError(
                f"method {config.name}, as it is set, has no loss that reads several_positives (its terms: "
                f"{', '.join(method.term_names)}): leave it out, or give a contrastive loss a weight"
            )
        method.several_positives = True
    if unpaired is not None:
        if not isinstance(method, DualEncoderMethod) or not isinstance(student, DualEncoder):
            raise ConfigError(
                f"the student of method {config.name} embeds no pictures, so it learns nothing from those without "
                f"captions: leave {_streams(unpaired)} out"
            )
        if method.text_pools:
            raise ConfigError(
                f"method {config.name}, as it is set, reads further texts of every picture "
                f"({', '.join(method.text_pools)}), and those of {_streams(unpaired)} have none: leave it out"
            )
        method.unpaired = Unpaired(unpaired, method)
    if config.term_weighting is not None:
        method.weigh_terms(config.term_weighting)
    return method


def _streams(unpaired: UnpairedPictures) -> str:
    return f"data.more.{unpaired.streams[0]}"


def _check_contract(name: str, kind: type[Method], model: Model, role: str, reads: type[Model]) -> None:
    """Refuses a model of another kind than the method is for.

    Raises:
        ConfigError: names methods that are for such a model.
    """
    if not isinstance(model, reads):
        said = f"method {name} needs a {role} that {reads.does}, and {model.name} {model.does}. "
        if role == "student" and kind.reads is Classifier and isinstance(model, DualEncoder):
            raise ConfigError(f"{said}Name its image tower alone: student: classifier:{model.name}, see docs/models.md")
        able = ", ".join(other for other, each in METHODS.items() if isinstance(model, each.reads))
        raise ConfigError(f"{said}Methods for such models: {able or 'none'}")
    if isinstance(model, DualEncoder) and model.towers != BOTH:
        _check_pictures_alone(name, kind, model, role)


def _check_pictures_alone(name: str, kind: type[Method], model: DualEncoder, role: str) -> None:
    """Refuses a model without a text tower where texts of it are read.

    Raises:
        ConfigError: it is the student or the first teacher, or the method reads texts of every teacher.
    """
    if issubclass(kind.reads, GenerativeModel) and kind.pictures_alone:
        return
    if role in ("student", "teacher"):
        raise ConfigError(
            f"the {role} {model.name} has no text tower: such a model can only be a further teacher, in more_teachers"
        )
    if not kind.pictures_alone:
        able = ", ".join(other for other, each in METHODS.items() if each.pictures_alone)
        raise ConfigError(
            f"method {name} reads texts of every teacher, and {role}, {model.name}, has no text tower: leave it out, "
            f"or use a method that reads its pictures alone ({able or 'none'})"
        )


def check_teachers(name: str, more: Iterable[str]) -> None:
    """Refuses further teachers where a method takes one.

    Raises:
        ConfigError: names them, and the methods that take several.
    """
    further = ", ".join(more)
    if further and not METHODS[name].several_teachers:
        able = ", ".join(other for other, kind in METHODS.items() if kind.several_teachers)
        raise ConfigError(
            f"method {name} learns from one teacher, and more_teachers names {further} besides: leave them out, or use "
            f"a method that takes several ({able})"
        )


__all__ = [
    "LABELS",
    "METHODS",
    "AuxiliaryTerms",
    "DualEncoderMethod",
    "Method",
    "MethodCard",
    "MethodConfig",
    "StageConfig",
    "StepInfo",
    "Term",
    "build_method",
    "check_teachers",
    "task_loss",
]
