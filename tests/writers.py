"""Tiny models that write, dialogues that live in memory, and methods over them, in one line each."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cmapkd.data.batches import BatchBuilder
from cmapkd.data.dialogues import Turn, join_items
from cmapkd.data.prompting import Prompting
from cmapkd.data.readers import Shared
from cmapkd.data.types import BadSampleError, Batch, Input, Sample
from cmapkd.data.views import WHOLE
from cmapkd.methods import METHODS, Method, build_method
from cmapkd.methods.generative import GenerativeMethod
from cmapkd.models import FrozenTeacher, ModelConfig, build_model
from cmapkd.models.generative import GenerativeModel
from cmapkd.models.linear_vlm import convert
from cmapkd.models.reading import reader_of
from cmapkd.training import OptimConfig, TrainConfig, Trainer
from helpers import make_model

WRITERS = tuple(name for name, kind in METHODS.items() if issubclass(kind.reads, GenerativeModel))
TEXTS = ("Is there a red circle?", "yes", "no", "How many squares?", "2", "a red circle and 2 blue squares")
STUDENT = {"image_size": 16, "vision_width": 16, "vision_layers": 1, "vision_heads": 2, "width": 16, "layers": 1}
TEACHER = {**STUDENT, "image_size": 24, "width": 24}


@cache
def _made(seed: int, extra: int, rows: int, options: tuple[tuple[str, Any], ...]) -> Any:
    settings = {"heads": 2, "vocab_size": 300, "max_tokens": 96, **dict(options)}
    config = ModelConfig(name="tiny_vlm:small", options=settings)
    torch.manual_seed(seed)
    model: Any = build_model(config, captions=list(TEXTS) * 4)
    if extra:
        like = copy.deepcopy(model)
        like.processor.native.tokenizer.add_tokens([f"quagga{number}" for number in range(extra)])
        model = build_model(config, captions=None, teacher=like)
    model.model.resize_token_embeddings(model.vocabulary.size + rows, mean_resizing=False)
    with torch.no_grad():
        for parameter in model.parameters():  # off their neutral starts, so that mistakes show
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return rebuilt(model)


def rebuilt(model: Any) -> Any:
    """The same model around a head of another size."""
    return type(model)(model.model, processor=model.processor, name=model.name)


def make_writer(*, seed: int = 0, extra: int = 0, rows: int = 5, **options: Any) -> Any:
    """A student in float64, whose head has `rows` more rows than there are tokens.

    Args:
        extra: tokens that no other model here has, after the common ones.
        options: of `tiny_vlm`.
    """
    return copy.deepcopy(_made(seed, extra, rows, tuple({**STUDENT, **options}.items()))).double()


def make_converted(**options: Any) -> Any:
    """A student in float64 whose layers have linear attention, all off their neutral starts; see `make_writer`."""
    shape = {key: options.pop(key) for key in ("layers", "mixer", "convolution", "seeded") if key in options}
    model = make_writer(**{"layers": 2, **options})
    torch.manual_seed(3)
    numbers = shape.pop("layers", range(len(model.layers)))
    converted = convert(model, [*numbers], **{"mixer": "mamba2", "convolution": 2, **shape})
    with torch.no_grad():
        for part in ("mixers", "mixer_inputs"):
            for name in sorted(converted.parts[part]):
                parameter = converted.get_parameter(name)
                parameter.add_(0.1 * torch.randn(parameter.shape, dtype=parameter.dtype))
    return converted.eval()


def make_student(name: str) -> Any:
    """A student in float64 that this method takes."""
    return make_converted() if name == "linearize" else make_writer()


def make_judge(*, seed: int = 7, extra: int = 0, rows: int = 2, **options: Any) -> FrozenTeacher:
    """A teacher in float64 of another image size, width and number of visual tokens."""
    return FrozenTeacher(make_writer(seed=seed, extra=extra, rows=rows, **{**TEACHER, **options}))


@cache
def _other() -> Any:
    settings = {"heads": 2, "vocab_size": 340, "max_tokens": 96, **TEACHER}
    torch.manual_seed(5)
    texts = ["re d", "gr een and bl ue", "squa res, cir cle", "ye s and n o"]
    model: Any = build_model(ModelConfig(name="tiny_vlm:small", options=settings), captions=texts * 4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


def make_other() -> FrozenTeacher:
    """A teacher in float64 whose tokenizer was learned from other texts."""
    return FrozenTeacher(copy.deepcopy(_other()).double())


def make_seer(**options: Any) -> FrozenTeacher:
    """A teacher in float64 that embeds pictures and texts."""
    role = options.pop("role", "teacher")
    return FrozenTeacher(make_model(**{"dim": 24, "image_size": 24, "seed": 7, **options}).double(), role)


class Dialogues:
    """Noise pictures, each with a question whose answers differ in length; a pure function of the index."""

    name = "dialogues"
    class_names = None

    def __init__(self, length: int = 24, *, bad: Sequence[int] = ()) -> None:
        self.length, self.bad = length, set(bad)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        if index in self.bad:
            raise BadSampleError(f"d{index}", "truncated: no end marker")
        draws = np.random.default_rng(index)
        image = Image.fromarray(draws.integers(0, 256, (20, 26, 3), dtype=np.uint8))
        answer = " ".join(draws.choice(TEXTS[1:], 1 + index % 3))
        worse = " ".join(draws.choice(TEXTS[1:], 1 + (index + 1) % 3))
        turns = (Turn("user", TEXTS[0], int(index % 4 != 3)), Turn("assistant", answer, rejected=worse))
        return Sample(f"d{index}", image, turns=turns)

    def captions(self, index: int) -> tuple[str, ...]:
        return ()

    def fingerprint(self) -> str:
        return f"dialogues-{self.length}"


def make_task(
    name: str = "sft",
    *,
    student: Any = None,
    teacher: FrozenTeacher | None = None,
    more_teachers: Sequence[FrozenTeacher] = (),
    **settings: Any,
) -> GenerativeMethod:
    """A method over models that write, in training; its teacher writes or embeds, as the method reads it."""
    kind = METHODS[name]
    config = kind.Config.from_mapping({"name": name, **settings})
    student = student or make_student(name)
    if teacher is None and name == "linearize":
        teacher = FrozenTeacher(make_writer(seed=7, layers=len(student.layers)))
    elif teacher is None and kind.uses_teacher:
        teacher = make_judge() if kind.learns_from is None else make_seer()
    torch.manual_seed(11)  # of modules that the method has of its own
    method = build_method(config, student=student, teacher=teacher, more_teachers=more_teachers)
    assert isinstance(method, GenerativeMethod)
    for module in method.children():
        module.to(next(student.parameters()).dtype)
    return method.train()


def batch_of(method: Method, which: Sequence[int] = range(6)) -> Batch:
    """Some of the `Dialogues`, as each model of the method reads them."""
    models = {"student": method.student} | {role: teacher.model for role, teacher in method.teachers.items()}
    samples = [Dialogues()[number] for number in which]
    inputs: dict[str, Input] = {}
    for role, model in models.items():
        if not isinstance(model, GenerativeModel):
            seen: Any = reader_of(model)  # type: ignore[arg-type]
            pixels = [seen.read(each.image, None, ()) for each in samples]
            read = seen.join(pixels, [""] * len(samples), {}, {}, Shared())
            of_type = next(model.parameters()).dtype  # type: ignore[union-attr]
            inputs[role] = replace(read, images=model.image_spec.to_model(read.images).to(of_type))  # type: ignore[union-attr]
            continue
        reader: Any = model.processor
        items = [reader.read(each.turns, [each.image][: each.turns[0].pictures]) for each in samples]
        inputs[role] = join_items(items, reader.pad_id)
    return Batch(tuple(each.id for each in samples), inputs, ("",) * len(samples))


def loss_of(terms: Any) -> Tensor:
    return torch.stack([term.weight * term.value for term in terms.values()]).sum()


def results(method: GenerativeMethod, batch: Batch | None = None, micro_batch: int | None = None) -> dict[str, Tensor]:
    """Terms, and the gradients of what learns."""
    method.micro_batch = micro_batch
    terms = method(batch_of(method) if batch is None else batch)
    loss_of(terms).backward()
    values = {f"term/{name}": term.value.detach() for name, term in terms.items()}
    found = {name: parameter.grad for name, parameter in method.named_parameters() if parameter.grad is not None}
    return values | {f"gradient/{name}": gradient for name, gradient in found.items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-9) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        error = float((found[key] - value).abs().max()) / max(1.0, float(value.abs().max()))
        assert error < tolerance, f"{key}: {error}"


def make_run(out: Path, method: GenerativeMethod, *, steps: int = 6, source: Any = None, **training: Any) -> Trainer:
    """A trainer of few small steps; `training` goes to `TrainConfig`."""
    out.mkdir(parents=True, exist_ok=True)
    models = {"student": method.student} | {role: teacher.model for role, teacher in method.teachers.items()}
    readers = {role: reader_of(model) for role, model in models.items()}  # type: ignore[arg-type]
    for teacher in method.teachers.values():
        if not isinstance(teacher.model, GenerativeModel):
            teacher.model.float()  # pixels of batches are
    builder = BatchBuilder(source or Dialogues(), WHOLE, readers, seed=5, texts=Prompting("turns"))
    defaults = {"steps": steps, "batch_size": 4, "log_every": 1, "checkpoint_every": 100}
    # eps: with a small one AdamW makes large steps of rounding errors
    optim = OptimConfig(warmup_steps=2, schedule="constant", eps=1e-2)
    return Trainer(method, builder, TrainConfig(**{**defaults, **training}), optim, out=out, seed=5, max_bad_share=1.0)
