"""What the tasks of one evaluation share: the data, and each model with everything that was computed of it once."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from jaxtyping import Float
from rich.console import Console
from torch import Tensor

from cmapkd.data.templates import get_class_names, get_class_prompts, get_templates
from cmapkd.data.types import BadSampleError, Sample, Source
from cmapkd.evaluation.answer_scores import AnswerScore
from cmapkd.evaluation.config import EvaluationConfig, SuiteConfig, WritingConfig
from cmapkd.evaluation.embed import Embedded, OnBadSample, embed
from cmapkd.evaluation.probes.data import Annotations, read_annotations
from cmapkd.evaluation.probes.features import ImageFeatures, encode_images
from cmapkd.evaluation.ranking import RankCounts
from cmapkd.evaluation.share import ALONE, Share
from cmapkd.evaluation.writing import Writer
from cmapkd.models.base import DualEncoder, ImageEncoder, Model
from cmapkd.models.contracts import both_towers
from cmapkd.models.generative import GenerativeModel
from cmapkd.models.texts import class_vectors

_NUM_FIRST_SAMPLES = 32  # samples that tell whether probes have anything to score


@dataclass
class Bench:
    """One evaluation: what is measured on, how, and where."""

    config: EvaluationConfig
    device: torch.device
    source: Source | None = None  # what is scored
    train: Source | None = None  # what probes learn from; never the scored one
    work: Path | None = None  # where probes keep their checkpoints; None: a temporary folder
    on_bad_sample: OnBadSample = "skip"
    autocast: torch.dtype | None = None
    levels: bool = False  # whether embedding keeps the towers' levels too
    negatives: int = 0  # how many false texts of each sample embedding keeps beside its captions
    console: Console | None = None
    share: Share = ALONE  # of what is scored

    @property
    def scored(self) -> Source:
        if self.source is None:
            raise ValueError("there are no data to measure on: name them with --data")
        return self.source

    @property
    def num_scored(self) -> int:
        """Samples of the source that are looked at, readable or not."""
        limit = self.config.limit
        return len(self.scored) if limit is None else min(limit, len(self.scored))

    @property
    def suite(self) -> SuiteConfig:
        """The settings of probes and efficiency: the defaults where only a run's were given."""
        return self.config if isinstance(self.config, SuiteConfig) else SuiteConfig()

    @property
    def how(self) -> WritingConfig:
        """How models that write are asked."""
        return self.config.writing.resolved

    def say(self, message: str) -> None:
        if self.console is not None:
            self.console.print(message, highlight=False, markup=False)

    @cached_property
    def first_samples(self) -> tuple[Sample, ...]:
        """A few readable ones of the samples that are scored, to see what they have."""
        samples = []
        for index in range(min(_NUM_FIRST_SAMPLES, self.num_scored)):
            try:
                samples.append(self.scored[index])
            except BadSampleError:  # counted when it is embedded
                continue
        return tuple(samples)

    @cached_property
    def train_annotations(self) -> Annotations:
        assert self.train is not None
        return read_annotations(self.train, limit=self.suite.probes.samples)

    @cached_property
    def annotations(self) -> Annotations:
        return read_annotations(self.scored, limit=self.config.limit)


