"""Methods over image-text models: how student and teachers are encoded, in micro-batches and over all processes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import ClassVar, Literal, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from cmapkd.config import ConfigError
from cmapkd.data.batches import Extra
from cmapkd.data.labels import LabelReader
from cmapkd.data.masks import hidden_squares, hide
from cmapkd.data.pictures import PictureReader
from cmapkd.data.streams import MAIN_STREAM
from cmapkd.data.types import Batch
from cmapkd.features import KeyTokens, gather_features, gather_rows
from cmapkd.methods.micro_batches import (
    encode_checkpointed,
    join_features,
    join_rows,
    map_rows,
    micro_batches,
    with_levels_on,
    without_levels,
)
from cmapkd.methods.stages import StageConfig
from cmapkd.methods.unpaired import UnpairedMethod
from cmapkd.models import DualEncoder, Features, LevelRequest, MomentumTeacher, Teacher, TowerFeatures
from cmapkd.models.adapted import check_kept_pictures
from cmapkd.models.reach import example_output, last_matrix_behind
from cmapkd.models.types import Tower
from cmapkd.objectives import contrastive_loss, sigmoid_loss

TeacherDetail = Literal["global", "pooled", "key_tokens", "dense"]
"""How finely a teacher is read: its embeddings; also one vector for each level; also a few key tokens of each; also
levels place by place. Each can be had from those after it."""

LABELS = "labels"
"""Under which a batch brings its samples' labels, see `DualEncoderMethod.label_reader`."""

PICTURES = "pictures"
"""Under which a batch brings a number for each picture, see `data.pictures.PictureReader`."""

STUDENT = "student"
"""The role of the student in a batch."""

PICTURES_ALONE = LevelRequest(towers=("image",))

_TOWERS: tuple[Tower, Tower] = ("image", "text")
Rows = TypeVar("Rows")


