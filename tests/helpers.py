"""Small models, a source that lives in memory, and the parts of a run made from them in one line each."""

from __future__ import annotations

import json
from collections.abc import Collection, Container, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from functools import cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from cmapkd.data.batches import BatchBuilder
from cmapkd.data.ordering import Ordering
from cmapkd.data.readers import DualReader
from cmapkd.data.templates import ClassPrompts
from cmapkd.data.texts import TextChoice
from cmapkd.data.tokens import Lengths
from cmapkd.data.types import BadSampleError, Batch, Box, ModelInput, QuestionAnswer, Sample, Source, TokenBatch
from cmapkd.data.views import ViewSpec
from cmapkd.features import sample_keys
from cmapkd.methods import METHODS, Method, build_method
from cmapkd.methods.dual import LABELS, DualEncoderMethod
from cmapkd.methods.targets import Answered, Survey
from cmapkd.methods.unpaired import UnpairedPictures
from cmapkd.models import Classifier, DualEncoder, FrozenTeacher, Model, MomentumTeacher, TowerFeatures
from cmapkd.models.tiny import TinyDualEncoder, TinyOptions
from cmapkd.models.tiny_tower import TinyImageTower
from cmapkd.models.vocabulary import TrainedTokenizer
from cmapkd.training import OptimConfig, TrainConfig, Trainer

DUAL = tuple(name for name, kind in METHODS.items() if kind.reads is DualEncoder)
"""Methods over models of two towers; `writers.py` has those over models that write."""

CLASSIFYING = tuple(name for name, kind in METHODS.items() if kind.reads is Classifier)
"""Methods over classifiers."""

CLASSES = ClassPrompts(("red cat", "green dog", "blue boat", "round house", "square tree"), ("{}", "a {} near tree"))
WORDS = ("red", "green", "blue", "round", "square", "cat", "dog", "boat", "near", "under", "tree", "house")


ONE_WIDTH = ("dclip", "mulki", "sgva_clip", "zscl")
"""Methods whose student and teacher have the same width."""

ROUNDING = {"promptkd": 10.0}
"""How much larger float32's errors may be: its batch norm divides by the spread of embeddings that are nearly equal."""

FITTING: dict[str, dict[str, Any]] = {
    "cosmos": {"local_views": 1, "local_texts": 2},  # as published there are six of each
    "biomedcoop": {"context": "red blue"},  # the default's words are 9 tokens here
    "dclip": {"regions": 2},
    "dmae": {"teacher_sees": "whole"},  # the teacher has another grid
    "sgva_clip": {"context": "red blue"},
    "makd": {"questions": {"colour": ["red", "green", "blue"], "form": ["round", "square"]}, "templates": ["{}"]},
    "mst_distill": {"hidden": 12},  # masks grow with its cube
    "tipsv2": {"prototypes": 6},
    "trg_token_graph": {"tokens": 2},  # of 8 by default it would draw none here
    "zscl": {"reference": "train", "sentences": "classes"},  # one source
}
"""Settings with which a method trains on the models and data of these tests, where its defaults do not."""

LENT: dict[str, Any] = {  # what a method of embeddings can be given of cmapkd's
    "hints": {"P2": 2.0, "P4": 1.0, "L1": 0.5, "L3": 1.0},
    "bank_weight": 0.6,
    "bank": {"size": 12, "store": "fp32"},
}
CLIP_KD_IN_FULL: dict[str, Any] = {  # every term of the method
    **LENT,
    "masked_weight": 2.0,
    "mask_patch": 4,
    "gradient_weight": 0.001,
    "cross_weight": 0.5,
    "augmented_weight": 0.7,
}
MASKED = {"alpha": 0.7, "masks": {"sparsity": [0.5], "warmup": 0.0}}  # of tinyclip
GRADNORM = {"name": "gradnorm", "warmup_steps": 1, "every": 1}
CMAPKD_IN_FULL: dict[str, Any] = {  # every term and level of the method
    "visual_levels": {"P2": 1.0, "P3": 1.0, "P4": 1.0, "P5": 1.0},
    "language_levels": {"L1": 0.1, "L2": 0.1, "L3": 0.1, "L4": 1.0},
    "relational_weight": 0.35,
    "ablations": {
        "bank_within_weight": 0.5,
        "bank_level_weight": 0.3,
        "bank_pair_weight": 0.4,
        "pyramid_weight": 0.7,
        "alignment_weight": 0.1,
        "relation_weight": 3.0,
        "layer_relation_weight": 0.2,
        "bridge_dim": 8,
    },
}
CMAPKD_EXACT: dict[str, Any] = {  # the same with a bank that is soon full; fp16 would round the last digits apart
    **CMAPKD_IN_FULL,
    "bank": {"size": 12, "store": "fp32"},
}


