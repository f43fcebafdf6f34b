"""The samples of a source that a run can ask about, as a source: those with a question in the share that is kept."""

from __future__ import annotations

from hashlib import blake2b

import torch

from cmapkd.config import ConfigError
from cmapkd.data.picked import PickedSource
from cmapkd.data.prompting import Prompting
from cmapkd.data.types import BadSampleError, Source
from cmapkd.data.unseen import unseen

MOST_READ = 1_000_000  # samples whose questions are read when a run begins


class AskedSource(PickedSource):
    """The samples that have a kept question, in their order. What is said of each sample is read once at the start.

    Unreadable samples stay: a run counts them as it does elsewhere.

    Args:
        stream: what stands before the ids where streams are joined, as `JoinedSource` writes it; none: nothing.
    Raises:
        ConfigError: too many samples to read, or none has a kept question.
    """

    def __init__(self, source: Source, prompting: Prompting, *, stream: str | None = None) -> None:
        if len(source) > MOST_READ:
            raise ConfigError(
                f"data.prompts.share reads the questions of all samples first, and {source.name} has {len(source):,}: "
                f"name at most {MOST_READ:,}, with ?limit={MOST_READ}"
            )
        self.prompting, self.stream = prompting, stream
        self.source = source  # which `_has` reads
        places = torch.tensor([place for place in range(len(source)) if self._has(place)], dtype=torch.int64)
        super().__init__(source, places)
        if not len(places):
            raise ConfigError(
                f"none of the {len(source)} samples of {source.name} has a question among the share of "
                f"{prompting.share:g} that is kept: raise data.prompts.share"
            )

    def _has(self, place: int) -> bool:
        try:
            sample = unseen(self.source, place)
        except BadSampleError:
            return True
        return self.prompting.has(sample if self.stream is None else sample.renamed(f"{self.stream}/{sample.id}"))

    def fingerprint(self) -> str:
        """Of the whole source, and of which questions are kept."""
        said = f"{self.source.fingerprint()}\0{self.prompting.kind}\0{self.prompting.share!r}\0{self.stream}"
        return blake2b(said.encode(), digest_size=16).hexdigest()


def asked(source: Source, prompting: Prompting | None, *, stream: str | None = None) -> Source:
    """The source itself, or where a share of its questions is kept and no others are asked, the samples with one."""
    if prompting is None or prompting.share == 1 or prompting.unanswered == "student":
        return source
    return AskedSource(source, prompting, stream=stream)
