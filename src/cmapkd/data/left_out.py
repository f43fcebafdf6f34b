"""What a source leaves out because it says nothing."""

from __future__ import annotations

from cmapkd.data.parts import PartOfSource
from cmapkd.data.stored import StoredSource
from cmapkd.data.streams import JoinedSource
from cmapkd.data.types import Source


def without_caption(source: Source) -> int:
    """How many samples without caption were left out, where captions were required; of all sources of a joined one."""
    if isinstance(source, JoinedSource):
        return sum(map(without_caption, source.sources))
    if isinstance(source, PartOfSource):
        return without_caption(source.source)
    return source.num_without_caption if isinstance(source, StoredSource) else 0