class DualEncoderMethod(UnpairedMethod):
    """A method whose student and teachers are `DualEncoder`s."""

    student: DualEncoder
    encodes_student: bool = True
    """Whether steps give the student's image tower pictures, or stored answers of it."""
    several_positives: bool = False
    """Whether captions of one picture in a batch are no negatives of each other."""
    contrasts: ClassVar[tuple[str, ...]] = ("contrastive",)
    """Names of the terms that contrast pairs, and so read which pairs are of one picture."""
    label_reader: LabelReader | None = None
    """How batches bring their samples' labels; None: the terms read none."""
    stored_student: Teacher | None = None
    """Answers for the student's towers that do not learn, from a cache, in batches that bring stored rows of them."""
    stored_towers: tuple[Tower, ...] = ()
    """Which towers these are."""
    stored_levels: LevelRequest = LevelRequest()
    """What the student reads of these answers beside pooled features."""
    _last_shared_layers: tuple[tuple[LevelRequest, frozenset[str]], tuple[str, ...]] | None = None
    """Names, and the needs and learning weights that they were found for."""

    @property
    def student_needs(self) -> LevelRequest:
        """Levels of the student that the terms read."""
        return LevelRequest()

    @property
    def compared_levels(self) -> LevelRequest:
        """Those of `student_needs` that the student alone can bring nearer to a target; not those that maps read."""
        return self.student_needs

    @property
    def teacher_needs(self) -> LevelRequest:
        """Levels of the first teacher that the terms read; it computes and a cache stores no others."""
        return LevelRequest()

    @property
    def teacher_detail(self) -> TeacherDetail:
        """How finely the terms read the teacher, which is what a cache must hold."""
        needs = self.teacher_needs
        return "dense" if needs.image_levels or needs.text_levels else "global"

    @property
    def compares_places(self) -> bool:
        """Whether the terms compare student and teacher place by place, so that both must see the same view."""
        return bool(self.teacher_needs.image_levels) and self.teacher_detail != "pooled"

    @property
    def key_tokens(self) -> KeyTokens | None:
        """Which tokens the terms read where the detail is `key_tokens`."""
        return None

    @property
    def matches_words(self) -> bool:
        """Whether the terms match tokens of both models' texts, as `features.WordAligner` does, in any stage."""
        return False

    @property
    def needs_spans(self) -> bool:
        """Whether batches must say where tokens stand in their texts: to match those of tokenizers that differ."""
        read = (teacher for teacher in self.teachers.values() if teacher.reads == teacher.role)
        return self.matches_words and any(teacher.model.tokenizer != self.student.tokenizer for teacher in read)

    def labels(self, batch: Batch) -> Int[Tensor, " batch"]:
        """The labels of all processes' samples, -1 where there is none; for a method with a `label_reader`."""
        labels: Tensor = batch.extra[LABELS]
        return gather_rows(labels.to(self.device, non_blocking=True))

    def of_stream(self, batch: Batch, name: str) -> Bool[Tensor, " batch"]:
        """Which of all processes' samples are of a stream of `data.more`, or of `train`.

        Raises:
            ConfigError: the batches are of one stream alone.
        """
        streams = batch.streams or (MAIN_STREAM,) * len(batch)
        if not batch.streams and name != MAIN_STREAM:
            raise ConfigError(
                f"the method's terms read stream {name!r}, and these batches are of one stream: name it in data.more, "
                "or set the method to read train"
            )
        own = torch.tensor([float(each == name) for each in streams])
        return gather_rows(own.to(self.device, non_blocking=True)) > 0.5

    def encode_student(self, batch: Batch) -> Features:
        """The student's features; embeddings are those of the whole batch, over all processes."""
        return self.gathered(batch, self.encode_own(batch))

    def encode_own(self, batch: Batch) -> Features:
        """The student's features of this process's samples alone."""
        parts = micro_batches(batch, self.micro_batch)
        return join_features(encode_checkpointed(self._encode_student, parts, model=self))

    def gathered(self, batch: Batch, own: Features) -> Features:
        """What `encode_student` gives, from what `encode_own` gave."""
        return replace(gather_features(own), pictures=self._pictures(batch))

    def encode_teacher(self, batch: Batch) -> Features:
        """The teacher's features, likewise, without gradient."""
        parts = micro_batches(batch, self.micro_batch)
        return gather_features(join_features([self._encode_teacher(part) for part in parts]))

    def encode_teachers(self, batch: Batch, roles: Collection[str] | None = None) -> dict[str, Features]:
        """Embeddings by role of the teachers that are named, or of all, likewise; the first teacher's levels, too.

        Embeddings have width 0 where nobody reads a tower, and of a further teacher without a text tower.
        """
        parts = micro_batches(batch, self.micro_batch)
        return {
            role: gather_features(join_features([self._encode_teacher(part, role) for part in parts]))
            for role in self.teachers
            if roles is None or role in roles
        }

    def encode_hidden_images(self, batch: Batch, *, patch: int, ratio: float) -> Float[Tensor, "batch dim"]:
        """The student's embeddings of its pictures with some squares hidden, see `hidden_in`, over all processes."""

        def encode(part: Batch, _number: int) -> Float[Tensor, "batch dim"]:
            squares = self.hidden_in(part, patch=patch, ratio=ratio)  # the same if the backward pass repeats it
            tower: TowerFeatures = self.student.encode_image(hide(self.student_pixels(part), squares, patch=patch))
            return tower.embedding

        parts = micro_batches(batch, self.micro_batch)
        return gather_rows(torch.cat(encode_checkpointed(encode, parts, model=self)))

    def hidden_in(self, part: Batch, *, patch: int, ratio: float) -> Bool[Tensor, "batch rows columns"]:
        """Squares of the student's pictures to hide: others for each sample and view, however a batch is shared out.

        Args:
            patch: side of a square in pixels.
            ratio: share of the squares that is hidden.
        Returns:
            On the CPU, see `data.masks.hide`.
        """
        size = self.student.image_spec.size
        return hidden_squares(part.ids, view=part.view_of_each, image_size=size, patch=patch, ratio=ratio)

    def student_pixels(self, part: Batch) -> Float[Tensor, "batch 3 height width"]:
        """The pictures of a part of the batch as the student's image tower reads them: normalised, on its device."""
        return self.student.image_spec.to_model(part.pairs(STUDENT).images.to(self.device, non_blocking=True))

    def encode_both(
        self, batch: Batch, read: Callable[[Batch, Features, Features], Rows]
    ) -> tuple[Features, Features, Rows]:
        """Student's and teacher's embeddings, and what the terms need of their levels; of all processes' samples.

        With micro-batches no level of the student outlives its micro-batch. The teacher's levels wait on the host of a
        GPU, where they take none of its memory. On a CPU, and from a cache, the backward pass asks the teacher again.

        Args:
            read: of a part of the batch and both models' features of it, tensors with one row for each sample, none of
                which depends on another sample: a tensor, or a mapping or a dataclass of such trees.
        """
        parts = micro_batches(batch, self.micro_batch)
        answers: list[Features] = []
        if len(parts) > 1 and self._keeps_answers:
            answers = [with_levels_on(self._encode_teacher(part), "cpu") for part in parts]

        def encode(part: Batch, number: int) -> tuple[Features, Features, Rows]:
            teacher = with_levels_on(answers[number], self.device) if answers else self._encode_teacher(part)
            student = self._encode_student(part)
            return without_levels(student), without_levels(teacher), read(part, student, teacher)

        encoded = encode_checkpointed(encode, parts, model=self)
        student = gather_features(join_features([features for features, _, _ in encoded]))
        student = replace(student, pictures=self._pictures(batch))
        teacher = gather_features(join_features([features for _, features, _ in encoded]))
        rows = join_rows([rows for _, _, rows in encoded])
        return student, teacher, map_rows(gather_rows, rows)

    def shared_parameters(self) -> Mapping[str, nn.Parameter]:
        """One layer of each tower that the terms read and that learns, by name: the last one below what they read.

        This is the last layer below the tower's embedding, or below the first of its levels that the terms read. None
        where nothing of the student learns, as in stages that train modules alone.
        """
        needs, parameters = self.student_needs, dict(self.student.named_parameters())
        found_for = needs, frozenset(name for name, parameter in parameters.items() if parameter.requires_grad)
        if not found_for[1]:
            return {}
        if self._last_shared_layers is None or self._last_shared_layers[0] != found_for:
            self._last_shared_layers = found_for, self._find_shared_layers(needs)
        return {name: parameters[name] for name in self._last_shared_layers[1]}

    def _find_shared_layers(self, needs: LevelRequest) -> tuple[str, ...]:
        """Raises ValueError where no tower that the terms read learns; a tower without learning weights has none."""
        found: dict[str, None] = {}
        for number, tower in enumerate(needs.towers, 1):
            try:
                output = partial(example_output, self.student, tower, self._first(tower, needs))
                found[last_matrix_behind(self.student, output, learning=True)] = None
            except ValueError:
                if number == len(needs.towers) and not found:
                    raise
        return tuple(found)

    def train_only(self, parts: Sequence[str]) -> None:
        """Also refuses to freeze a tower whose inner levels the terms compare: such a term would train nothing."""
        self.student.learn_only(parts)
        super().train_only(parts)
        learning = {name for name, parameter in self.student.named_parameters() if parameter.requires_grad}
        for tower, levels, inside in self._compared_inside():
            if not inside & learning:
                raise ConfigError(
                    f"training.train_parts freezes the {tower} tower of {self.student.name}, but this method, as it is "
                    f"set, compares its levels {', '.join(levels)}, which only a tower that learns can change: add "
                    f"{tower} to train_parts, or give these levels a weight of zero"
                )

    def check_stages(self, stages: Sequence[StageConfig]) -> None:
        """Also refuses stages none of which trains a tower whose inner levels the terms compare."""
        super().check_stages(stages)
        learning = {
            name for stage in stages for name in self.learning_in(stage) if self.get_parameter(name).requires_grad
        }
        for tower, levels, inside in self._compared_inside():
            if stages and not {f"student.{name}" for name in inside} & learning:
                raise ConfigError(
                    f"no stage trains the {tower} tower of {self.student.name}, but this method, as it is set, "
                    f"compares its levels {', '.join(levels)}, which only a tower that learns can change: add {tower} "
                    "to a stage's train, or give these levels a weight of zero"
                )

    def _compared_inside(self) -> Iterator[tuple[Tower, tuple[str, ...], frozenset[str]]]:
        """Each tower whose inner levels the terms compare, these levels, and the parameters inside it."""
        needs, known = self.compared_levels, self.student.parts
        for tower, levels in zip(_TOWERS, (needs.image_levels, needs.text_levels), strict=True):
            others = ("projections", "scale", *(other for other in _TOWERS if other != tower))
            if levels:
                yield tower, levels, frozenset().union(*(names for part, names in known.items() if part not in others))

    def check_learning(self) -> None:
        """Refuses inner levels that nothing which learns stands behind, and class pictures of a tower that learns."""
        super().check_learning()
        check_kept_pictures(self.student)
        needs, frozen = self.compared_levels, self.student.frozen_levels
        for tower, asked, still in (
            ("image", needs.image_levels, frozen.image_levels),
            ("text", needs.text_levels, frozen.text_levels),
        ):
            if levels := [name for name in asked if name in still]:
                raise ConfigError(
                    f"options.{tower} of {self.student.name} freezes {', '.join(levels)}, which this method, as it is "
                    "set, compares, and only blocks that learn can change: freeze fewer blocks, or give these levels a "
                    "weight of zero"
                )

    def let_all_learn(self) -> None:
        super().let_all_learn()
        self._last_shared_layers = None

    def _first(self, tower: Tower, needs: LevelRequest) -> str | None:
        """The shallowest level of those needed."""
        known, needed = (
            (self.student.image_levels, needs.image_levels)
            if tower == "image"
            else (self.student.text_levels, needs.text_levels)
        )
        return next((level.name for level in known if level.name in needed), None)

    @property
    def _keeps_answers(self) -> bool:
        """Whether a micro-batch's teacher levels wait for the backward pass: asking again costs more than keeping."""
        return self.device.type != "cpu" and self.teacher is not None and not self.teacher.from_disk

    @property
    def extras(self) -> Mapping[str, Extra]:
        pictures = {PICTURES: PictureReader()} if self.several_positives else {}
        labels = {} if self.label_reader is None else {LABELS: self.label_reader}
        return {**super().extras, **pictures, **labels}

    def _pictures(self, batch: Batch) -> Int[Tensor, " batch"] | None:
        """A number for each picture of all processes' samples; None where pairs with one picture are negatives."""
        pictures: Tensor | None = batch.extra.get(PICTURES)
        return None if pictures is None else gather_rows(pictures.to(self.device, non_blocking=True))

    @property
    def why_student_live(self) -> str | None:
        """Why stored answers of the student's frozen towers are of no use to this method; None: it can read them."""
        if type(self)._encode_student is not DualEncoderMethod._encode_student or self.not_cached is not None:
            return f"{type(self).__name__} encodes the student in a way of its own"
        if self.more_views:
            return "further views are encoded anew in every epoch"
        if self.text_pools and self.student.stored_levels.text_levels:
            return (
                "a reader behind the text tower, or blocks of it that learn, read the tokens of further texts, and a "
                "cache holds one vector of each"
            )
        if self.auxiliary is not None:
            return "heads that learn with the student read its pictures"
        if any(isinstance(teacher, MomentumTeacher) for teacher in self.teachers.values()):
            return "a momentum teacher reads the student's pictures"
        return None

    def _encode_student(self, part: Batch, _number: int = 0) -> Features:
        return self._read_by_student(part, self.student_needs)

    def pictures_of(self, part: Batch) -> tuple[Tensor, Tensor]:
        student = self._read_by_student(part, PICTURES_ALONE)
        teacher = next(iter(self.teachers.values()))
        answers: Features = teacher(part.only(teacher.reads).to(self.device, non_blocking=True), PICTURES_ALONE)
        return student.image.embedding, answers.image.embedding

    def _read_by_student(self, part: Batch, needs: LevelRequest) -> Features:
        if self.stored_student is not None and STUDENT in part.stored:
            inputs = part.pairs(STUDENT).to(self.device, True) if STUDENT in part.inputs else None
            stored = self.stored_student(part.only(STUDENT).to(self.device, non_blocking=True), self.stored_levels)
            joined: Features = self.student.from_pooled(stored, self.stored_towers, inputs, needs)
            return joined
        features: Features = self.student(part.inputs["student"].to(self.device, True), needs)
        return features

    def _encode_teacher(self, part: Batch, role: str | None = None) -> Features:
        """A teacher's features of a part of the batch; only what this teacher reads is moved to the device.

        Args:
            role: of the teacher; None: the first.
        """
        first = next(iter(self.teachers))
        teacher = self.teachers[role or first]
        wanted = self.teacher_needs
        needs = wanted if teacher.role == first else LevelRequest(towers=wanted.towers)
        features: Features = teacher(part.only(teacher.reads).to(self.device, non_blocking=True), needs)
        return features


class PictureMethod(DualEncoderMethod):
    """A method whose steps read pictures alone: texts are vectors of classes, which it makes by itself."""

    @property
    def student_needs(self) -> LevelRequest:
        return PICTURES_ALONE

    @property
    def teacher_needs(self) -> LevelRequest:
        return PICTURES_ALONE


def task_loss(student: Features) -> Float[Tensor, ""]:
    """The loss the student would be trained with alone: SigLIP's where it has a logit bias, else CLIP's."""
    image, text, scale = student.image.embedding, student.text.embedding, student.logit_scale
    if student.logit_bias is not None:
        return sigmoid_loss(image, text, logit_scale=scale, logit_bias=student.logit_bias, pictures=student.pictures)
    return contrastive_loss(image, text, logit_scale=scale, pictures=student.pictures)