class MemorySource:
    """Noise pictures with one to three captions, three synthetic and five false ones; a pure function of the index."""

    name = "memory"

    def __init__(
        self,
        length: int = 24,
        *,
        bad: Collection[int] = (),
        without_caption: Collection[int] = (),
        without_synthetic: Collection[int] = (),
    ) -> None:
        self.length, self.bad = length, set(bad)
        self.without_caption, self.without_synthetic = set(without_caption), set(without_synthetic)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        if index in self.bad:
            raise BadSampleError(f"m{index}", "truncated: no end marker")
        draws = np.random.default_rng(index)
        width, height = draws.integers(18, 40, 2)
        image = Image.fromarray(draws.integers(0, 256, (height, width, 3), dtype=np.uint8))
        written = () if index in self.without_synthetic else tuple(f"{word} boat" for word in draws.choice(WORDS, 3))
        label = index % 5 if index % 3 else None
        false = tuple(f"{word} tree" for word in draws.choice(WORDS, 5, replace=False))
        return Sample(f"m{index}", image, self.captions(index), label, texts={"synthetic": written, "negatives": false})

    def captions(self, index: int) -> tuple[str, ...]:
        if index in self.without_caption:
            return ()
        draws = np.random.default_rng(10_000 + index)
        return tuple(" ".join(draws.choice(WORDS, 4)) for _ in range(1 + index % 3))

    @property
    def class_names(self) -> Sequence[str] | None:
        return None

    def fingerprint(self) -> str:
        return f"memory-{self.length}"


class Sharded(MemorySource):
    """Samples in memory that say that they lie in shards of so many each."""

    def __init__(self, counts: Sequence[int], *, remote: bool = False, **options: Any) -> None:
        super().__init__(sum(counts), **options)
        self.counts, self.remote = counts, remote

    def shard_counts(self) -> NDArray[np.int64]:
        return np.array(self.counts)


class DropoutStudent(TinyDualEncoder):
    """Depends on the random state of the process while it trains."""

    def encode_image(self, images: torch.Tensor, levels: Sequence[str] = ()) -> TowerFeatures:
        return self._dropped(super().encode_image(images, levels))

    def encode_text(self, texts: TokenBatch, levels: Sequence[str] = ()) -> TowerFeatures:
        return self._dropped(super().encode_text(texts, levels))

    def _dropped(self, tower: TowerFeatures) -> TowerFeatures:
        return replace(tower, embedding=F.dropout(tower.embedding, 0.3, self.training))


@cache
def tokenizer(context_length: int = 12) -> TrainedTokenizer:
    return TrainedTokenizer.train([" ".join(WORDS)] * 4, vocab_size=100, context_length=context_length)


def make_model(
    *,
    dim: int = 16,
    image_size: int = 16,
    seed: int = 0,
    depth: int = 1,
    kind: type[TinyDualEncoder] = TinyDualEncoder,
    context_length: int = 12,
) -> TinyDualEncoder:
    options = TinyOptions(
        image_size=image_size,
        patch_size=8,
        stem_width=4,
        vision_width=32,
        vision_depth=depth,
        text_width=32,
        text_depth=1,
        embed_dim=dim,
        context_length=context_length,
        vocab_size=100,
    )
    torch.manual_seed(seed)
    return kind(options, tokenizer(context_length), name=f"test-{dim}")


def make_classifier(*, kind: type[TinyDualEncoder] = TinyDualEncoder, **options: Any) -> Classifier:
    """The image tower of `make_model`, without heads yet."""
    return Classifier(TinyImageTower.of(make_model(kind=kind, **options), "tiny:test"), name="classifier:tiny:test")


def make_student(name: str | type[Method], **options: Any) -> Model:
    """A small student of the kind that the method trains."""
    kind = METHODS[name] if isinstance(name, str) else name
    return make_classifier(**options) if kind.reads is Classifier else make_model(**options)


def make_teacher(
    *, dim: int = 24, image_size: int = 24, seed: int = 7, role: str = "teacher", context_length: int = 12
) -> FrozenTeacher:
    """Of another width and image size than the student."""
    return FrozenTeacher(make_model(dim=dim, image_size=image_size, seed=seed, context_length=context_length), role)


