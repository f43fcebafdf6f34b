"""A method without the trainer: a loss of pictures and texts, for a training loop of one's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from cmapkd.config import ConfigError, closest
from cmapkd.data.readers import DualReader
from cmapkd.data.templates import ClassPrompts, get_templates
from cmapkd.data.types import Batch, ModelInput
from cmapkd.methods import METHODS, DualEncoderMethod, Method, StepInfo, Term, build_method
from cmapkd.methods.terms import total_loss
from cmapkd.models import Classifier, DualEncoder, FrozenTeacher, Model, build_model, load_model
from cmapkd.models.contracts import dual
from cmapkd.models.embedding import Picture, opened

_LOOP = "a training loop of one's own"

Pixels = Float[Tensor, "batch 3 height width"] | UInt8[Tensor, "batch 3 height width"]


class Distiller(nn.Module):
    """A method as a plain module: called on pictures and their texts, it gives the loss of the batch.

    Its parameters are the student's and the method's own (projections, scales); the teachers are no submodules and
    follow the student to its device. Stages, micro-batches, averages and checkpoints belong to the trainer.

    Attributes:
        method: what computes the terms.
        student: what is trained, as the method holds it; `student.save(folder)` writes it.
        terms: of the last call, by name: raw value and weight.
    """

    def __init__(self, method: Method, *, total: int, seed: int) -> None:
        super().__init__()
        if method.more_views:
            raise ConfigError(
                f"this method reads further views of each picture ({', '.join(method.more_views)}), which a loop of "
                "one's own does not make: train it with cmapkd.distill"
            )
        if method.prepares:
            raise ConfigError(
                "this method builds targets of the teacher's answers to the training data before the first step, which "
                "a loop of one's own does not pass over: train it with cmapkd.distill"
            )
        self.method = method
        self.terms: dict[str, Term] = {}
        self._next = StepInfo(total=total, seed=seed)
        self._seen = 0

    @property
    def student(self) -> DualEncoder:
        return dual(self.method.student, _LOOP)

    def forward(
        self,
        images: Sequence[Picture] | Mapping[str, Pixels] | Pixels,
        texts: Sequence[str],
        *,
        ids: Sequence[str] | None = None,
        labels: Tensor | None = None,
        more_texts: Mapping[str, Sequence[Sequence[str]]] | None = None,
    ) -> Float[Tensor, ""]:
        """The loss of a batch: the sum of weight times value over the method's terms.

        Args:
            images: paths, bytes or PIL images, which every model preprocesses its own way; or pixels that are
                preprocessed already, by role (`{"student": ..., "teacher": ...}`), or one tensor where all models read
                the same pixels. Those in uint8 have the model's size and are normalised by it.
            texts: one of each picture.
            ids: name the samples; a method with a bank never compares a sample with itself. None: no picture returns.
            labels: class numbers, Int[batch], -1 where there is none; for methods that read them.
            more_texts: further texts of each picture by pool, for methods that read them (`synthetic`).
        Raises:
            ValueError: numbers of pictures, texts, ids or labels differ, or the method reads what was not given.
        """
        batch = self.batch(images, texts, ids=ids, labels=labels, more_texts=more_texts)
        device = self.method.device
        for teacher in self.method.teachers.values():
            if isinstance(teacher, FrozenTeacher) and teacher.model.device != device:
                teacher.to(device)
        self.terms = self.method(batch.to(device, non_blocking=True), self._next)
        if not self.terms:
            raise ValueError(f"method {type(self.method).__name__} has no terms: every weight is zero")
        return total_loss(self.terms)

    def after_step(self) -> None:
        """To be called after each optimizer step: keeps scales in their range, and counts the step."""
        self.method.after_step(self._next)
        done = self._next.step + 1
        self._next = replace(self._next, step=done, progress=min(done / self._next.total, 1.0))

    def batch(
        self,
        images: Sequence[Picture] | Mapping[str, Pixels] | Pixels,
        texts: Sequence[str],
        *,
        ids: Sequence[str] | None = None,
        labels: Tensor | None = None,
        more_texts: Mapping[str, Sequence[Sequence[str]]] | None = None,
    ) -> Batch:
        """What the method reads of the samples, on the CPU; arguments and errors as `forward` has them."""
        models = {"student": self.student} | {
            role: teacher.model for role, teacher in self.method.teachers.items() if teacher.reads == role
        }
        if isinstance(texts, str):
            raise ValueError("texts is one text: give a list with one text for each picture")
        size = len(texts)
        pixels = _pixels(images, models)
        pools = self._pools(more_texts or {}, size)
        spans = isinstance(self.method, DualEncoderMethod) and self.method.needs_spans
        inputs: dict[str, ModelInput] = {}
        for role, model in models.items():
            _check_size(f"images of the {role}", len(pixels[role]), size)
            inputs[role] = DualReader(model.image_spec, model.tokenizer, spans).input(pixels[role], list(texts), pools)
        if ids is None:
            ids = [f"own-{number}" for number in range(self._seen, self._seen + size)]
            self._seen += size
        _check_size("ids", len(ids), size)
        return Batch(tuple(ids), inputs, tuple(texts), extra=self._extras(labels, size))

    def _pools(self, given: Mapping[str, Sequence[Sequence[str]]], size: int) -> dict[str, list[str]]:
        """The texts of each pool that the method reads, those of a sample together."""
        pools = {}
        for pool, count in self.method.text_pools.items():
            if pool not in given:
                raise ValueError(
                    f"the method reads {count} {pool} texts of each picture: give more_texts={{{pool!r}: [[...], ...]}}"
                )
            _check_size(f"more_texts[{pool!r}]", len(given[pool]), size)
            for place, texts in enumerate(given[pool]):
                if len(texts) < count:
                    raise ValueError(
                        f"picture {place} has {len(texts)} {pool} texts, and the method reads {count} of each"
                    )
            pools[pool] = [text for texts in given[pool] for text in list(texts)[:count]]
        return pools

    def _extras(self, labels: Tensor | None, size: int) -> dict[str, Any]:
        """What the method reads besides pictures and texts; labels are all that a loop can give."""
        lacking = [name for name in self.method.extras if name != "labels"]
        if lacking:
            raise ConfigError(
                f"this method reads {', '.join(lacking)} of each sample, which a loop of one's own does not make: "
                "train it with cmapkd.distill"
            )
        if "labels" not in self.method.extras:
            return {}
        if labels is None:
            raise ValueError("the method reads labels: give labels=, class numbers with -1 where there is none")
        _check_size("labels", len(labels), size)
        return {"labels": labels}


def method(
    name: str,
    *,
    student: DualEncoder | str | Path,
    teacher: DualEncoder | FrozenTeacher | str | Path | None = None,
    classes: ClassPrompts | Sequence[str] | None = None,
    texts: Sequence[str] | None = None,
    total: int = 1,
    seed: int = 0,
    **settings: Any,
) -> Distiller:
    """A method as a module for a training loop of one's own.

    Args:
        name: of the method, as `cmapkd methods` lists them.
        student, teacher: models, or names and folders of models; the teacher is frozen.
        classes: names of the classes by label, for methods that read them; with prompts of your own a `ClassPrompts`.
        texts: captions of the training data, from which an untrained `tiny:` student learns its vocabulary; other
            students read none.
        total: optimizer steps of the run, for methods whose weights follow the progress.
        seed: of the random numbers that terms draw.
        settings: of the method, as they stand in a recipe: `feature_weight=16`.
    Raises:
        ConfigError: an unknown method, one of models that write, a model that writes, a wrong setting, or `texts` is
            one text.
        ValueError: the method needs a teacher and got none, or a model cannot be loaded.
    """
    if isinstance(texts, str):
        raise ConfigError("texts is one text: give a list of captions")
    if total < 1:
        raise ConfigError(f"total is {total}: give the number of optimizer steps, >= 1")
    if name not in METHODS:
        raise ConfigError(f"there is no method {name!r}{closest(name, METHODS)}. Known: {', '.join(METHODS)}.")
    if not issubclass(METHODS[name].reads, DualEncoder):
        trains = "classifiers" if METHODS[name].reads is Classifier else "models that write"
        raise ConfigError(
            f"method {name!r} trains {trains}, and a loop of one's own takes models that embed pictures and texts in "
            "this version: train it with cmapkd.distill"
        )
    config = METHODS[name].Config.from_mapping({"name": name, **settings}, where=f"method {name!r}")
    if config.reads_classes and not classes:
        raise ConfigError(f"method {name!r} with these settings reads the names of classes: give classes=[...]")
    prompts = classes if classes is None or isinstance(classes, ClassPrompts) else _photos_of(classes)
    frozen = teacher if teacher is None or isinstance(teacher, FrozenTeacher) else FrozenTeacher(_model(teacher))
    made = build_method(config, student=_model(student, texts), teacher=frozen, classes=prompts)
    return Distiller(made.train(), total=total, seed=seed)


def _photos_of(names: Sequence[str]) -> ClassPrompts:
    return ClassPrompts(tuple(names), get_templates("photo"))


def _model(model: Model | str | Path, texts: Sequence[str] | None = None) -> DualEncoder:
    if isinstance(model, Model):
        return dual(model, _LOOP)
    return dual(load_model(model) if Path(model).is_dir() else build_model(str(model), captions=texts), _LOOP)


def _pixels(
    images: Sequence[Picture] | Mapping[str, Pixels] | Pixels, models: Mapping[str, DualEncoder]
) -> dict[str, Pixels]:
    """The pixels of the main view for each role."""
    if isinstance(images, Tensor):
        images = dict.fromkeys(models, images)
    if isinstance(images, Mapping):
        for role, model in models.items():
            side = model.image_spec.size
            if role not in images:
                raise ValueError(
                    f"images has no pixels for the {role}: give one tensor for each of {', '.join(models)}"
                )
            if tuple(images[role].shape[1:]) != (3, side, side):
                raise ValueError(
                    f"the {role} reads pixels [batch 3 {side} {side}], and images has {list(images[role].shape)}: "
                    "give every model its own pixels by role, or give pictures"
                )
        return {role: images[role] for role in models}
    pictures = [opened(picture, place) for place, picture in enumerate(images)]
    made: dict[Any, Pixels] = {}
    for model in models.values():
        spec = model.image_spec
        if spec.raw_form not in made:
            made[spec.raw_form] = torch.stack([spec.raw(picture) for picture in pictures])
    return {role: made[model.image_spec.raw_form] for role, model in models.items()}


def _check_size(what: str, found: int, expected: int) -> None:
    if found != expected:
        raise ValueError(f"there are {found} {what} and {expected} texts: give as many of both")
