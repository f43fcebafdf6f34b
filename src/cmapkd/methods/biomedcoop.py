"""BiomedCoOp (Koleilat et al., CVPR 2025, arXiv:2411.15232): few labelled pictures tune the context of class prompts.

Two terms hold what the frozen models know of the classes: the text tower's own vectors, and the class probabilities by
those prompts of a bank that agree with the others. Without both the method is CoOp. Departures: the card below and
docs/methods/biomedcoop.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor, nn

from cmapkd.data.labels import LabelReader
from cmapkd.data.templates import ClassPrompts
from cmapkd.data.types import Batch
from cmapkd.methods.by_classes import ContextConfig, check_several, learned_context
from cmapkd.methods.card import MethodCard, MethodConfig
from cmapkd.methods.dual import PictureMethod
from cmapkd.methods.terms import Term
from cmapkd.models import DualEncoder, Features, FrozenTeacher
from cmapkd.models.prompted import PromptedEncoder
from cmapkd.models.texts import prompt_bank
from cmapkd.objectives import kl_divergence, labelled_cross_entropy, similarities
from cmapkd.objectives.prompt_bank import kept_class_vectors, kept_prompts, prompt_scores


class BiomedCoOpConfig(ContextConfig):
    """The learned context, and what it is held by."""

    context: str | int = Field(
        "a photo of a",
        description="Words that the learned vectors begin as, one for each token; or how many random ones.",
    )
    text_weight: float = Field(
        1.0, ge=0, description="Weight of the distance from the frozen class vectors (SCCM); published: 0.25 to 20."
    )
    distill_weight: float = Field(
        1.0, ge=0, description="Weight of the KL from the teacher's classes (KDSP); published: 0.25 to 20."
    )
    threshold: float = Field(
        1.5, gt=0, description="Standard deviations beyond which a prompt is left out; published: 1.25 to 2."
    )
    selection: Literal["running", "batch"] = Field(
        "running", description="Pictures by which prompts are chosen: all so far, or the batch's alone (published)."
    )


class BiomedCoOp(PictureMethod):
    """The frozen student's learned context learns labels, held by the bank of the frozen models' prompts."""

    Config: ClassVar[type[MethodConfig]] = BiomedCoOpConfig
    steady = True
    card: ClassVar[MethodCard] = MethodCard(
        title="BiomedCoOp: a context for class prompts, tuned on few labels and held by a bank of prompts",
        paper="Koleilat et al., CVPR 2025, arXiv:2411.15232; without its terms CoOp, Zhou et al., arXiv:2109.01134",
        equations=(
            "w_c: unit vector of [learned context, template of class c] by the student's text tower; Z = s v Wᵀ",
            "E_c,p: unit vectors of class c's prompts p, by the frozen teacher; e_c: of the student's, N(mean_p)",
            "score_p = mean_B max_c v_T·E_c,p; kept p: |score_p - mean| <= threshold × standard deviation",
            "Z_T = s_T v_T N(mean of kept E)ᵀ",
            "L = CE(Z, y) + text_weight mean_{c,d}(w - e)² + distill_weight 1/(B C) Σ_i KL(σ(Z_T,i) ‖ σ(Z_i))",
        ),
        needs="labels and the names of at least two classes; no captions. A text tower whose table of tokens can be "
        "reached. The published teacher is the student, frozen",
        trainable="the context alone: 4 vectors",
        departures=(
            "The bank is the evaluation's templates in place of 50 texts of each class that a language model wrote.",
            "Prompts are chosen by all pictures so far; the published choice depends on a batch of 4 "
            "(selection: batch).",
            "Median and median absolute deviation are left out: they cancel, and where the second is 0 give NaN.",
            "A teacher other than the student answers with its own picture embedding, bank and logit scale.",
            "AdamW with this toolkit's schedule in place of SGD; the cross-entropy is over labelled samples alone.",
        ),
        checked_against="the published forward pass run on random inputs: terms, gradients and kept prompts, "
        "tests/methods/fixtures/biomedcoop.json",
    )

    bank: Tensor  # the teacher's prompts
    in_bank: Tensor
    own_vectors: Tensor  # the student's, without context
    scores: Tensor
    seen: Tensor

    def __init__(
        self,
        config: BiomedCoOpConfig,
        *,
        student: DualEncoder,
        teacher: FrozenTeacher | None = None,
        classes: ClassPrompts | None = None,
    ) -> None:
        super().__init__(config, student=student, teacher=teacher)
        assert teacher is not None
        assert classes is not None
        check_several(config.name, classes)
        self.config, self.num_classes = config, len(classes.names)
        self.weights = {"labels": 1.0, "texts": config.text_weight, "classes": config.distill_weight}
        self.label_reader = LabelReader(num_classes=self.num_classes)
        student.requires_grad_(False)
        self.student: PromptedEncoder
        self.student, self.vectors = learned_context(config, student, classes)
        if config.text_weight:
            bank, mask = prompt_bank(student, classes.of_class, device=student.device)
            everything = mask.new_ones(mask.shape[1])
            self.register_buffer("own_vectors", kept_class_vectors(bank, mask, everything).to(student.device))
        if config.distill_weight:
            device = next(teacher.model.parameters()).device
            bank, mask = prompt_bank(teacher.model, classes.of_class, device=device)
            self.register_buffer("bank", bank)
            self.register_buffer("in_bank", mask)
            self.register_buffer("scores", torch.zeros(mask.shape[1]))
            self.register_buffer("seen", torch.zeros(()))

    @property
    def needs_labels(self) -> bool:
        return True

    def train(self, mode: bool = True) -> Self:
        """The frozen student stays in eval mode: nothing of it changes, and it drops nothing."""
        super().train(mode)
        self.student.model.eval()
        return self

    def shared_parameters(self) -> Mapping[str, nn.Parameter]:
        """The context: nothing else learns."""
        return {"context": self.student.context.tokens}

    def terms(self, batch: Batch) -> dict[str, Term]:
        student, vectors = self.encode_student(batch), self.vectors(self.student)
        logits = similarities(student.image.embedding, vectors, student.logit_scale)
        values: dict[str, Tensor] = {}
        if self.wants("labels"):
            values["labels"] = labelled_cross_entropy(logits, self.labels(batch))
        if self.wants("texts"):
            values["texts"] = F.mse_loss(vectors, self.own_vectors.to(vectors.dtype))
        if self.wants("classes"):
            soft = self.teacher_logits(self.encode_teacher(batch))
            values["classes"] = kl_divergence(logits, soft, temperature=1.0) / self.num_classes
        return self.weighted(values)

    def teacher_logits(self, teacher: Features) -> Float[Tensor, "batch classes"]:
        """The teacher's logits by its kept prompts."""
        kept = self._kept(teacher)
        self.measurements["kept_prompts"] = kept.sum()
        targets = kept_class_vectors(self.bank, self.in_bank, kept)
        return similarities(teacher.image.embedding, targets, teacher.logit_scale)

    def _kept(self, teacher: Features) -> Bool[Tensor, " prompts"]:
        scores = prompt_scores(teacher.image.embedding, self.bank, self.in_bank)
        if self.config.selection == "running":
            seen = self.seen + len(teacher.image.embedding)
            scores = self.scores + (scores - self.scores) * (len(teacher.image.embedding) / seen)
            if self.training:
                self.scores.copy_(scores)
                self.seen.copy_(seen)
        return kept_prompts(scores, self.config.threshold)
