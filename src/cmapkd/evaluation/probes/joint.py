"""Heads that learn with a student: small heads whose losses are terms of a run, besides those of its method."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
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
from cmapkd.evaluation.probes.decoder import DecoderHead, WordTokenizer
from cmapkd.evaluation.probes.detector import DetectorHead
from cmapkd.evaluation.probes.features import patch_level, patches_of, text_level
from cmapkd.evaluation.probes.fusion import FusionHead, frequent_answers
from cmapkd.evaluation.probes.joint_data import (
    BoxTargets,
    CaptionTargets,
    HeadBatch,
    HeadTargets,
    JointBatch,
    JointExtra,
    QuestionTargets,
    survey,
)
from cmapkd.evaluation.probes.probe import Head, HeadInput
from cmapkd.evaluation.vqa import normalise_answer
from cmapkd.features import gather_rows
from cmapkd.features.pyramid import Grid
from cmapkd.methods import AuxiliaryTerms, Term
from cmapkd.methods.micro_batches import encode_checkpointed, micro_batches
from cmapkd.models.base import DualEncoder, ImageSpec
from cmapkd.models.storage import write_tensors
from cmapkd.models.texts import evaluating

_EXTRA = "heads"  # under which a batch carries a `JointBatch`


class JointHeads(AuxiliaryTerms):
    """One term `task_<name>` for each head: the mean of its loss over what the whole batch has for it to learn.

    The student encodes the heads' pictures by themselves, for they are whole and unchanged: a view may crop away what a
    question asks about, or mirror its left. Samples that teach a head nothing are left out of its mean, and counted.
    """

    def __init__(
        self,
        heads: dict[str, Head],
        targets: dict[str, HeadTargets],
        configs: dict[str, JointHeadConfig],
        *,
        spec: ImageSpec,
        class_names: TokenBatch | None = None,
    ) -> None:
        """`spec` is the student's; `class_names` are prompts, for a head that is given the classes' embeddings."""
        super().__init__()
        self.heads, self.targets, self.configs = nn.ModuleDict(heads), targets, configs
        self.spec, self.class_names = spec, class_names
        self.term_names = tuple(_term(name) for name in heads)
        self.measurements = {}

    def forward(
        self, student: DualEncoder, batch: Batch, *, micro_batch: int | None, wants: Callable[[str], bool]
    ) -> dict[str, Term]:
        joint: JointBatch = batch.extra[_EXTRA]
        heads: dict[str, Head] = {name: head for name, head in self.heads.items() if wants(_term(name))}  # type: ignore[misc]
        self.measurements = {}
        if not heads:
            return {}
        device = student.device
        names = self._names_now(student, heads, device)
        size = micro_batch or max(1, len(joint.pictures))

        def part_sums(part: Batch, number: int) -> dict[str, Float[Tensor, 2]]:
            """Sum and count of each head's loss over a micro-batch; heads that learn nothing from it are left out."""
            pictures = part.pairs("student").images.to(device, non_blocking=True)
            tower = student.encode_image(student.image_spec.to_model(pictures), (patch_level(student).name,))
            patches, _ = patches_of(student, tower)
            sums = {}
            for name, head in heads.items():
                learned = joint.by_head[name].part(number * size, number * size + len(pictures))
                if len(learned.rows):
                    targets = {key: values.to(device, non_blocking=True) for key, values in learned.targets.items()}
                    rows = learned.rows.to(device)
                    inputs = _head_input(student, patches[rows], tower.embedding[rows], learned, device)
                    count = head.size(targets)
                    if names is not None and isinstance(head, DetectorHead):
                        targets["names"] = names
                    loss = head.loss(inputs, targets)
                    sums[name] = torch.stack([loss.float() * count.clamp_min(1), count.float()])
            return sums

        parts = micro_batches(_pictures_alone(joint.pictures, device), size) if len(joint.pictures) else []
        sums = encode_checkpointed(part_sums, parts, model=student) if parts else []
        totals = [
            _nothing(student, head) + sum(part[name] for part in sums if name in part) for name, head in heads.items()
        ]
        masked = torch.tensor([[float(joint.num_samples - len(joint.by_head[name].rows)) for name in heads]])
        left_out = gather_rows(masked.to(device, non_blocking=True)).sum(0)
        self.measurements = {f"heads/{name}_masked": number for name, number in zip(heads, left_out, strict=True)}
        return {
            _term(name): Term(total, self.configs[name].weight, count.detach())
            for name, (total, count) in zip(heads, totals, strict=True)
        }

    def _names_now(
        self, student: DualEncoder, heads: dict[str, Head], device: torch.device
    ) -> Float[Tensor, "classes dim"] | None:
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
        return {_EXTRA: JointExtra(self.spec, self.targets)}

    def save(self, folder: Path) -> None:
        """Writes each head's weights (`<name>.safetensors`), and its settings and vocabulary (`<name>.json`)."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, head in self.heads.items():
            about: dict[str, Any] = {"settings": self.configs[name].model_dump(mode="json")}
            maker = self.targets[name]
            if isinstance(maker, QuestionTargets):
                about["answers"] = maker.answers
            elif isinstance(maker, CaptionTargets):
                about["words"] = maker.words.vocabulary
            elif isinstance(maker, BoxTargets):
                about["names"] = maker.names
            write_tensors(folder / f"{name}.safetensors", head.state_dict())
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
    targets: dict[str, HeadTargets] = {}
    names: TokenBatch | None = None
    with torch.random.fork_rng(devices=[]):
        cells, grid = _shape(student)
        for name, settings in config.wanted.items():
            torch.manual_seed(seed)  # so a head starts the same whichever others there are
            sizes = {"patch_width": patch_level(student).width, "embed_dim": student.embed_dim}
            if isinstance(settings, JointVQAConfig):
                asked = [q for sample in samples for q in sample.questions if q.answers]
                _need(asked, name, "question with an answer", source, samples)
                answers = frequent_answers(asked, most=settings.answers, normalise=normalise_answer)
                targets[name] = QuestionTargets(answers, student.tokenizer)
                heads[name] = FusionHead(
                    **sizes,
                    cells=cells,
                    text_width=text_level(student).width,
                    answers=len(answers),
                    width=settings.width,
                    depth=settings.depth,
                )
            elif isinstance(settings, JointCaptioningConfig):
                captions = [caption for sample in samples for caption in sample.captions]
                _need(captions, name, "caption", source, samples)
                words = WordTokenizer(captions, most=settings.words, length=settings.length)
                targets[name] = CaptionTargets(words)
                heads[name] = DecoderHead(
                    **sizes,
                    cells=cells,
                    words=len(words),
                    length=settings.length,
                    width=settings.width,
                    depth=settings.depth,
                )
            elif isinstance(settings, JointDetectionConfig):
                classes = sorted({box.name for sample in samples for box in sample.boxes if not box.crowd})
                _need(classes, name, "box", source, samples)
                targets[name] = BoxTargets(classes)
                names = student.tokenizer([fill(template, kind) for kind in classes])
                heads[name] = DetectorHead(
                    **sizes,
                    grid=grid,
                    names=torch.zeros(len(classes), student.embed_dim),  # given anew in every step
                    scales=settings.scales,
                    width=settings.width,
                    depth=settings.depth,
                )
    return JointHeads(heads, targets, config.wanted, spec=student.image_spec, class_names=names)


def _need(examples: Sequence[Any], name: str, what: str, source: Source, samples: Sequence[Sample]) -> None:
    if not examples:
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


def _head_input(
    student: DualEncoder,
    patches: Float[Tensor, "items cells width"],
    embedding: Float[Tensor, "items dim"],
    learned: HeadBatch,
    device: torch.device,
) -> HeadInput:
    """The head's input, with the student's features of the texts where the head reads any."""
    if learned.texts is None:
        return HeadInput(patches, embedding)
    level, texts = text_level(student).name, learned.texts.to(device, True)
    tower = student.encode_text(texts, (level,))
    return HeadInput(patches, embedding, tower.levels[level].values, texts.mask, tower.embedding)


def _pictures_alone(pictures: UInt8[Tensor, "pictures 3 size size"], device: torch.device) -> Batch:
    """As a batch, which is what is cut into micro-batches; no texts."""
    number = len(pictures)
    none = TokenBatch(torch.zeros(number, 0, dtype=torch.long, device=device), torch.zeros(number, 0, device=device))
    return Batch(("",) * number, {"student": ModelInput(pictures, none)}, ("",) * number)


def _nothing(student: DualEncoder, head: Head) -> Float[Tensor, 2]:
    """Sum and count of a loss over nothing. It has a gradient of 0 to whatever learns, so that no process waits."""
    learning = (student.log_logit_scale, *head.parameters())
    # each times zero by itself: behind one sum, autograd would let small gradients share their memory
    zero = torch.stack([(parameter.float() * 0).sum() for parameter in learning]).sum()
    return torch.stack([zero, zero.detach()])


def _term(name: str) -> str:
    return f"task_{name}"