def second_teacher() -> FrozenTeacher:
    """Of yet another width and size."""
    return make_teacher(dim=8, image_size=32, seed=8, role="second")


def make_method(
    name: str | type[Method],
    *,
    student: Model | None = None,
    teacher: FrozenTeacher | None = None,
    settings: dict[str, Any] | None = None,
    more_teachers: Sequence[FrozenTeacher] = (),
    unpaired: UnpairedPictures | None = None,
) -> Method:
    kind = METHODS[name] if isinstance(name, str) else name
    student = student or make_student(name)
    width = {"dim": student.embed_dim} if name in ONE_WIDTH and isinstance(student, DualEncoder) else {}
    teacher = (teacher or make_teacher(**width)) if kind.uses_teacher else None
    torch.manual_seed(3)
    config = kind.Config.from_mapping(
        {"name": name if isinstance(name, str) else "", **FITTING.get(str(name), {}), **(settings or {})}
    )
    if not isinstance(name, str):
        return kind(config, student=student, teacher=teacher) if kind.uses_teacher else kind(config, student=student)
    method = build_method(
        config, student=student, teacher=teacher, more_teachers=more_teachers, classes=CLASSES, unpaired=unpaired
    )
    if method.prepares:
        if isinstance(next(method.parameters()), FakeTensor):  # which have no numbers to build anything of
            method.restructure({"support": 40, "clusters": 5})
        else:
            method.prepare(made_up(dim=next(iter(method.teachers.values())).embed_dim))
    return left_behind(method)


@torch.no_grad()
def left_behind(method: Method) -> Method:
    """A method whose momentum teacher, if it has one, is no longer its student: else they would agree in everything."""
    for teacher in method.teachers.values():
        if isinstance(teacher, MomentumTeacher):
            draws = torch.Generator().manual_seed(11)
            for parameter in teacher.model.parameters():
                parameter.mul_(1 + 0.2 * torch.randn(parameter.shape, generator=draws))
    return method


def made_up(number: int = 40, dim: int = 24, seed: int = 0) -> Survey:
    """A survey with answers of noise, as a teacher of `make_teacher` could give them of the samples m0, m1, ..."""
    draws = torch.Generator().manual_seed(seed)
    image, text = torch.randn(2, number, dim, generator=draws)
    keys, labels = sample_keys(f"m{i}" for i in range(number)), torch.arange(number) % len(CLASSES.names)

    def survey(role: str = "teacher", *, num: int | None = None, towers: Any = None) -> Iterator[Answered]:
        for first in range(0, number, 16):
            here = slice(first, first + 16)
            yield Answered(image[here], text[here], keys[here], labels[here])

    return survey


def into_first_stage(method: Method) -> Method:
    """A method as it is in the first of its stages."""
    stage = method.default_stages[0]
    method.reshape(stage)
    method.enter(stage)
    return method


def make_builder(method: Method, source: Any = None, **options: Any) -> BatchBuilder:
    models = {"student": method.student} | {
        role: teacher.model for role, teacher in method.teachers.items() if teacher.reads == role
    }
    spans = isinstance(method, DualEncoderMethod) and method.needs_spans
    readers = {role: DualReader(model.image_spec, model.tokenizer, spans) for role, model in models.items()}
    options = {"readers": readers, "views": ViewSpec(crop_scale=(0.6, 1.0), flip=0.5), "seed": 5, **options}
    options = {"extras": method.extras, **options}
    options = {"texts": TextChoice(method.text_pools), "more_views": method.more_views, **options}
    options = {"view_specs": {name: ViewSpec(crop_scale=(0.3, 0.6)) for name in method.more_views}, **options}
    return BatchBuilder(source if source is not None else MemorySource(), **options)


