"""Task `captioning`: a small decoder on the encoder writes captions, scored against the source's own."""

from __future__ import annotations

from typing import Any

import torch

from cmapkd.data.random import uniforms
from cmapkd.evaluation import caption_tools
from cmapkd.evaluation.captioning import caption_scores
from cmapkd.evaluation.probes.config import CaptioningConfig
from cmapkd.evaluation.probes.data import ProbeBatches
from cmapkd.evaluation.probes.decoder import DecoderHead, WordTokenizer
from cmapkd.evaluation.probes.features import patch_level
from cmapkd.evaluation.probes.probe import HeadInput
from cmapkd.evaluation.probes.train import scored_images, train_probe
from cmapkd.evaluation.subject import Subject
from cmapkd.evaluation.tasks.base import Column, Task
from cmapkd.evaluation.tools import MissingToolError
from cmapkd.models.base import DualEncoder


class Captioning(Task):
    title = "Captioning by a probe, times 100"
    Settings = CaptioningConfig
    settings: CaptioningConfig
    trains = True
    columns = (
        Column("BLEU-1", ("shown", "bleu_1")),
        Column("BLEU-4", ("shown", "bleu_4")),
        Column("METEOR", ("shown", "meteor")),
        Column("ROUGE-L", ("shown", "rouge_l")),
        Column("CIDEr-D", ("shown", "cider")),
    )

    def missing(self, subject: Subject) -> str | None:
        if not any(sample.captions for sample in subject.bench.first_samples):
            return f"none of its first {len(subject.bench.first_samples)} samples has a caption"
        try:  # before a head is trained for nothing
            caption_tools.library_folder()
            caption_tools.java()
        except MissingToolError as error:
            return str(error)
        return None

    def score(self, subject: Subject) -> dict[str, Any]:
        bench, config = subject.bench, self.settings
        train, scored = bench.train_annotations, bench.annotations
        captioned = [row for row, captions in enumerate(train.captions) if captions]
        asked = [row for row, captions in enumerate(scored.captions) if captions]
        if not captioned or not asked:
            where = bench.train if not captioned else bench.source
            raise ValueError(f"{where.name if where else 'the source'} has no captions")
        words = WordTokenizer(
            (c for captions in train.captions for c in captions), most=config.words, length=config.length
        )
        written = [words(train.captions[row]) for row in captioned]
        starts = [uniforms(1, "caption", train.ids[row])[0] for row in captioned]
        features = subject.image_features("train")

        def targets(epoch: int, places: torch.Tensor) -> dict[str, torch.Tensor]:
            """Each epoch shows an image with its next caption, from a first one that its id decides."""
            rows = [written[p][(int(starts[p] * len(written[p])) + epoch) % len(written[p])] for p in places.tolist()]
            return {"words": torch.stack(rows)}

        def batches(encoder: DualEncoder) -> ProbeBatches:
            return ProbeBatches(
                torch.tensor(captioned),
                targets,
                ids=train.ids,
                features=None if config.fine_tune else features,
                model=encoder if config.fine_tune else None,
                pictures=bench.train,
                indices=train.indices,
            )

        def make_head() -> DecoderHead:
            return DecoderHead(
                patch_width=patch_level(subject.dual).width,
                embed_dim=subject.dual.embed_dim,
                cells=features.patches.shape[1],
                words=len(words),
                length=config.length,
                width=config.width,
                depth=config.depth,
            )

        probe = train_probe("captioning", subject, config, make_head, batches)
        head = probe.head
        assert isinstance(head, DecoderHead)
        images = scored_images(probe, subject, config)
        predictions: dict[str, str] = {}
        for first in range(0, len(asked), bench.config.batch_size):
            rows = asked[first : first + bench.config.batch_size]
            inputs = HeadInput(images.patches[rows].float().to(bench.device), images.embeddings[rows].to(bench.device))
            for row, ids in zip(rows, head.write(inputs, length=config.length), strict=True):
                predictions[scored.ids[row]] = words.text(ids)
        references = {scored.ids[row]: list(scored.captions[row]) for row in asked}
        return _scores(predictions, references) | {
            "num_images": len(asked),
            "num_words": len(words),
            "train_images": len(captioned),
            "examples": dict(list(predictions.items())[:3]),
        }


def _scores(predictions: dict[str, str], references: dict[str, list[str]]) -> dict[str, Any]:
    scores = caption_scores(predictions, references).to_dict()
    shown = {name: 100 * value for name, value in scores.items() if not name.startswith("num_")}
    return scores | {"shown": shown}
