"""Which of a sample's texts a batch brings: its caption, and some of each further pool that a method reads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from cmapkd.config import ConfigError, Registry
from cmapkd.data.random import key_of, uniforms
from cmapkd.data.records import TEXT_KEYS
from cmapkd.data.scenes.negatives import named_negatives, negatives_of
from cmapkd.data.sentences import PASSAGES, SENTENCES, passages_of, sentences_of
from cmapkd.data.types import BadSampleError, Sample, Source
from cmapkd.data.views import View

LOOKED_AT = 16  # samples in which a pool must be found at least once
NEGATIVES = "negatives"  # the pool of texts that are false of the sample
CAPTIONS = "captions"  # the pool of the sample's own captions beside the one that is shown

TextMaker = Callable[[Sample, str, int], Sequence[str]]
"""Sample, its caption in this view, and a 128-bit key for whatever is drawn, to texts: the same for the same three.

A sample of which no such text can be made has none: ().
"""

TEXT_MAKERS: Registry[TextMaker] = Registry(
    "cmapkd.texts", {NEGATIVES: negatives_of, SENTENCES: sentences_of, PASSAGES: passages_of}
)
"""Pools whose texts are made, by name. Where a sample brings texts of that pool itself, these are read instead."""


@dataclass(frozen=True, slots=True)
class TextChoice:
    """A pure function of the sample and the number of its view, as the view is.

    Attributes:
        pools: how many texts of each further pool a sample brings beside the caption; names alone: one of each.
        mix_synthetic: probability that a synthetic caption takes the place of the sample's own, where it has any.
        required: whether a sample must have a caption; if not, one that has none is shown with an empty text.
    Raises:
        ValueError: less than one text of a pool.
    """

    pools: Mapping[str, int] | Iterable[str] = field(default_factory=dict)
    mix_synthetic: float = 0.0
    required: bool = True

    def __post_init__(self) -> None:
        counts = dict(self.pools) if isinstance(self.pools, Mapping) else dict.fromkeys(self.pools, 1)
        for pool, count in counts.items():
            if count < 1:
                raise ValueError(f"{count} texts of pool {pool!r} are asked for: ask for at least 1")
        object.__setattr__(self, "pools", counts)

    @property
    def counts(self) -> Mapping[str, int]:
        """How many texts of each pool."""
        assert isinstance(self.pools, Mapping)
        return self.pools

    @property
    def plain(self) -> bool:
        """Whether there is the sample's own caption and nothing else."""
        return not self.pools and not self.mix_synthetic

    def choose(self, sample: Sample, view: View, number: int) -> tuple[str, ...]:
        """The caption of this view, then the texts of each pool.

        The texts of a pool differ where it has as many different ones; where it has fewer, they repeat in turn.

        Raises:
            BadSampleError: the sample has no caption and must have one, or nothing in a pool.
        """
        captions = sample.captions or (() if self.required else ("",))
        if not captions:
            raise BadSampleError(sample.id, "no caption")
        if self.plain:
            return (view.choose(captions),)
        mixed, *places = uniforms(1 + len(self.counts), "texts", sample.id, number).tolist()
        synthetic = sample.texts.get("synthetic", ()) if mixed < self.mix_synthetic else ()
        chosen = [view.choose(synthetic or captions)]
        for (pool, count), place in zip(self.counts.items(), places, strict=True):
            texts = texts_in(pool, sample, chosen[0], number)
            if not texts:
                raise BadSampleError(sample.id, f"no {pool} caption, which this run reads")
            chosen.append(texts[int(place * len(texts))])
            if count > 1:
                chosen += _more_of(texts, count, chosen[-1], "texts", sample.id, number, pool)
        return tuple(chosen)

    def columns(self, chosen: Sequence[tuple[str, ...]]) -> tuple[tuple[str, ...], dict[str, list[str]]]:
        """What `choose` chose for several samples: their captions, and by pool the texts of one after the other."""
        captions = tuple(texts[0] for texts in chosen)
        start, columns = 1, {}
        for pool, count in self.counts.items():
            columns[pool] = [text for texts in chosen for text in texts[start : start + count]]
            start += count
        return captions, columns

    def named(self, chosen: tuple[str, ...]) -> str:
        """See `joined`."""
        return joined(chosen)

    def describe(self) -> str:
        """Names the choice for a cache's identity."""
        pools = ",".join(pool if count == 1 else f"{pool}*{count}" for pool, count in self.counts.items())
        return f"{pools} mixed {self.mix_synthetic:g}"

    def check(self, source: Source) -> None:
        """Refuses data that seem to lack what is to be read.

        Raises:
            ConfigError: none of the first samples has a text of the pool.
        """
        needed = dict.fromkeys([*self.counts, *(("synthetic",) if self.mix_synthetic else ())])
        samples = list(_readable(source, LOOKED_AT)) if needed else []
        for pool in sorted(needed):
            if not any(texts_in(pool, sample, "".join(sample.captions[:1]), 0) for sample in samples):
                repair = "or set method.synthetic=false and data.mix_synthetic=0"
                raise ConfigError(
                    f"this run reads {pool} captions, but none of the first {LOOKED_AT} samples of {source.name} has "
                    f"any: give them under the key {' or '.join(TEXT_KEYS.get(pool, (pool,)))}"
                    + (f" and name it in the source, ?texts={pool}" if pool not in TEXT_KEYS else "")
                    + " (docs/data.md), "
                    + (repair if pool == "synthetic" else "or take a method that does not read them")
                )


def texts_in(pool: str, sample: Sample, caption: str, number: int) -> Sequence[str]:
    """The texts of a pool that a sample has beside `caption` in view `number`.

    `captions` are the sample's other captions, or `caption` where it has no other. Another pool is what the sample
    brings under this name, or what the maker of this name in `TEXT_MAKERS` makes of the caption.
    """
    if pool == CAPTIONS:
        return [text for text in sample.captions if text != caption] or sample.captions
    if texts := sample.texts.get(pool, ()):
        return texts
    if pool in TEXT_MAKERS:
        return TEXT_MAKERS[pool](sample, caption, _key(sample, number, pool))
    return ()


def false_texts(sample: Sample, caption: str, number: int) -> dict[str, str]:
    """The texts of the pool `negatives`, each with what kind it is of; the kind is empty where nobody knows it."""
    if not sample.texts.get(NEGATIVES):
        named = named_negatives(sample, caption, _key(sample, number, NEGATIVES))
        if named:
            return named
    return dict.fromkeys(texts_in(NEGATIVES, sample, caption, number), "")


def _key(sample: Sample, number: int, pool: str) -> int:
    """What a maker draws by."""
    return key_of("texts", sample.id, number, pool)


def joined(texts: Iterable[str]) -> str:
    """All texts of a sample as one, which names them in a cache; a single one is itself."""
    return "\0".join(texts)


def _more_of(texts: Sequence[str], count: int, first: str, *names: object) -> list[str]:
    """The second to the last of `count` texts, the first being known: others in an order of their own, then again."""
    others = [text for text in dict.fromkeys(texts) if text != first]
    draws = uniforms(len(others), *names, "more")
    order = [first, *(others[place] for place in draws.argsort(kind="stable").tolist())]
    return [order[place % len(order)] for place in range(1, count)]


def _readable(source: Source, count: int) -> Iterable[Sample]:
    for index in range(min(count, len(source))):
        try:
            yield source[index]
        except BadSampleError:
            continue