def random_batch(
    size: int,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    rich: bool = False,
    pools: Mapping[str, int] | None = None,
    views: Mapping[str, int] | None = None,
) -> Batch:
    """Noise for the models of `make_model` and `make_teacher`; if rich also a second teacher, synthetic captions.

    Args:
        pools: further texts of each sample, as a method asks for them in `text_pools`.
        views: further views, as in `more_views`.
    """
    draws = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, 30, (size, 7), generator=draws)
    texts = TokenBatch(ids, torch.arange(7)[None] < torch.randint(2, 8, (size, 1), generator=draws))
    inputs = {
        role: ModelInput(torch.randn(size, 3, side, side, generator=draws, dtype=torch.float64).to(dtype), texts)
        for role, side in (("student", 16), ("teacher", 24))
    }
    labels = torch.randint(-1, len(CLASSES.names), (size,), generator=draws)  # some have none
    if rich:
        pixels = torch.randn(size, 3, 32, 32, generator=draws, dtype=torch.float64).to(dtype)
        more = {"synthetic": TokenBatch(ids.flip(1), texts.mask)}
        inputs = {role: replace(each, more_texts=more) for role, each in inputs.items()}
        inputs["second"] = ModelInput(pixels, texts, more)
    for pool, count in (pools or {}).items():
        if pool not in inputs["student"].more_texts:
            words = torch.randint(4, 30, (size * count, 5), generator=draws)
            further = TokenBatch(words, torch.ones_like(words, dtype=torch.bool), per_sample=count)
            inputs = {
                role: replace(each, more_texts={**each.more_texts, pool: further}) for role, each in inputs.items()
            }
    for view, count in (views or {}).items():
        inputs = {
            role: replace(each, more_images={**each.more_images, view: _more_of(each.images, count, draws)})
            for role, each in inputs.items()
        }
    extra = {LABELS: labels}
    if most := (views or {}).get("regions"):  # how many of them are real
        extra["regions"] = torch.randint(1, most + 1, (size,), generator=draws)
    streams = tuple(("train", "reference")[i % 2] for i in range(size))
    return Batch(tuple(f"m{i}" for i in range(size)), inputs, ("",) * size, extra=extra, streams=streams)


def _more_of(images: Tensor, count: int, draws: torch.Generator) -> Tensor:
    """As many pictures of noise for each of `images`."""
    noise = torch.randn(len(images) * count, *images.shape[1:], generator=draws, dtype=torch.float64)
    return noise.to(images.dtype)


def make_trainer(
    out: Path,
    method: Method | str = "contrastive",
    *,
    source: Any = None,
    steps: int = 8,
    workers: int = 0,
    optim: dict[str, Any] | None = None,
    validate: Any = None,
    max_bad_share: float = 1.0,
    builder: dict[str, Any] | None = None,
    ordering: Ordering | None = None,
    **training: Any,
) -> Trainer:
    """A trainer of few small steps; `training` goes to `TrainConfig`."""
    method = make_method(method) if isinstance(method, str) else method
    out.mkdir(parents=True, exist_ok=True)
    defaults = {"steps": steps, "batch_size": 8, "log_every": 1, "checkpoint_every": 100}
    config = TrainConfig(**{**defaults, **training})
    if ordering is not None:
        streams = ordering.streams(source, length=len(source), batch_size=config.batch_size, seed=5)
        builder = {**(builder or {}), "streams": streams}
    return Trainer(
        method,
        make_builder(method, source, **(builder or {})),
        config,
        OptimConfig(**{"warmup_steps": 2, **(optim or {})}),
        out=out,
        seed=5,
        workers=workers,
        max_bad_share=max_bad_share,
        validate=validate,
    )


def digest(value: Any) -> str:
    """Of everything in it: types, names, shapes and bits."""
    made = blake2b(digest_size=16)

    def add(each: Any) -> None:
        made.update(type(each).__name__.encode())
        if isinstance(each, Tensor):
            made.update(f"{each.dtype}{tuple(each.shape)}".encode() + each.contiguous().numpy().tobytes())
        elif isinstance(each, Lengths):
            add(each.of_each)
        elif is_dataclass(each):
            for field in fields(each):
                made.update(field.name.encode())
                add(getattr(each, field.name))
        elif isinstance(each, dict):
            for key in sorted(each):
                add(key)
                add(each[key])
        elif isinstance(each, list | tuple):
            made.update(str(len(each)).encode())
            for item in each:
                add(item)
        else:
            made.update(repr(each).encode())

    add(value)
    return made.hexdigest()


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


class Partly:
    """Scenes of which some lack questions or boxes."""

    name = "partly"

    def __init__(self, source: Source, lacking: Container[int]) -> None:
        self.source, self.lacking = source, lacking

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Sample:
        sample = self.source[index]
        if index not in self.lacking:
            return sample
        unknown = (QuestionAnswer("why?", ("an answer like no other",)),)
        return Sample(sample.id, sample.image, sample.captions, sample.label, unknown, (Box(90, 90, 5, 5, "outside"),))

    def captions(self, index: int) -> tuple[str, ...]:
        return self.source.captions(index)

    class_names = None

    def fingerprint(self) -> str:
        return "partly"