@dataclass
class Subject:
    """A model under evaluation. What several tasks need of it is computed when first asked for, and kept."""

    name: str
    model: Model
    bench: Bench
    ranks: dict[str, RankCounts] = field(default_factory=dict)  # what tasks ranked: `i2t`, `t2i`, `zero_shot`
    answers: dict[str, AnswerScore] = field(default_factory=dict)  # by path, the scores that are means over pictures
    _features: dict[str, ImageFeatures] = field(default_factory=dict)

    @property
    def dual(self) -> DualEncoder:
        """The model, for what embeds images and texts: tasks whose `reads` is `DualEncoder`."""
        return both_towers(self.model, "an evaluation of pictures and texts")

    @property
    def encoder(self) -> ImageEncoder:
        """The model, for what embeds images: tasks whose `reads` is `ImageEncoder`."""
        assert isinstance(self.model, ImageEncoder)  # the suite refused others
        return self.model

    @property
    def generative(self) -> GenerativeModel:
        """The model, for what writes: tasks whose `reads` is `GenerativeModel`."""
        assert isinstance(self.model, GenerativeModel)  # the suite refused others
        return self.model

    @cached_property
    def writer(self) -> Writer:
        """What asks the model about the scored source, and keeps its answers."""
        bench = self.bench
        if bench.annotations.bad and bench.on_bad_sample == "error":
            raise BadSampleError(*bench.annotations.bad[0])
        return Writer(
            self.generative,
            bench.scored,
            bench.config,
            bench.device,
            bench.autocast,
            bench.on_bad_sample,
            bench.share,
            bad=dict(bench.annotations.bad),
        )

    @cached_property
    def embedded(self) -> Embedded:
        bench = self.bench
        return self._embed(
            bench.scored,
            limit=bench.config.limit,
            levels=bench.levels,
            negatives=bench.negatives,
            share=bench.share,
        )

    @cached_property
    def embedded_train(self) -> Embedded:
        """The first `probes.samples` samples of the training source."""
        assert self.bench.train is not None
        return self._embed(self.bench.train, limit=self.bench.suite.probes.samples, levels=False)

    def _embed(
        self, source: Source, *, limit: int | None, levels: bool, negatives: int = 0, share: Share = ALONE
    ) -> Embedded:
        bench = self.bench
        bench.say(f"{self.name}: embedding {source.name}")
        return embed(
            self.encoder,
            source,
            batch_size=bench.config.batch_size,
            device=bench.device,
            workers=bench.config.workers,
            timeout=bench.config.timeout,
            limit=limit,
            on_bad_sample=bench.on_bad_sample,
            autocast=bench.autocast,
            levels=levels,
            negatives=negatives,
            share=share,
        )

    @property
    def num_classes(self) -> int:
        """Of the labels of both splits: as many as are named, or occur."""
        named = len(self.bench.scored.class_names or ())
        return max(named, 1 + max(int(split.labels.max()) for split in (self.embedded, self.embedded_train)))

    @cached_property
    def class_names(self) -> tuple[str, ...] | None:
        return get_class_names(self.bench.config.class_names, self.bench.scored)

    @cached_property
    def class_weights(self) -> Float[Tensor, "classes dim"]:
        """The zero-shot classifier of the source's labels."""
        assert self.class_names is not None
        return self.name_weights(self.class_names, self.class_prompts)

    @cached_property
    def class_prompts(self) -> tuple[tuple[str, ...], ...]:
        """Texts of each class by itself; empty without."""
        return get_class_prompts(self.bench.config.class_prompts, self.class_names or (), self.bench.scored)

    def name_weights(self, names: tuple[str, ...], own: tuple[tuple[str, ...], ...] = ()) -> Float[Tensor, "names dim"]:
        """One unit vector for each name, from the text tower, the templates and texts of its own."""
        templates = get_templates(self.bench.config.templates, self.bench.source)
        return class_vectors(
            self.dual,
            names,
            templates if templates or own else ("{}",),
            own=own,
            batch_size=self.bench.config.batch_size,
            device=self.bench.device,
            autocast=self.bench.autocast,
        )

    def image_features(self, which: str) -> ImageFeatures:
        """Patch features of the `train` or `scored` images under the frozen encoder, once for all probes."""
        if which not in self._features:
            bench = self.bench
            source = bench.train if which == "train" else bench.scored
            assert source is not None
            annotations = bench.train_annotations if which == "train" else bench.annotations
            bench.say(f"{self.name}: features of {len(annotations)} images of {source.name}")
            self._features[which] = encode_images(
                self.dual,
                source,
                annotations.indices,
                batch_size=bench.config.batch_size,
                device=bench.device,
                memory=bench.suite.probes.memory,
            )
        return self._features[which]
