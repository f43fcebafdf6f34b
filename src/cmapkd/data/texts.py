"""Which of a sample's texts a batch brings: its caption, and one of each further pool that a method reads."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from cmapkd.config import ConfigError
from cmapkd.data.random import uniforms
from cmapkd.data.records import TEXT_POOLS
from cmapkd.data.types import BadSampleError, Sample, Source
from cmapkd.data.views import View

LOOKED_AT = 16  # samples in which a pool must be found at least once


@dataclass(frozen=True, slots=True)
class TextChoice:
    """A pure function of the sample and the number of its view, as the view is.

    Attributes:
        pools: further texts, one of each pool beside the caption.
        mix_synthetic: probability that a synthetic caption takes the place of the sample's own, where it has any.
        required: whether a sample must have a caption; if not, one that has none is shown with an empty text.
    """

    pools: tuple[str, ...] = ()
    mix_synthetic: float = 0.0
    required: bool = True

    @property
    def plain(self) -> bool:
        """Whether there is the sample's own caption and nothing else."""
        return not self.pools and not self.mix_synthetic

    def choose(self, sample: Sample, view: View, number: int) -> tuple[str, ...]:
        """The caption of this view, then one text of each pool.

        Raises:
            BadSampleError: the sample has no caption and must have one, or nothing in a pool.
        """
        captions = sample.captions or (() if self.required else ("",))
        if not captions:
            raise BadSampleError(sample.id, "no caption")
        if self.plain:
            return (view.choose(captions),)
        mixed, *places = uniforms(1 + len(self.pools), "texts", sample.id, number).tolist()
        synthetic = sample.texts.get("synthetic", ()) if mixed < self.mix_synthetic else ()
        chosen = [view.choose(synthetic or captions)]
        for pool, place in zip(self.pools, places, strict=True):
            texts = sample.texts.get(pool, ())
            if not texts:
                raise BadSampleError(sample.id, f"no {pool} caption, which this run reads")
            chosen.append(texts[int(place * len(texts))])
        return tuple(chosen)

    def describe(self) -> str:
        """Names the choice for a cache's identity."""
        return f"{','.join(self.pools)} mixed {self.mix_synthetic:g}"

    def check(self, source: Source) -> None:
        """Refuses data that seem to lack what is to be read.

        Raises:
            ConfigError: none of the first samples has a text of the pool.
        """
        needed = {*self.pools, *(("synthetic",) if self.mix_synthetic else ())}
        for pool in sorted(needed):
            if not any(sample.texts.get(pool) for sample in _readable(source, LOOKED_AT)):
                raise ConfigError(
                    f"this run reads {pool} captions, but none of the first {LOOKED_AT} samples of {source.name} has "
                    f"any: give them under the key {' or '.join(TEXT_POOLS[pool])} (docs/data.md), or set "
                    "method.synthetic=false and data.mix_synthetic=0"
                )


def joined(texts: Iterable[str]) -> str:
    """All texts of a sample as one, which names them in a cache; a single one is itself."""
    return "\0".join(texts)


def _readable(source: Source, count: int) -> Iterable[Sample]:
    for index in range(min(count, len(source))):
        try:
            yield source[index]
        except BadSampleError:
            continue
