"""Heads that learn with a student: small heads whose losses are terms of a run, beside those of its method."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from cmapkd.config import ConfigError
from cmapkd.data.batches import Extra
from cmapkd.data.templates import fill
from cmapkd.data.types import Batch, ModelInput, Sample, Source, TokenBatch
from cmapkd.evaluation.probes.config import (
    HeadsConfig,
    JointCaptioningConfig,
    JointDetectionConfig,
    JointHeadConfig,
    JointVQAConfig,
)
from cmapkd.evaluation.probes.decoder import DecoderHead, Words
from cmapkd.evaluation.probes.detector import DetectorHead
from cmapkd.evaluation.probes.features import patch_level, patches_of, text_level
from cmapkd.evaluation.probes.fusion import FusionHead, frequent_answers
from cmapkd.evaluation.probes.lessons import (
    BoxLesson,
    CaptionLesson,
    Lesson,
    LessonBatch,
    LessonReader,
    QuestionLesson,
    Taught,
    survey,
)
from cmapkd.evaluation.probes.probe import Head, Seen
from cmapkd.evaluation.vqa import normalise_answer
from cmapkd.features import gather_rows
from cmapkd.features.pyramid import Grid
from cmapkd.methods import AuxiliaryTerms, Term
from cmapkd.methods.micro_batches import encode_checkpointed, micro_batches
from cmapkd.models.base import DualEncoder, ImageSpec
from cmapkd.models.texts import evaluating

_EXTRA = "heads"  # under which a batch carries a `LessonBatch`


class JointHeads(AuxiliaryTerms):
    """One term `task_<name>` for each head: the mean of its loss over what the whole batch has for it to learn.

    The student encodes the heads' pictures by themselves, for they are whole and unchanged: a view may crop away what a
    question asks about, or mirror its left. Samples that teach a head nothing are left out of its mean, and counted.
    """

    def __init__(
        self,
        heads: dict[str, Head],
        lessons: dict[str, Lesson],
        configs: dict[str, JointHeadConfig],
        *,
        spec: ImageSpec,
        class_names: TokenBatch | None = None,
    ) -> None:
        """`spec` is the student's; `class_names` are prompts, for a head that is given the classes' embeddings."""
        super().__init__()
        self.heads, self.lessons, self.configs = nn.ModuleDict(heads), lessons, configs
        self.spec, self.class_names = spec, class_names
        self.term_names = tuple(_term(name) for name in heads)
        self.measurements = {}

    def forward(
        self, student: DualEncoder, batch: Batch, *, micro_batch: int | None, wants: Callable[[str], bool]
    ) -> dict[str, Term]:
        told: LessonBatch = batch.extra[_EXTRA]
        heads: dict[str, Head] = {name: head for name, head in self.heads.items() if wants(_term(name))}  # type: ignore[misc]
        self.measurements = {}
        if not heads:
            return {}
        device = student.device
        names = self._names_now(student, heads, device)
        size = micro_batch or max(1, len(told.pictures))

        def part_sums(part: Batch, number: int) -> dict[str, Tensor]:
            pictures = part.inputs["student"].images.to(device, non_blocking=True)
            tower = student.encode_image(pictures, (patch_level(student).name,))
            patches, _ = patches_of(student, tower)
            sums = {}
            for name, head in heads.items():
                taught = told.taught[name].among(number * size, number * size + len(pictures))
                if len(taught.rows):
                    targets = {key: values.to(device, non_blocking=True) for key, values in taught.targets.items()}
                    rows = taught.rows.to(device)
                    seen = _seen(student, patches[rows], tower.embedding[rows], taught, device)
                    count = head.size(targets)
                    if names is not None and isinstance(head, DetectorHead):
                        targets["names"] = names
                    loss = head.loss(seen, targets)
                    sums[name] = torch.stack([loss.float() * count.clamp_min(1), count.float()])
            return sums

        parts = micro_batches(_pictures_alone(told.pictures, device), size) if len(told.pictures) else []
        sums = encode_checkpointed(part_sums, parts, model=student) if parts else []
        own = [
            _nothing(student, head) + sum(part[name] for part in sums if name in part) for name, head in heads.items()
        ]
        masked = torch.tensor([[float(told.num_samples - len(told.taught[name].rows)) for name in heads]])
        left_out = gather_rows(masked.to(device, non_blocking=True)).sum(0)
        self.measurements = {f"heads/{name}_masked": number for name, number in zip(heads, left_out, strict=True)}
        return {
            _term(name): Term(total, self.configs[name].weight, count.detach())
            for name, (total, count) in zip(heads, own, strict=True)
        }

    def _names_now(self, student: DualEncoder, heads: dict[str, Head], device: torch.device) -> Tensor | None:
        """The classes' unit embeddings by the text tower as it is; the heads note their mean."""
        detectors = [head for head in heads.values() if isinstance(head, DetectorHead)]
        if not detectors or self.class_names is None:
            return None
        names = nn.functional.normalize(student.encode_text(self.class_names.to(device)).embedding.float(), dim=-1)
        for head in detectors:
            head.mean.copy_(names.detach().mean(0))
        return names

    @property
    def extras(self) -> Mapping[str, Extra]:
        return {_EXTRA: LessonReader(self.spec, self.lessons)}

    def save(self, folder: Path) -> None:
        """Writes each head's weights (`<name>.safetensors`), and its settings and vocabulary (`<name>.json`)."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, head in self.heads.items():
            about: dict[str, Any] = {"settings": self.configs[name].model_dump(mode="json")}
            lesson = self.lessons[name]
            if isinstance(lesson, QuestionLesson):
                about["answers"] = lesson.answers
            elif isinstance(lesson, CaptionLesson):
                about["words"] = lesson.words.vocabulary
            elif isinstance(lesson, BoxLesson):
                about["names"] = lesson.names
            weights = {key: value.detach().cpu().contiguous() for key, value in head.state_dict().items()}
            save_file(weights, folder / f"{name}.safetensors")
            text = json.dumps(about, indent=1, ensure_ascii=False)
            (folder / f"{name}.json").write_text(text + "\n", encoding="utf-8")


def build_heads(
    config: HeadsConfig, *, student: DualEncoder, source: Source, template: str, seed: int
) -> JointHeads | None:
    """The heads whose weights are not zero; None where there are none. Draws nothing from the run's random state.

    Args:
        template: of the prompts of class names.
    Raises:
        ConfigError: the source has nothing that a head could learn.
        ValueError: the student lacks levels that a head reads.
    """
    if not config.wanted:
        return None
    samples = survey(source, most=config.samples)
    heads: dict[str, Head] = {}
    lessons: dict[str, Lesson] = {}
    names: TokenBatch | None = None
    with torch.random.fork_rng(devices=[]):
        cells, grid = _shape(student)
        for name, each in config.wanted.items():
            torch.manual_seed(seed)  # so a head starts the same whichever others there are
            sizes = {"patch_width": patch_level(student).width, "embed_dim": student.embed_dim}
            if isinstance(each, JointVQAConfig):
                asked = [q for sample in samples for q in sample.questions if q.answers]
                _need(asked, name, "question with an answer", source, samples)
                answers = frequent_answers(asked, most=each.answers, normalise=normalise_answer)
                lessons[name] = QuestionLesson(answers, student.tokenizer)
                heads[name] = FusionHead(
                    **sizes,
                    cells=cells,
                    text_width=text_level(student).width,
                    answers=len(answers),
                    width=each.width,
                    depth=each.depth,
                )
            elif isinstance(each, JointCaptioningConfig):
                captions = [caption for sample in samples for caption in sample.captions]
                _need(captions, name, "caption", source, samples)
                words = Words(captions, most=each.words, length=each.length)
                lessons[name] = CaptionLesson(words)
                heads[name] = DecoderHead(
                    **sizes, cells=cells, words=len(words), length=each.length, width=each.width, depth=each.depth
                )
            elif isinstance(each, JointDetectionConfig):
                classes = sorted({box.name for sample in samples for box in sample.boxes if not box.crowd})
                _need(classes, name, "box", source, samples)
                lessons[name] = BoxLesson(classes)
                names = student.tokenizer([fill(template, kind) for kind in classes])
                heads[name] = DetectorHead(
                    **sizes,
                    grid=grid,
                    names=torch.zeros(len(classes), student.embed_dim),  # given anew in every step
                    scales=each.scales,
                    width=each.width,
                    depth=each.depth,
                )
    return JointHeads(heads, lessons, config.wanted, spec=student.image_spec, class_names=names)


def _need(found: Sequence[Any], name: str, what: str, source: Source, samples: Sequence[Sample]) -> None:
    if not found:
        raise ConfigError(
            f"heads.{name} learns from the training data, but of the {len(samples)} samples of {source.name} that were "
            f"read beforehand none has a {what}. Drop the head, take another data.train, or raise heads.samples."
        )


def _shape(student: DualEncoder) -> tuple[int, Grid]:
    """How many cells the student's patches have, and their rows and columns."""
    size = student.image_spec.size
    device = student.device
    with evaluating(student, device, None):
        tower = student.encode_image(torch.zeros(1, 3, size, size, device=device), (patch_level(student).name,))
        patches, grid = patches_of(student, tower)
    return patches.shape[1], grid


