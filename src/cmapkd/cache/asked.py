"""What a method reads of a teacher, and the rows that hold it: of two towers, and of a model that writes."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, ClassVar, Protocol

from cmapkd.cache.config import DEFAULT_VIEWS, CacheConfig
from cmapkd.cache.files import CacheError
from cmapkd.cache.layout import DETAILS, RowLayout
from cmapkd.cache.rows import Layout, live_features
from cmapkd.cache.token_layout import TokenLayout
from cmapkd.data.batches import Choice
from cmapkd.data.readers import DualReader
from cmapkd.data.texts import TextChoice
from cmapkd.data.turns import Dialogue
from cmapkd.data.types import BadSampleError, ModelInput, Source
from cmapkd.data.unseen import unseen
from cmapkd.data.views import ViewSpec, draw_view
from cmapkd.features import KeyTokens
from cmapkd.methods import Method
from cmapkd.methods.dual import DualEncoderMethod, TeacherDetail
from cmapkd.methods.generative import GenerativeMethod, TopRequest
from cmapkd.models import DualEncoder, FrozenTeacher, LevelRequest
from cmapkd.models.generative import ChatProcessor
from cmapkd.models.token_types import TokenNeeds
from cmapkd.models.types import BOTH

_LENGTHS_KEPT = 100_000  # of answers, which repeat where they are short


@dataclass(frozen=True)
class Seen:
    """What a teacher is asked about, and as what it answers."""

    teacher: FrozenTeacher  # live
    source: Source
    views: ViewSpec
    texts: Choice
    precision: str
    config: CacheConfig


class Asked(Protocol):
    """What a method reads of one teacher in all its stages together.

    Attributes:
        smaller: a setting that makes rows smaller.
    """

    smaller: ClassVar[str]

    def check(self, config: CacheConfig, name: str) -> None:
        """Refuses settings that the teacher of this name, or the method, cannot have; with a cache or without.

        Raises:
            CacheError: the config asks for less than the method reads, or for what such a teacher does not have.
        """
        ...

    def outline(self, seen: Seen) -> Layout:
        """The layout where no cache is there yet, but for what the data alone decide: it names the cache's folder.

        Raises:
            CacheError: the config asks for less than the method reads, or for what such a teacher does not have.
        """
        ...

    def completed(self, outline: Any, seen: Seen) -> Layout:
        """With what the data decide.

        Raises:
            CacheError: no sample can be read.
        """
        ...

    def lacking(self, layout: Layout) -> str | None:
        """Why rows like these cannot answer the method, or None if they can."""
        ...


def asked_of(method: Method, role: str) -> Asked:
    """What a method reads of the teacher with this role.

    Raises:
        CacheError: answers of this teacher cannot be stored.
    """
    if isinstance(method, GenerativeMethod):
        return _tokens_of(method, role)
    if not isinstance(method, DualEncoderMethod):
        raise CacheError(f"teacher {role} of {type(method).__name__} has no answers to keep: set cache: off")
    if role != "teacher":
        return AskedTowers()
    return AskedTowers(replace(method.teacher_needs, towers=BOTH), method.teacher_detail, method.key_tokens)


@dataclass(frozen=True)
class AskedTowers:
    """Embeddings of both towers, since any method may read them, and levels."""

    smaller: ClassVar[str] = "cache.store=int8"

    needs: LevelRequest = field(default_factory=lambda: LevelRequest(towers=BOTH))
    detail: TeacherDetail = "global"
    key_tokens: KeyTokens | None = None  # where the method reads them

    def kind(self, config: CacheConfig) -> TeacherDetail:
        """What is stored where no cache is there yet.

        Raises:
            CacheError: the config asks for less than the method reads.
        """
        if config.kind == "auto":
            return self.detail
        if DETAILS.index(config.kind) < DETAILS.index(self.detail):
            raise CacheError(
                f"cache.kind is {config.kind}, but this method, as it is set, reads the teacher {self.detail}: "
                f"leave cache.kind at auto, or give the levels' weights as zero"
            )
        return config.kind

    def check(self, config: CacheConfig, name: str) -> None:
        for setting in ("top_k", "max_answer_tokens"):
            if getattr(config, setting) is not None:
                raise CacheError(
                    f"cache.{setting} is for a teacher that writes, and {name} has two towers: leave it out"
                )
        self.kind(config)

    def outline(self, seen: Seen) -> RowLayout:
        """Found by asking the teacher about one sample, where it is now.

        Raises:
            CacheError: no sample can be read, or the teacher's rows are not alike.
        """
        config, model = seen.config, seen.teacher.model
        assert isinstance(model, DualEncoder)
        self.check(config, model.name)
        needs, kind = self.needs, self.kind(config)
        if kind != "global" and config.kind != "auto" and not (needs.image_levels or needs.text_levels):
            # asked to hold levels that this method does not read: all of them
            needs = LevelRequest(
                tuple(info.name for info in model.image_levels), tuple(info.name for info in model.text_levels)
            )
        features = live_features(seen.teacher, _one_sample(seen, model), needs, seen.precision)
        chosen = (self.key_tokens or KeyTokens()) if kind == "key_tokens" else None
        context = model.tokenizer.context_length
        return RowLayout.of(features, kind=kind, store=config.store, context_length=context, key_tokens=chosen)

    def completed(self, outline: RowLayout, seen: Seen) -> RowLayout:  # noqa: ARG002
        return outline

    def lacking(self, layout: Layout) -> str | None:
        if not isinstance(layout, RowLayout):
            return "it holds the answers of a teacher that writes"
        return layout.lacks(self.needs, self.detail, self.key_tokens)


@dataclass(frozen=True)
class AskedTokens:
    """The likeliest tokens of each token of the answers."""

    smaller: ClassVar[str] = "a smaller method.top_k"

    top: TopRequest
    size: int  # tokens that student and teacher have in common

    def check(self, config: CacheConfig, name: str) -> None:
        if config.kind != "auto":
            raise CacheError(
                f"cache.kind is {config.kind}, which teachers of two towers have, and {name} writes: leave "
                "cache.kind out, and set cache.top_k to hold more tokens than the method reads"
            )
        if config.store == "int8":
            raise CacheError(
                "cache.store is int8, and likeliest tokens are stored in fp16 or fp32: set cache.store=fp16"
            )
        if config.top_k is not None and config.top_k < self.top.number:
            raise CacheError(
                f"cache.top_k is {config.top_k}, and the method reads the {self.top.number} likeliest tokens: set "
                f"cache.top_k={self.top.number} or more, or leave it out"
            )

    def outline(self, seen: Seen) -> TokenLayout:
        """Without room for answers, where the config does not name any."""
        config = seen.config
        self.check(config, seen.teacher.model.name)
        assert config.store != "int8"  # as checked
        count = min(config.top_k or self.top.number, self.size)
        return TokenLayout(config.store, count, float(self.top.temperature), self.size, config.max_answer_tokens or 0)

    def completed(self, outline: TokenLayout, seen: Seen) -> TokenLayout:
        """With room for the longest answer of the data, which one pass over their texts finds.

        Raises:
            CacheError: no answer can be read, or one is longer than the config allows.
        """
        room, (longest, sample_id) = outline.answer_tokens, longest_answer(seen)
        if room and longest > room:  # told now, since the build may meet it after hours
            raise CacheError(
                f"cache.max_answer_tokens is {room}, and an answer of sample {sample_id!r} has {longest} tokens of the "
                f"teacher: set cache.max_answer_tokens={longest} or more, leave it out, or take out such samples"
            )
        return replace(outline, answer_tokens=room or longest)

    def lacking(self, layout: Layout) -> str | None:
        if not isinstance(layout, TokenLayout):
            return "it holds the answers of a teacher of two towers"
        return layout.lacks(self.top, self.size)


def longest_answer(seen: Seen) -> tuple[int, str]:
    """Tokens of the teacher in the longest answer that any view of any sample shows, its end token included; and the
    sample's id.

    All samples are read and not only a run's own: later runs that read others share the cache. Answers longer than any
    dialogue that the teacher takes do not count. Pictures are not decoded where the source can be read without them.

    Raises:
        CacheError: no answer can be read.
    """
    processor: ChatProcessor = seen.teacher.model.processor
    limit, longest, most = seen.views.num_views or DEFAULT_VIEWS, (0, ""), processor.max_tokens

    @lru_cache(_LENGTHS_KEPT)
    def length(text: str) -> int:
        try:
            return len(processor.encode_answer(text))
        except ValueError:  # the build meets it again, and counts the sample as bad
            return 0

    for index in range(len(seen.source)):
        try:
            sample = unseen(seen.source, index)
            for number in range(limit):
                view = draw_view(sample.id, number, seen.views, sample.image.size)
                dialogue: Dialogue = seen.texts.choose(sample, view, number)
                tokens = sum(length(turn.text) for turn in processor.learned(dialogue))
                if tokens > longest[0] and (most is None or tokens <= most):
                    longest = tokens, sample.id
        except BadSampleError:
            continue
    if not longest[0]:
        raise CacheError(f"no answer of {seen.source.name} can be read by {seen.teacher.name}")
    return longest


def _tokens_of(method: GenerativeMethod, role: str) -> AskedTokens:
    name, vocabulary = type(method).__name__, method.teachers[role].model.vocabulary
    if role != next(iter(method.teachers)):
        raise CacheError(f"teacher {role} of {name} has no answers to keep in this version: set cache: off")
    if method.teacher_top is None:
        raise CacheError(
            f"{name} reads the teacher's probabilities of all {vocabulary.size:,} tokens, and a cache holds those of "
            "the likeliest: set method.top_k (32 for example), or cache: off"
        )
    if method.teacher_needs != TokenNeeds():
        raise CacheError(
            f"{name}, as it is set, reads more of the teacher than its next-token distributions, and a cache holds no "
            "more in this version: set cache: off"
        )
    return AskedTokens(method.teacher_top, method.num_tokens or vocabulary.size)


def _one_sample(seen: Seen, model: DualEncoder) -> ModelInput:
    texts = seen.texts
    assert isinstance(texts, TextChoice)
    for index in range(min(len(seen.source), 1000)):
        try:
            sample = seen.source[index]
        except BadSampleError:
            continue
        if sample.captions or not texts.required:
            captions = sample.captions[:1] or ("",)
            reader = DualReader(model.image_spec, model.tokenizer)
            more = {pool: captions * count for pool, count in texts.counts.items()}
            return reader.input(model.image_spec.raw(sample.image)[None], captions, more).to(model.device)
    raise CacheError(f"none of the first samples of {seen.source.name} can be read")
