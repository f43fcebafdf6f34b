"""Task `vqa`: a fusion classifier on the encoder answers the source's questions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cmapkd.data.types import QuestionAnswer
from cmapkd.evaluation.probes.config import VQAConfig
from cmapkd.evaluation.probes.data import Annotations, ProbeBatches
from cmapkd.evaluation.probes.features import encode_texts, patch_level, text_level
from cmapkd.evaluation.probes.fusion import FusionHead, answer_shares, frequent_answers
from cmapkd.evaluation.probes.probe import HeadInput, Probe
from cmapkd.evaluation.probes.train import scored_images, train_probe
from cmapkd.evaluation.subject import Subject
from cmapkd.evaluation.tasks.base import Column, Task
from cmapkd.evaluation.vqa import normalise_answer, vqa_scores
from cmapkd.models.base import DualEncoder


class VQA(Task):
    title = "Question answering by a probe, accuracy in percent"
    Settings = VQAConfig
    settings: VQAConfig
    trains = True
    columns = (
        Column("overall", ("overall",)),
        Column("yes/no", ("by_kind", "yes/no")),
        Column("number", ("by_kind", "number")),
        Column("other", ("by_kind", "other")),
        Column("always the commonest", ("prior",)),
    )

    def missing(self, subject: Subject) -> str | None:
        if not any(sample.questions for sample in subject.bench.first_samples):
            return f"none of its first {len(subject.bench.first_samples)} samples has a question"
        text_level(subject.dual)
        return None

    def score(self, subject: Subject) -> dict[str, Any]:
        bench, config = subject.bench, self.settings
        train, scored = _Questions(bench.train_annotations), _Questions(bench.annotations)
        if not train.all or not scored.all:
            where = bench.train if not train.all else bench.source
            raise ValueError(f"{where.name if where else 'the source'} has no question with an answer")
        answers = frequent_answers(train.all, most=config.answers, normalise=normalise_answer)
        numbers, shares = answer_shares(train.all, answers, normalise=normalise_answer)
        learnable = (shares.sum(1) > 0).nonzero().flatten()
        frozen = not config.fine_tune
        features = subject.image_features("train")

        def batches(encoder: DualEncoder) -> ProbeBatches:
            return ProbeBatches(
                train.image_of[learnable],
                lambda _epoch, places: {"answers": numbers[learnable[places]], "shares": shares[learnable[places]]},
                ids=bench.train_annotations.ids,
                features=features if frozen else None,
                text_of_example=train.text_of[learnable],
                text_features=encode_texts(
                    encoder, train.texts, batch_size=bench.config.batch_size, device=bench.device
                )
                if frozen
                else None,
                model=None if frozen else encoder,
                pictures=bench.train,
                indices=bench.train_annotations.indices,
                texts=train.texts,
            )

        def head() -> FusionHead:
            return FusionHead(
                patch_width=patch_level(subject.dual).width,
                embed_dim=subject.dual.embed_dim,
                cells=features.patches.shape[1],
                text_width=text_level(subject.dual).width,
                answers=len(answers),
                width=config.width,
                depth=config.depth,
            )

        probe = train_probe("vqa", subject, config, head, batches)
        predicted = [answers[number] for number in _answer(probe, subject, scored, config).tolist()]
        commonest = answers[0]
        result = _accuracies(predicted, scored.all)
        return result | {
            "prior": _accuracies([commonest] * len(scored.all), scored.all)["overall"],
            "commonest": commonest,
            "num_questions": len(scored.all),
            "num_answers": len(answers),
            "train_questions": len(learnable),
            "train_images": len(bench.train_annotations),
        }


class _Questions:
    """Every question of the annotations that has an answer, and each different text once."""

    def __init__(self, annotations: Annotations) -> None:
        asked = [(row, q) for row, questions in enumerate(annotations.questions) for q in questions if q.answers]
        self.all: list[QuestionAnswer] = [question for _, question in asked]
        self.image_of = torch.tensor([row for row, _ in asked], dtype=torch.long)
        place = {text: number for number, text in enumerate(dict.fromkeys(q.question for q in self.all))}
        self.texts = list(place)
        self.text_of = torch.tensor([place[q.question] for q in self.all], dtype=torch.long)


@torch.no_grad()
def _answer(probe: Probe, subject: Subject, questions: _Questions, config: VQAConfig) -> Tensor:
    """The most probable answer of every question."""
    bench = subject.bench
    images = scored_images(probe, subject, config)
    texts = encode_texts(probe.student, questions.texts, batch_size=bench.config.batch_size, device=bench.device)
    chosen = []
    for first in range(0, len(questions.all), bench.config.batch_size):
        rows = questions.image_of[first : first + bench.config.batch_size]
        asked = questions.text_of[first : first + bench.config.batch_size]
        inputs = HeadInput(
            images.patches[rows].float().to(bench.device),
            images.embeddings[rows].to(bench.device),
            texts.tokens[asked].float().to(bench.device),
            texts.mask[asked].to(bench.device),
            texts.embeddings[asked].to(bench.device),
        )
        chosen.append(probe.head(inputs).argmax(-1).cpu())
    return torch.cat(chosen)


def _accuracies(predicted: Sequence[str], questions: Sequence[QuestionAnswer]) -> dict[str, Any]:
    numbered = {str(number): question for number, question in enumerate(questions)}
    scores = vqa_scores(
        dict(zip(numbered, predicted, strict=True)),
        {number: question.answers for number, question in numbered.items()},
        kinds={number: question.kind for number, question in numbered.items()},
    )
    return {"overall": scores.overall, "by_kind": scores.by_kind}
