"""Small caches of a small teacher that writes, over pictures with several questions each."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from cmapkd.cache import CacheConfig, CachePlan, CacheReader, all_keys
from cmapkd.data.batches import BatchBuilder
from cmapkd.data.plans import PlanSampler
from cmapkd.data.prompting import Prompting
from cmapkd.data.types import BadSampleError, Batch, QuestionAnswer, Sample
from cmapkd.data.views import ViewSpec
from cmapkd.methods.token_kd import TokenKD, TokenKDConfig
from cmapkd.models import FrozenTeacher
from cmapkd.models.config import ModelConfig
from cmapkd.models.hf_vlm import HfVlm
from cmapkd.models.reading import reader_of
from cmapkd.models.tiny_vlm_family import build

VIEWS = ViewSpec(crop_scale=(1.0, 1.0), num_views=2)
LENGTH = 9
COLOURS = ("red", "green", "blue")
SIZES = {"image_size": 16, "patch_size": 8, "vision_width": 16, "vision_layers": 1, "vision_heads": 2}
SIZES |= {"width": 16, "layers": 1, "heads": 2, "vocab_size": 300, "max_tokens": 64}


class Asked:
    """Pictures of noise with three questions each, whose answers have one to a few tokens."""

    name = "asked"
    class_names = None

    def __init__(self, length: int = LENGTH, *, bad: tuple[int, ...] = ()) -> None:
        self.length, self.bad = length, bad

    def __len__(self) -> int:
        return self.length

    def unseen(self, index: int) -> Sample:
        colour = COLOURS[index % 3]
        questions = (
            QuestionAnswer("what colour?", (colour,)),
            QuestionAnswer(f"is it {colour}?", ("yes",)),
            QuestionAnswer("what is there?", (f"a {colour} thing, number {index}",)),
        )
        return Sample(f"a{index}", Image.new("RGB", (1, 1)), self.captions(index), questions=questions)

    def __getitem__(self, index: int) -> Sample:
        if index in self.bad:
            raise BadSampleError(f"a{index}", "truncated: no end marker")
        pixels = np.random.default_rng(index).integers(0, 256, (20, 24, 3), dtype=np.uint8)
        sample = self.unseen(index)
        return Sample(sample.id, Image.fromarray(pixels), sample.captions, questions=sample.questions)

    def captions(self, index: int) -> tuple[str, ...]:
        return (f"a {COLOURS[index % 3]} thing",)

    def fingerprint(self) -> str:
        return f"asked-{self.length}"


@cache
def _words() -> tuple[str, ...]:
    return tuple(Prompting().vocabulary(Asked()))


def make_writer(*, width: int = 16, seed: int = 0, **options: Any) -> HfVlm:
    """A tiny model that writes, with random weights that are far from even."""
    config = ModelConfig(name="tiny_vlm:small", options={**SIZES, "width": width, **options})
    torch.manual_seed(seed)
    model = build("small", config, _words())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6.0 if parameter.dim() > 1 else 1.0)
    return model.eval()


def other_tokenizer() -> HfVlm:
    """A teacher whose tokens stand for other pieces of the same answers."""
    config = ModelConfig(name="tiny_vlm:small", options={**SIZES, "width": 24, "vocab_size": 340})
    torch.manual_seed(3)
    model = build("small", config, ["re d", "gr een", "blue thing, number"] * 3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6.0 if parameter.dim() > 1 else 1.0)
    return model.eval()


def token_kd(teacher: HfVlm | None = None, **settings: Any) -> TokenKD:
    config = TokenKDConfig(**{"top_k": 8, **settings})
    frozen = FrozenTeacher(teacher or make_writer(width=24, seed=7))
    return TokenKD(config, student=make_writer(seed=1), teacher=frozen)


def token_plan(folder: Path | None, method: Any, **changes: Any) -> CachePlan:
    """For every sample of `Asked` in both views; settings of the plan, or of its config."""
    source = changes.pop("source", None) or Asked()
    keys = changes.pop("keys", None)
    keys = all_keys(len(source), 2) if keys is None else keys
    texts, max_tokens = changes.pop("texts", Prompting()), changes.pop("max_tokens", None)
    config = CacheConfig(**{"folder": folder, "batch_size": 3, "shard_mib": 0.0001, **changes})
    return CachePlan.of_method(
        config, method, source=source, views=VIEWS, keys=keys, precision="fp32", texts=texts, max_tokens=max_tokens
    )


def built(folder: Path, method: Any, **changes: Any) -> CacheReader:
    plan = token_plan(folder, method, **changes)
    plan.build(device="cpu")
    return plan.open()


def batch_of(method: TokenKD, epoch: int, *, source: Any = None, stored: CacheReader | None = None) -> Batch:
    """Six samples in the view of an epoch, from stored answers of the teacher or for the live one."""
    source = source or Asked()
    assert method.teacher is not None
    models = {"student": method.student, "teacher": method.teacher.model}
    readers = {role: reader_of(model) for role, model in models.items()}
    answers = {} if stored is None else {"teacher": stored}
    builder = BatchBuilder(source, VIEWS, readers, seed=0, stored=answers, texts=Prompting())
    sampler = PlanSampler(len(source), batch_size=6, seed=0, start=0, stop=9)
    return builder[sampler.plan(epoch * sampler.steps_per_epoch)]
