"""DMAE (Bai et al., CVPR 2023, arXiv:2208.12256): a teacher's tokens distilled while the student paints what is hidden.

`align: embedding` is self-distillation in further pre-training (Lee et al., ICLR 2023, arXiv:2210.02871). Departures:
the card below.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from cmapkd.config import ConfigError
from cmapkd.data.types import Batch
from cmapkd.features.decoder import MaskedDecoder
from cmapkd.features.pyramid import cells_at
from cmapkd.methods.card import MethodCard, MethodConfig
from cmapkd.methods.dmae_config import DmaeConfig
from cmapkd.methods.dual import STUDENT, DualEncoderMethod, task_loss
from cmapkd.methods.image_tokens import ImageTokens
from cmapkd.methods.terms import Term
from cmapkd.methods.visible_cells import VisibleCells, features_of_visible
from cmapkd.models import DualEncoder, Features, FrozenTeacher, LevelRequest
from cmapkd.models.types import BOTH, Tower
from cmapkd.objectives import direction_distance, patches_of, reconstruction_error
from cmapkd.objectives.common import at_least_float32

ALIGNED, LAST = "aligned", "last"  # levels of a pass in which cells are left out


class DMAE(DualEncoderMethod):
    """The student computes a quarter of each picture's tokens, follows the teacher's there, and paints the rest."""

    Config: ClassVar[type[MethodConfig]] = DmaeConfig
    steady = True
    card: ClassVar[MethodCard] = MethodCard(
        title="DMAE: distillation of a layer's visible tokens beside masked reconstruction",
        paper="Bai et al., CVPR 2023, arXiv:2208.12256; align: embedding is Lee et al., ICLR 2023, arXiv:2210.02871",
        equations=(
            "V: the visible cells, drawn for each picture and step; the tower computes prefix tokens and V alone",
            "L_rec = mean over hidden cells of (decoder(f_S(V)) - pixels of mean 0 and variance 1)²",
            "L_align = mean over class token and V of Σ_d |N(f_T) - N(W f_S)|_d / sqrt(D), at 3/4 of both depths",
            "align: embedding: L_align = batch mean of |h_S(x) - h_T(x)|², h the embeddings of whole pictures",
            "L = L_contrastive + L_rec + w L_align, w = 1/32 for tokens and 1 for embeddings",
        ),
        needs="a plain ViT as student, and as teacher where it sees the visible tokens; one level of both image towers",
        trainable="the student; W and the decoder (not in the student that is saved)",
        departures=(
            "L_contrastive is added, FLIP's (arXiv:2212.00794): of the visible tokens, or for align: embedding of "
            "whole pictures. task_weight: 0 leaves it out, and the text tower with it.",
            "L_align is a sum over channels by sqrt(D). The published mean at D = 1024 is 1/32 of it.",
            "Hidden pixels are zeros before the stem, whose convolutions would else show them to their neighbours.",
            "The decoder has two thirds of the student's width and depth, and a norm of its own at its entrance in the "
            "place of the tower's last one.",
            "The teacher runs to its end, as in the released code; the paper stops it behind the aligned block.",
            "align: embedding compares projected embeddings in place of class tokens.",
        ),
        checked_against="the formulas written out in loops, and gradcheck; the published code has a non-commercial "
        "licence, or none, and was read for its formulas alone",
    )

    def __init__(self, config: DmaeConfig, *, student: DualEncoder, teacher: FrozenTeacher | None = None) -> None:
        super().__init__(config, student=student, teacher=teacher)
        assert teacher is not None
        self.config, self.not_cached = config, config.not_cached
        self.weights = {
            "contrastive": config.task_weight,
            "reconstruction": config.reconstruction_weight,
            "align": config.weight_of_align(),
        }
        self.levels = ImageTokens(config, student=student, teacher=teacher.model)
        self.cells = VisibleCells(student, hidden_share=config.mask_ratio)
        if config.align == "embedding" and student.embed_dim != teacher.embed_dim:
            raise ConfigError(
                f"method.align: embedding compares embeddings as they are, and the student's have width "
                f"{student.embed_dim} and the teacher's {teacher.embed_dim}: take an earlier student of the same sizes "
                "as teacher (teacher: runs/first)"
            )
        aligned = "align" in self.term_names and config.align == "tokens"
        of_both = aligned and config.teacher_sees == "visible"
        self.teacher_tokens = self.cells.tokens_of(teacher.model) if of_both else None
        self.decode = self._decoder() if "reconstruction" in self.term_names else None
        self.map = nn.Linear(*self.levels.widths) if aligned else None

    def _decoder(self) -> MaskedDecoder:
        config, tokens, size = self.config, self.cells.tokens, self.student.image_spec.size
        values = 3 * (size // tokens.grid[0]) * (size // tokens.grid[1])
        depth = config.decoder_depth or max(1, round(2 * len(self.student.image_blocks) / 3))
        return MaskedDecoder(tokens.width, tokens.grid, values, inner_width=config.decoder_width, depth=depth)

    @property
    def student_needs(self) -> LevelRequest:
        return replace(self.levels.student_needs, towers=BOTH if self.wants("contrastive") else ("image",))

    @property
    def teacher_needs(self) -> LevelRequest:
        reads = self.map is not None and self.teacher_tokens is None and self.wants("align")
        return replace(self.levels.teacher_needs if reads else LevelRequest(), towers=("image",))

    @property
    def compares_places(self) -> bool:
        return self.map is not None

    def terms(self, batch: Batch) -> dict[str, Term]:
        student, teacher, rows = self.encode_both(batch, self._rows)
        values = {name: row.mean() for name, row in rows.items()}
        if self.wants("contrastive"):
            values["contrastive"] = task_loss(student)
        if self.config.align == "embedding" and self.wants("align"):
            ours, theirs = (at_least_float32(features.image.embedding) for features in (student, teacher))
            values["align"] = (ours - theirs.detach()).square().sum(-1).mean()
        return self.weighted(values)

    def _encode_student(self, part: Batch, number: int = 0) -> Features:
        """Of the visible cells; for `align: embedding` of whole pictures, and `_rows` computes the visible ones."""
        if self.config.align == "embedding":
            return super()._encode_student(part, number)
        return self._visible(part, self.student_needs.towers)

    def _visible(self, part: Batch, towers: tuple[Tower, ...]) -> Features:
        inputs = part.pairs(STUDENT).to(self.device, True)
        names = [level.name for level in self.student.image_levels]
        return features_of_visible(
            self.student,
            self.cells.tokens,
            self._keep(part),
            self.student_pixels(part),
            lambda pixels: self.student(replace(inputs, images=pixels), LevelRequest(towers=towers)),
            blocks={ALIGNED: names.index(self.levels.student.name), LAST: len(names) - 1},
        )

    def _encode_teacher(self, part: Batch, role: str | None = None) -> Features:
        if self.teacher_tokens is None or self.teacher is None:
            return super()._encode_teacher(part, role)
        teacher = self.teacher
        given = part.only(teacher.reads).to(self.device, non_blocking=True)
        inputs, model = given.pairs(teacher.reads), teacher.model
        names = [level.name for level in model.image_levels]

        def ask(pixels: Tensor) -> Features:
            answers: Features = teacher(
                replace(given, inputs={teacher.reads: replace(inputs, images=pixels)}), self.teacher_needs
            )
            return answers

        pixels, blocks = model.image_spec.to_model(inputs.images), {ALIGNED: names.index(self.levels.teacher.name)}
        return features_of_visible(model, self.teacher_tokens, self._keep(part), pixels, ask, blocks=blocks)

    def _rows(self, part: Batch, student: Features, teacher: Features) -> Mapping[str, Float[Tensor, " batch"]]:
        """What each sample adds to the reconstruction and to the distance of tokens; of this process's samples."""
        keep, grid = self._keep(part), self.cells.tokens.grid
        rows: dict[str, Tensor] = {}
        if self.decode is not None and self.wants("reconstruction"):
            seen = student if self.config.align == "tokens" else self._visible(part, ("image",))
            patches = patches_of(self.student_pixels(part), grid)
            rows["reconstruction"] = reconstruction_error(
                self.decode(seen.image.levels[LAST].values, keep), patches, keep
            )
        if self.map is not None and self.wants("align"):
            ours = student.image.levels[ALIGNED]
            if self.teacher_tokens is not None:
                theirs = teacher.image.levels[ALIGNED]
                cells = theirs.values[:, theirs.num_prefix :]
            else:
                theirs = teacher.image.levels[self.levels.teacher.name]
                cells = cells_at(theirs, keep, grid)
            first = min(1, ours.num_prefix, theirs.num_prefix)  # the class token, where both have one
            compared = torch.cat([ours.values[:, :first], ours.values[:, ours.num_prefix :]], dim=1)
            rows["align"] = direction_distance(self.map(compared), torch.cat([theirs.values[:, :first], cells], dim=1))
        return rows

    def _keep(self, part: Batch) -> Int[Tensor, "batch visible"]:
        return self.cells.drawn(part, self.step).to(self.device, non_blocking=True)
