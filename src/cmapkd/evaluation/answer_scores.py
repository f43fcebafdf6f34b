"""The scores of what one model wrote on one source, picture by picture, in a small file.

As `PictureRanks` does for models that embed: `cmapkd compare` resamples the pictures, each with all its questions.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from cmapkd.config.disk import write_bytes
from cmapkd.evaluation.dialogues import Asked


@dataclass(frozen=True, slots=True)
class AnswerScore:
    """One score as a ratio of two sums over pictures.

    Attributes:
        digest: of the pictures' ids, what was asked and the references: scores of equal digests can be paired.
        sums: Float64[pictures], over what was asked of each picture, in the score's unit.
        weights: Float64[pictures], how much was asked of each: questions, or bytes.
    """

    digest: str
    sums: NDArray[Any]
    weights: NDArray[Any]

    @classmethod
    def of(cls, asked: Sequence[Asked], values: Sequence[float], weights: Sequence[float] | None = None) -> AnswerScore:
        """The score of everything that was asked.

        Args:
            values: of each; the score is their sum, divided by that of the weights.
            weights: of each; none: 1.
        """
        pictures, of_picture = np.unique([each.index for each in asked], return_inverse=True)
        named = [[each.sample, [turn.text for turn in each.prompt], each.references] for each in asked]
        digest = hashlib.sha256(json.dumps(named, ensure_ascii=False).encode("utf-8", "surrogatepass"))

        def summed(column: Sequence[float]) -> NDArray[Any]:
            return np.bincount(of_picture, weights=np.asarray(column, dtype=float), minlength=len(pictures))

        return cls(digest.hexdigest()[:32], summed(values), summed([1.0] * len(asked) if weights is None else weights))


def save_answer_scores(scores: Mapping[str, AnswerScore], path: str | Path) -> None:
    """Writes a safetensors file with 16 bytes a picture for each score.

    Args:
        scores: by the path of the score, such as `answering.overall`.
    Raises:
        DiskError: the disk refuses.
    """
    columns = {f"{name}:{key}": getattr(score, key) for name, score in scores.items() for key in ("sums", "weights")}
    write_bytes(Path(path), save(columns, metadata={name: score.digest for name, score in scores.items()}))


def load_answer_scores(path: str | Path) -> dict[str, AnswerScore]:
    """Reads what `save_answer_scores` wrote.

    Raises:
        ValueError: the file is damaged, or holds something else.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            digests = file.metadata() or {}
            scores = {
                name: AnswerScore(digest, file.get_tensor(f"{name}:sums"), file.get_tensor(f"{name}:weights"))
                for name, digest in digests.items()
            }
        for name, score in scores.items():
            if score.sums.dtype != np.float64 or score.sums.ndim != 1 or score.sums.shape != score.weights.shape:
                raise ValueError(f"{name} has sums of shape {score.sums.shape} and weights of {score.weights.shape}")
        return scores
    except (SafetensorError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{path} holds no scores of answers ({type(error).__name__}: {error}): remove it and measure again"
        ) from error