def _seen(student: DualEncoder, patches: Tensor, embedding: Tensor, taught: Taught, device: torch.device) -> Seen:
    if taught.texts is None:
        return Seen(patches, embedding)
    level, texts = text_level(student).name, taught.texts.to(device, True)
    tower = student.encode_text(texts, (level,))
    return Seen(patches, embedding, tower.levels[level].values, texts.mask, tower.embedding)


def _pictures_alone(pictures: Tensor, device: torch.device) -> Batch:
    """As a batch, which is what is cut into micro-batches; no texts."""
    number = len(pictures)
    none = TokenBatch(torch.zeros(number, 0, dtype=torch.long, device=device), torch.zeros(number, 0, device=device))
    return Batch(("",) * number, {"student": ModelInput(pictures, none)}, ("",) * number)


def _nothing(student: DualEncoder, head: Head) -> Tensor:
    """A zero loss over zero things. Whatever learns has a gradient to it, so that no process waits for another."""
    learning = (student.log_logit_scale, *head.parameters())
    # each times zero by itself: behind one sum, autograd would let small gradients share their memory
    zero = torch.stack([(parameter.float() * 0).sum() for parameter in learning]).sum()
    return torch.stack([zero, zero.detach()])


def _term(name: str) -> str:
    return f"task_{name}"
