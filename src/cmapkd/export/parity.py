"""What a file gives beside what the model gives: cosines, largest error, scores; and the limits that refuse it."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float

from cmapkd.data.types import Source
from cmapkd.evaluation.headline import headlines
from cmapkd.evaluation.run import EvaluationConfig, evaluate
from cmapkd.export.check import ROUNDS
from cmapkd.export.overflow import write_watched
from cmapkd.export.probes import Case, Probes, picture_cases, text_cases
from cmapkd.export.towers import text_rules
from cmapkd.models import DualEncoder

_SECONDS = 900  # that a file may take to answer all cases
_WORST = 3  # samples that a message names


@dataclass(frozen=True, slots=True)
class Limits:
    """The largest loss that is accepted.

    Attributes:
        cosine: the lowest of any sample.
        noise: the largest `Parity.noise_to_spread`. It stands for the scores where none are measured.
        points: of a score.
    """

    cosine: float
    noise: float
    points: float

    def loosened(self, loss: float | None) -> Limits:
        """With `--accept-loss`: in percent of a cosine, and in points; the noise is stated and not limited."""
        if loss is None:
            return self
        return Limits(min(self.cosine, 1 - loss / 100), float("inf"), max(self.points, loss))


LIMITS = {
    "fp32": Limits(0.9999, 1e-4, 0.5),
    "fp16": Limits(0.999, 1e-2, 0.5),
    "int8-weights": Limits(0.95, 0.05, 1.0),
    "int8-calibrated": Limits(0.95, 0.05, 1.0),
}


@dataclass(frozen=True, slots=True)
class Parity:
    """One file beside the model.

    Attributes:
        cosine_min, cosine_mean: between a sample's embeddings by the file and by the model.
        largest_error: absolute, of any number of any embedding, before normalising.
        noise_to_spread: mean squared distance of the unit embeddings over their own variance. In a narrow space a
            cosine near 1 says little, and this is large.
        between_batches: 1 - cosine of a sample alone and among others, at most.
        worst: names of the samples with the lowest cosines, and those.
        milliseconds: median of a batch of one, the file's runtime on one thread.
        model_milliseconds: of the model in torch, on as many threads as torch has.
        computed_in: the numbers that the runtime chose, as it names them.
    """

    cosine_min: float
    cosine_mean: float
    largest_error: float
    noise_to_spread: float
    between_batches: float
    worst: tuple[tuple[str, float], ...]
    milliseconds: float
    model_milliseconds: float | None = None
    computed_in: str = "f32"

    def plain(self) -> dict[str, Any]:
        return asdict(self) | {"worst": [list(pair) for pair in self.worst]}


class ParityChecker:
    """The model's own answers, computed once, and the comparison of files with them.

    Args:
        model: as it was loaded. The exporter works on a copy: a reference that was changed for the export would agree
            with a wrong file.
        full_length: texts are given padded to `context_length` only.
    """

    def __init__(self, model: DualEncoder, probes: Probes, *, full_length: bool = False) -> None:
        pixels, pictures = picture_cases(model, probes)
        texts = [text for _, text in probes.texts]
        with torch.no_grad():
            image = model.encode_image(pixels).embedding
            text = torch.cat([model.encode_text(model.tokenizer([each])).embedding for each in texts])
            first = model.tokenizer(texts[:1])
            self._milliseconds = {
                "vision_model": median_milliseconds(lambda: model.encode_image(pixels[:1])),
                "text_model": median_milliseconds(lambda: model.encode_text(first)),
            }
        self._reference = {"vision_model": image.numpy(), "text_model": text.numpy()}
        self._cases = {
            "vision_model": pictures,
            "text_model": text_cases(model, text_rules(model), probes, full_length=full_length),
        }
        self._names = {
            "vision_model": [name for name, _ in probes.pictures],
            "text_model": [name for name, _ in probes.texts],
        }

    def compare(self, tower: str, path: Path, *, default: bool = False) -> Parity:
        """Runs the file in a process of its own and compares.

        Args:
            default: in the precision that the runtime chooses; else in float32.
        Raises:
            ValueError: the runtime refuses the file or ends on it, or an embedding is not finite.
        """
        answers, milliseconds, precision = run_apart(path, self._cases[tower], default=default)
        names, cases = self._names[tower], self._cases[tower]
        found = compare(self._reference[tower], cases, answers, names, path.name, milliseconds)
        return replace(found, model_milliseconds=self._milliseconds[tower], computed_in=precision)

    def largest_inside(self, tower: str, path: Path) -> float:
        """The largest absolute number that any operation of an fp32 file gives on all cases, or among its weights."""
        with tempfile.TemporaryDirectory(prefix="cmapkd-watched-") as folder:
            watched = Path(folder, path.name)
            weights = write_watched(path, watched)
            answers = run_apart(watched, self._cases[tower]).by_case
        return max(weights, *(float(each) for each in answers.values()))


def compare(
    reference: Float[np.ndarray, "samples dim"],
    cases: Sequence[Case],
    answers: Mapping[str, Float[np.ndarray, "batch dim"]],
    names: Sequence[str],
    file: str,
    milliseconds: float,
) -> Parity:
    """Every answer beside the row that it should be.

    Args:
        answers: by the name of the case.
        names: of the samples.
    Raises:
        ValueError: an answer has another shape, or is not finite; names the case and the samples.
    """
    cosines: dict[int, list[float]] = {}
    noise: list[float] = []
    largest = 0.0
    for case in cases:
        answer, wanted = answers[case.name].astype(np.float64), reference[case.rows].astype(np.float64)
        if answer.shape != wanted.shape:
            raise ValueError(f"{file} gives {answer.shape} for {case.name}, the model {wanted.shape}")
        broken = [names[row] for row, values in zip(case.rows, answer, strict=True) if not np.isfinite(values).all()]
        if broken:
            raise ValueError(
                f"{file} gives numbers that are not finite for {', '.join(broken[:_WORST])} ({case.name}): its "
                "precision is too small for this model. Leave that precision out."
            )
        ours, theirs = _unit(wanted), _unit(answer)
        for row, cosine in zip(case.rows, (ours * theirs).sum(-1), strict=True):
            cosines.setdefault(row, []).append(float(cosine))
        noise.extend(np.square(ours - theirs).sum(-1))
        largest = max(largest, float(np.abs(answer - wanted).max()))
    lowest = {row: min(values) for row, values in cosines.items()}
    units = _unit(reference.astype(np.float64))
    spread = float(np.square(units - units.mean(0)).sum(-1).mean())
    worst = sorted(lowest, key=lambda row: lowest[row])[:_WORST]
    return Parity(
        cosine_min=min(lowest.values()),
        cosine_mean=float(np.mean([value for values in cosines.values() for value in values])),
        largest_error=largest,
        noise_to_spread=float(np.mean(noise)) / spread if spread else float("inf"),
        between_batches=max(max(values) - min(values) for values in cosines.values()),
        worst=tuple((names[row], lowest[row]) for row in worst),
        milliseconds=round(milliseconds, 3),
    )


class Answers(NamedTuple):
    """What a file gives for each case; milliseconds of a batch of one; and the numbers that it was computed in."""

    by_case: dict[str, np.ndarray]
    milliseconds: float
    precision: str


_RUNTIMES = {".onnx": "onnxruntime", ".xml": "OpenVINO", ".pte": "ExecuTorch"}


def run_apart(path: Path, cases: Sequence[Case], *, default: bool = False) -> Answers:
    """Runs a file in a process of its own.

    Raises:
        ValueError: the runtime refuses the file, ends by a signal, or takes too long.
    """
    runtime = _RUNTIMES[path.suffix]
    with tempfile.TemporaryDirectory(prefix="cmapkd-parity-") as folder:
        inputs, outputs = Path(folder, "inputs.npz"), Path(folder, "outputs.npz")
        arrays: dict[str, Any] = {f"{case.name}|{name}": each for case in cases for name, each in case.feed.items()}
        np.savez(inputs, **arrays)
        command = [sys.executable, "-m", "cmapkd.export.check", str(path), str(inputs), str(outputs)]
        command += ["default"] if default else []
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
        except subprocess.TimeoutExpired:
            raise ValueError(f"{runtime} took more than {_SECONDS} s to run {path.name}") from None
        if done.returncode:
            how = f"ended by signal {-done.returncode}" if done.returncode < 0 else _last_line(done.stderr)
            raise ValueError(f"{runtime} does not run {path.name}: {how}")
        with np.load(outputs, allow_pickle=False) as found:
            answers = {case.name: found[case.name] for case in cases}
            return Answers(answers, float(found["ms"]), str(found["precision"]))


def judge(file: str, precision: str, parity: Parity, limits: Limits, *, scored: bool = False) -> None:
    """Refuses a file whose embeddings are too far from the model's.

    Args:
        scored: whether retrieval or zero-shot will be measured; the noise need not stand for them then.
    Raises:
        ValueError: names the worst samples, and what to do.
    """
    worst = "; ".join(f"{name} {cosine:.6f}" for name, cosine in parity.worst)
    way_out = f"Leave {precision} out, or state the loss: --accept-loss {max(0.01, 100 * (1 - parity.cosine_min)):.2g}"
    if not parity.cosine_min >= limits.cosine:  # NaN as well
        raise ValueError(
            f"{file} gives other embeddings than the model: cosine {parity.cosine_min:.6f} at worst, {precision} must "
            f"reach {limits.cosine:g}. The worst: {worst}. {way_out}"
        )
    if not scored and not parity.noise_to_spread <= limits.noise:
        raise ValueError(
            f"{file} may rank otherwise than the model: its errors are {parity.noise_to_spread:.2g} of the variance of "
            f"the embeddings, {precision} may have {limits.noise:g}. The worst: {worst}. Measure it with --data. "
            f"{way_out}"
        )


def median_milliseconds(run: Callable[[], object]) -> float:
    """Of a few calls."""
    times = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        run()
        times.append(1000 * (time.perf_counter() - started))
    return round(float(np.median(times)), 3)


def scores_of(model: DualEncoder, source: Source, *, batch_size: int = 64) -> dict[str, Any]:
    """Retrieval and zero-shot scores, as far as the source serves them."""
    return evaluate(model, source, EvaluationConfig(batch_size=batch_size), device="cpu")


def score_losses(model: Mapping[str, Any], file: Mapping[str, Any]) -> dict[str, float]:
    """Points that a file loses against the model, by the head of the score; negative where it gains."""
    own, theirs = headlines(model), headlines(file)
    return {headline.head: number - theirs[task][1] for task, (headline, number) in own.items() if task in theirs}


def judge_scores(precision: str, losses: Mapping[str, float], limits: Limits, source: str) -> None:
    """Refuses a precision that costs too many points.

    Raises:
        ValueError: names the scores, and what to do.
    """
    lost = {head: points for head, points in losses.items() if not points <= limits.points}
    if lost:
        told = ", ".join(f"{points:.2f} points of {head}" for head, points in lost.items())
        raise ValueError(
            f"{precision} loses {told} on {source}; it may lose {limits.points:g}. Leave {precision} out, or state the "
            f"loss: --accept-loss {max(lost.values()):.2g}"
        )


def _unit(rows: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(rows, axis=-1, keepdims=True)
    units: np.ndarray = rows / np.maximum(lengths, np.finfo(np.float64).tiny)
    return units


def _last_line(text: str) -> str:
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return lines[-1][:400] if lines else "it ended without a word"
