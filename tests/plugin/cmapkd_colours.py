"""A method, a source and a task for cmapkd, from outside of it."""

import torch.nn.functional as F
from PIL import Image
from pydantic import Field

from cmapkd.config import Config
from cmapkd.data.spec import Spec
from cmapkd.data.types import Batch, Sample
from cmapkd.evaluation.subject import Subject
from cmapkd.evaluation.tasks import Column, Headline, Task
from cmapkd.methods import DualEncoderMethod, MethodCard, MethodConfig, Term, task_loss

COLOURS = ("red", "green", "blue", "yellow", "black", "white")


def cosines(features):
    image, text = (F.normalize(tower.embedding, dim=-1) for tower in (features.image, features.text))
    return image @ text.T  # of every image with every text


class SimilarityConfig(MethodConfig):
    similarity_weight: float = Field(10.0, ge=0, description="Weight of the squared distance of similarities.")


class SimilarityKD(DualEncoderMethod):
    Config = SimilarityConfig
    card = MethodCard(
        title="Similarities of images and texts",
        paper="none",
        equations=("L = contrastive + w mean((s - t)^2), s and t the cosines of all images and texts",),
        needs="embeddings of both models",
        trainable="the student",
        departures=(),
        checked_against="nothing",
    )

    def __init__(self, config, **models):
        super().__init__(config, **models)
        self.weights = {"contrastive": 1.0, "similarity": config.similarity_weight}

    def terms(self, batch: Batch) -> dict[str, Term]:
        student, teacher = self.encode_student(batch), self.encode_teacher(batch)
        own, their = (cosines(features) for features in (student, teacher))
        return self.weighted({"contrastive": task_loss(student), "similarity": (own - their).square().mean()})


class Colours:
    """Pictures of one colour: a pure function of the position."""

    name, class_names = "colours", COLOURS

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        label = index % len(COLOURS)
        return Sample(f"c{index}", Image.new("RGB", (32, 32), COLOURS[label]), self.captions(index), label=label)

    def captions(self, index: int) -> tuple[str, ...]:
        return (f"a {COLOURS[index % len(COLOURS)]} picture",)

    def fingerprint(self) -> str:
        return f"colours-{self.length}"


def open_colours(spec: Spec) -> Colours:
    length = spec.take_int("length") or 60
    spec.refuse_leftovers(("length",))
    return Colours(min(length, spec.keep.limit or length))


class OwnCaptionSettings(Config):
    margin: float = Field(0.0, ge=0, description="How much nearer than the mean of all captions the own one must be.")


class OwnCaption(Task):
    """How often an image is nearer to its own caption than to the captions' mean."""

    title = "Own caption nearer than the mean, percent"
    Settings = OwnCaptionSettings
    alone = True
    headline = Headline("own_caption", ("share",), "own caption")
    columns = (Column("share", ("share",)),)

    def score(self, subject: Subject) -> dict[str, float]:
        found = subject.embedded
        image = found.images[found.image_of_text]
        own, mean = (image * found.texts).sum(1), image @ found.texts.mean(0)
        return {"share": 100 * float((own > mean + self.settings.margin).float().mean())}
