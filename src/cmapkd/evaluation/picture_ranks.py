"""The ranks of one model's right answers on one source, picture by picture, in a small file.

Scores say how good a model is on these pictures. Ranks by picture also say how much another draw of pictures would
change a score, or the difference of two models. `cmapkd compare` resamples them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor

from cmapkd.config.disk import write_bytes
from cmapkd.evaluation.embed import Embedded
from cmapkd.evaluation.ranking import RankCounts

MAX_PICTURES = 250_000
"""Of larger sources nothing is kept: chance of pictures is small there, and the file would be large."""

_COUNTS = ("better", "equal_negatives", "equal_positives")
_USUAL = {"equal_negatives": 0, "equal_positives": 1}  # where nothing ties; such a column is not stored


@dataclass(frozen=True, slots=True)
class PictureRanks:
    """Ranks by picture.

    Attributes:
        digest: of the pictures' ids and captions, in order: ranks of equal digests can be paired.
        captions: how many captions each picture has; the captions are in the order of the pictures.
        labelled: which pictures have a label.
        ranks: `i2t`, one query for each picture with a caption; `t2i`, one for each caption; `zero_shot` and
            `accuracy`, one for each labelled picture. What was not measured is absent.
    """

    digest: str
    captions: Int[Tensor, " pictures"]
    labelled: Bool[Tensor, " pictures"]
    ranks: dict[str, RankCounts] = field(default_factory=dict)

    @classmethod
    def of(cls, embedded: Embedded, ranks: Mapping[str, RankCounts]) -> PictureRanks:
        """The ranks of a source's pictures.

        Args:
            embedded: the source; its captions stand picture by picture.
            ranks: by task, as the tasks left them in `Subject.ranks`.
        """
        captions = embedded.image_of_text.bincount(minlength=len(embedded.ids))
        names = json.dumps([embedded.ids, embedded.captions], ensure_ascii=False).encode("utf-8", "surrogatepass")
        digest = hashlib.sha256(names + captions.numpy().tobytes()).hexdigest()[:32]
        return cls(digest, captions, embedded.labels >= 0, dict(ranks))

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file: whole numbers, each column as narrow as its largest value allows.

        One column of `captions`, and for each task one to three of counts: what ties with nothing needs one. With five
        captions a picture and up to 65,535 candidates, a picture takes up to 16 bytes without ties, and 30 with them.

        Raises:
            DiskError: the disk refuses.
        """
        columns = {"captions": _narrow(self.captions), "labelled": _narrow(self.labelled)}
        for task, counts in self.ranks.items():
            for name in _COUNTS:
                column = getattr(counts, name)
                if name not in _USUAL or bool((column != _USUAL[name]).any()):
                    columns[f"{task}.{name}"] = _narrow(column)
        write_bytes(Path(path), save(columns, metadata={"digest": self.digest}))

    @classmethod
    def load(cls, path: str | Path) -> PictureRanks:
        """Reads what `save` wrote.

        Raises:
            ValueError: the file is damaged, or holds something else.
        """
        try:
            with safe_open(path, framework="numpy") as file:
                columns = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                metadata = file.metadata() or {}
            captions, labelled = _wide(columns["captions"]), _wide(columns["labelled"]).bool()
            if captions.ndim != 1 or captions.shape != labelled.shape:
                raise ValueError(f"captions have shape {tuple(captions.shape)}, labelled {tuple(labelled.shape)}")
            lengths = {"i2t": int((captions > 0).sum()), "t2i": int(captions.sum())}
            lengths |= dict.fromkeys(("zero_shot", "accuracy"), int(labelled.sum()))
            ranks = {
                task: _counts(columns, task, size) for task, size in lengths.items() if f"{task}.better" in columns
            }
            return cls(metadata["digest"], captions, labelled, ranks)
        except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"{path} holds no ranks of pictures ({type(error).__name__}: {error}): remove it and measure again"
            ) from error


def _counts(columns: Mapping[str, NDArray[Any]], task: str, size: int) -> RankCounts:
    counts = {
        name: _wide(columns[key]) if (key := f"{task}.{name}") in columns else torch.full((size,), _USUAL[name])
        for name in _COUNTS
    }
    for name, values in counts.items():
        if values.shape != (size,):
            raise ValueError(f"{task}.{name} has shape {tuple(values.shape)} for {size} queries")
    return RankCounts(**counts)


def _narrow(values: Tensor) -> NDArray[Any]:
    """As the narrowest of unsigned 8, 16 and 32 bits."""
    array = values.cpu().numpy().astype(np.int64)
    largest = int(array.max(initial=0))
    return array.astype(np.uint8 if largest < 2**8 else np.uint16 if largest < 2**16 else np.uint32)


def _wide(values: NDArray[Any]) -> Tensor:
    if values.dtype.kind != "u":
        raise ValueError(f"a column of {values.dtype}, not of unsigned whole numbers")
    return torch.from_numpy(values.astype(np.int64))
