"""Caption metrics as the COCO tool computes them (BLEU, METEOR, ROUGE-L, CIDEr-D, SPICE), and CLIPScore."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from cmapkd.config import closest
from cmapkd.evaluation import caption_tools
from cmapkd.evaluation.ranking import check_finite
from cmapkd.evaluation.tools import MissingToolError

METRICS = ("bleu", "meteor", "rouge_l", "cider", "spice")
CLIPSCORE_WEIGHT = 2.5

Tokens = Mapping[str, Sequence[str]]  # tokenised captions by image id, words joined by one blank
Scorer = Callable[[Tokens, Tokens], dict[str, tuple[float, list[float]]]]  # of references and predictions


@dataclass(frozen=True, slots=True)
class CaptionScores:
    """Caption metrics in the units of their papers: BLEU, METEOR, ROUGE-L and SPICE in [0, 1], CIDEr-D in [0, 10].

    Attributes:
        corpus: `bleu_1` to `bleu_4`, `meteor`, `rouge_l`, `cider`, `spice`: those that were asked for. BLEU and METEOR
            are computed over the counts of all images, the others are means over images.
        per_image: the same names, each with the score of every image by its id.
        num_images, num_references: how many were compared.
        num_empty: predictions without a single token after tokenisation; they stay in and score next to nothing.
    """

    corpus: dict[str, float]
    per_image: dict[str, dict[str, float]] = field(repr=False)
    num_images: int
    num_references: int
    num_empty: int

    def to_dict(self) -> dict[str, Any]:
        """Plain data without the single images, ready for JSON."""
        counts = {"num_images": self.num_images, "num_references": self.num_references, "num_empty": self.num_empty}
        return dict(self.corpus) | counts


def caption_scores(
    predictions: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
    *,
    metrics: Sequence[str] = ("bleu", "meteor", "rouge_l", "cider"),
    min_references: int = 1,
) -> CaptionScores:
    """Scores one caption for each image against its references, all tokenised by the Penn Treebank tokeniser.

    Args:
        predictions: the caption of each image, by image id.
        references: what people wrote of each image; exactly the images of `predictions`.
        metrics: some of `bleu`, `meteor`, `rouge_l`, `cider`, `spice`.
        min_references: references that every image must have; 5 for COCO and Flickr30k.
    Raises:
        ValueError: predictions and references are of different images, a caption is not text, a reference is empty or
            an image has too few, an unknown metric, or CIDEr over a single image, where all its weights are zero.
        MissingToolError: the extra `captions`, Java or SPICE's models are not installed; the message says what to do.
    Source: pycocoevalcap 1.2, the Python 3 form of tylin/coco-caption: BLEU with the closest reference length, METEOR
        1.5, ROUGE-L with beta 1.2, and CIDEr-D (which the tool calls CIDEr) with document frequencies of `references`.
    """
    _check(predictions, references, metrics, min_references)
    scorers = {metric: _scorer(metric) for metric in dict.fromkeys(metrics)}  # before the long part, if one is missing
    given = caption_tools.tokenise(references)
    if silent := [image for image, texts in given.items() if not any(texts)]:
        raise ValueError(f"{len(silent)} images have references of punctuation alone, the first {silent[0]!r}")
    said = caption_tools.tokenise({image: [predictions[image]] for image in references})
    corpus: dict[str, float] = {}
    per_image: dict[str, dict[str, float]] = {}
    for scorer in scorers.values():
        for name, (total, by_image) in scorer(given, said).items():
            corpus[name] = total
            per_image[name] = dict(zip(given, by_image, strict=True))
    return CaptionScores(
        corpus,
        per_image,
        num_images=len(given),
        num_references=sum(map(len, given.values())),
        num_empty=sum(not caption for (caption,) in said.values()),
    )


def _bleu(references: Tokens, predictions: Tokens) -> dict[str, tuple[float, list[float]]]:
    totals, by_image = _library("bleu.bleu", "Bleu")(4).compute_score(references, predictions, verbose=0)
    return {f"bleu_{n}": (float(totals[n - 1]), [float(score) for score in by_image[n - 1]]) for n in (1, 2, 3, 4)}


def _rouge(references: Tokens, predictions: Tokens) -> dict[str, tuple[float, list[float]]]:
    return {"rouge_l": _plain(*_library("rouge.rouge", "Rouge")().compute_score(references, predictions))}


def _cider(references: Tokens, predictions: Tokens) -> dict[str, tuple[float, list[float]]]:
    if len(references) < 2:
        raise ValueError(
            "cider weighs words by how rare they are among the images' references, so over 1 image every weight is "
            "zero: score at least two images together, or leave cider out of the metrics."
        )
    return {"cider": _plain(*_library("cider.cider", "Cider")().compute_score(references, predictions))}


def _spice(references: Tokens, predictions: Tokens) -> dict[str, tuple[float, list[float]]]:
    order = sorted(references)  # the library returns the images sorted
    total, scores = _library("spice.spice", "Spice")().compute_score(references, predictions)
    by_image = {image: float(parts["All"]["f"]) for image, parts in zip(order, scores, strict=True)}
    return {"spice": (float(total), [by_image[image] for image in references])}


def _plain(total: Any, by_image: Any) -> tuple[float, list[float]]:
    return float(total), [float(score) for score in by_image]


def _library(module: str, name: str) -> Any:
    return getattr(importlib.import_module(f"pycocoevalcap.{module}"), name)


def _scorer(metric: str) -> Scorer:
    folder = caption_tools.library_folder()
    if metric == "meteor":
        caption_tools.java()
    if metric == "spice":
        caption_tools.java()
        _check_spice_models(folder)
    scorers: dict[str, Scorer] = {
        "bleu": _bleu, "meteor": caption_tools.meteor, "rouge_l": _rouge, "cider": _cider, "spice": _spice
    }  # fmt: skip
    return scorers[metric]


def _check_spice_models(folder: Path) -> None:
    """The library would download them unasked."""
    for jar in ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar"):
        if not (folder / "spice" / "lib" / jar).is_file():
            raise MissingToolError(
                f"spice needs Stanford CoreNLP 3.6.0, and {jar} is not in pycocoevalcap's folder spice/lib. "
                "`python -m pycocoevalcap.spice.get_stanford_models` downloads it (about 400 MB); or leave spice out "
                "of the metrics."
            )


@dataclass(frozen=True, slots=True)
class ClipScores:
    """CLIPScore of every caption, and RefCLIPScore where references were given; 2.5 is the most a pair can reach.

    Attributes:
        clip_score: 2.5 x max(cosine of image and caption, 0), for each pair.
        ref_clip_score: harmonic mean of that and the largest cosine of caption and reference (0 if negative).
    """

    clip_score: Float[Tensor, " pairs"]
    ref_clip_score: Float[Tensor, " pairs"] | None

    def to_dict(self) -> dict[str, float]:
        """The means over all pairs."""
        scores = {"clip_score": float(self.clip_score.mean())}
        return scores if self.ref_clip_score is None else scores | {"ref_clip_score": float(self.ref_clip_score.mean())}


def clip_scores(
    images: Float[Tensor, "pairs dim"],
    captions: Float[Tensor, "pairs dim"],
    *,
    references: Float[Tensor, "references dim"] | None = None,
    pair_of_reference: Int[Tensor, " references"] | None = None,
) -> ClipScores:
    """CLIPScore and RefCLIPScore from embeddings of one joint space; which model scores is the caller's choice.

    The published numbers use CLIP ViT-B/32 and put `A photo depicts ` before every caption and reference.

    Args:
        images, captions: embeddings of each pair, of any length: they are normalised here.
        references: embeddings of the references of all pairs.
        pair_of_reference: the pair that each reference belongs to; every pair needs at least one.
    Raises:
        ValueError: the shapes differ, an embedding is not finite or all zero, or a pair has no reference.
    Source: Hessel et al. 2021, arXiv:2104.08718, section 3.
    """
    if images.shape != captions.shape or not len(images):
        raise ValueError(
            f"images have shape {tuple(images.shape)} and captions {tuple(captions.shape)}: CLIPScore needs one image "
            "embedding for each caption, in the same order and of one model, and at least one pair."
        )
    image, caption = _unit("image embeddings", images), _unit("caption embeddings", captions)
    score = CLIPSCORE_WEIGHT * (image * caption).sum(1).clamp_min(0)
    if references is None:
        return ClipScores(score, None)
    if pair_of_reference is None or pair_of_reference.shape != references.shape[:1]:
        raise ValueError(f"pair_of_reference must name the pair of each of the {len(references)} references")
    pair = pair_of_reference.long()
    missing = set(range(len(image))) ^ set(pair.tolist())
    if missing:
        raise ValueError(
            f"{len(missing)} pairs have no reference or do not exist, such as pair {min(missing)}: RefCLIPScore "
            f"needs a reference for each of the {len(image)} captions."
        )
    cosine = (_unit("reference embeddings", references) * caption[pair]).sum(1)
    nearest = torch.full_like(score, -torch.inf).scatter_reduce(0, pair, cosine, "amax").clamp_min(0)
    total = score + nearest
    harmonic = torch.where(total > 0, 2 * score * nearest / total.clamp_min(torch.finfo(total.dtype).tiny), 0.0)
    return ClipScores(score, harmonic)


def _unit(name: str, values: Float[Tensor, "count dim"]) -> Float[Tensor, "count dim"]:
    check_finite(name, values)
    zero = (values == 0).all(1).nonzero().flatten()
    if len(zero):
        raise ValueError(f"{len(zero)} of {len(values)} {name} are all zero, the first at row {int(zero[0])}")
    return F.normalize(values.float(), dim=-1)


def _check(
    predictions: Mapping[str, str], references: Mapping[str, Sequence[str]], metrics: Sequence[str], min_references: int
) -> None:
    if isinstance(metrics, str) or not metrics:
        raise ValueError(f"metrics must be one or more of {', '.join(METRICS)}; got {metrics!r}")
    for metric in metrics:
        if metric not in METRICS:
            raise ValueError(f"unknown metric {metric!r}{closest(metric, METRICS)}; known: {', '.join(METRICS)}")
    if min_references < 1:
        raise ValueError(f"min_references must be at least 1, got {min_references}")
    if not references:
        raise ValueError("there are no references: a caption is scored by what people wrote of its image.")
    if unknown := [image for image in predictions if image not in references]:
        raise ValueError(
            f"{len(unknown)} of {len(predictions)} predictions are for images without references, the first for "
            f"{unknown[0]!r}: predictions and references must be of the same split, with ids written alike."
        )
    if without := [image for image in references if image not in predictions]:
        raise ValueError(
            f"{len(without)} of {len(references)} images have no prediction, the first {without[0]!r}: caption all of "
            "them, or hand over the references of the captioned ones only and say so."
        )
    for image, caption in predictions.items():
        if not isinstance(caption, str):
            raise ValueError(f"the prediction for image {image!r} is not text but {str(caption)[:60]!r}")
    for image, given in references.items():
        if isinstance(given, str) or not all(isinstance(text, str) and text.strip() for text in given):
            raise ValueError(f"image {image!r} has an empty reference, or no list of texts: {str(given)[:60]!r}")
    if few := [image for image, given in references.items() if len(given) < min_references]:
        raise ValueError(
            f"{len(few)} of {len(references)} images have fewer than {min_references} references, the first "
            f"{few[0]!r} with {len(references[few[0]])}: scores against fewer references are lower and not comparable. "
            "Load all captions of every image, or lower min_references and say so."
        )
