"""A known size of pictures is read by the processor's parts, with the same result in every family."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from vlm_support import MAKERS, TEXTS, asked, picture

from cmapkd.data.dialogues import ChatItem, Dialogue, Turn
from cmapkd.models import chat_pictures
from cmapkd.models.chat import HfChatProcessor
from cmapkd.models.hf_vlm_build import processor_of

TWICE = (*asked(TEXTS[0], "yes"), *asked(TEXTS[3], "a red circle", pictures=0))
LATER = (*asked("Is 2 more than 1?", "yes", pictures=0), *asked("\n\n  What is here? é", "2 squares"))
SYSTEM = (Turn("system", "Answer in one word."), *asked(TEXTS[3], "2"))
SIZES = ((80, 60), (64, 96), (40, 200), (64, 64))
READ: list[tuple[Dialogue, Image.Image]] = [
    (dialogue, picture(10 * number + place, *size))
    for number, size in enumerate(SIZES)
    for place, dialogue in enumerate((asked(TEXTS[0], "yes"), TWICE, LATER, SYSTEM, asked("A", "no"), TWICE))
]


def made(kind: str) -> HfChatProcessor:
    model, native = MAKERS[kind]()
    return processor_of(native, model.config, name=kind)


def tensors(item: ChatItem) -> dict[str, Tensor]:
    return {"ids": item.ids, "answer": item.answer, "visual": item.visual, **item.sequence, **item.pictures}


def assert_same(one: ChatItem, other: ChatItem) -> None:
    a, b = tensors(one), tensors(other)
    assert list(a) == list(b)
    for name, value in a.items():
        assert value.dtype == b[name].dtype
        assert torch.equal(value, b[name]), name


@pytest.fixture(scope="module", params=MAKERS)
def both(request: pytest.FixtureRequest) -> tuple[HfChatProcessor, list[ChatItem]]:
    """A family's processor, and what another one reads that knows no size."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chat_pictures, "_SEEN", 10**9)
        processor = made(request.param)
        return made(request.param), [processor.read(dialogue, [shown]) for dialogue, shown in READ]


def test_known_sizes_are_read_alike(both: tuple[HfChatProcessor, list[ChatItem]]) -> None:
    processor, expected = both
    asked_whole = counted(processor)
    for (dialogue, shown), item in zip(READ, expected, strict=True):
        assert_same(processor.read(dialogue, [shown]), item)
    # of each size two pictures before it is known, and one of noise
    assert len(asked_whole) == len(SIZES) * chat_pictures._SEEN
    processor.__class__ = HfChatProcessor
    again = pickle.loads(pickle.dumps(processor))  # noqa: S301
    for number in range(6):
        assert_same(again.read(*_alone(number)), expected[number])
    assert again == processor


def test_what_cannot_be_read_is_refused_with_the_same_words() -> None:
    processor = made("llava")
    for dialogue, shown in READ[:4]:
        processor.read(dialogue, [shown])
    with pytest.raises(ValueError, match="control token '<image>'"):
        processor.read(asked("What is <image>?", "2"), [READ[0][1]])
    processor.max_tokens = 20
    with pytest.raises(ValueError, match="more than 20"):
        processor.read(*_alone(0))


@pytest.mark.parametrize("part", ["image_processor", "tokenizer"])
def test_parts_that_give_something_else_are_not_used(part: str) -> None:
    """As those of a processor that treats pictures, or writes tokens, in a way of its own."""
    processor = made("llava")
    expected = [processor.read(dialogue, [shown]) for dialogue, shown in READ[:2]]
    processor = made("llava")
    sizes = processor._sizes
    other = "_shown" if part == "image_processor" else "_ids"
    known = getattr(sizes, other)

    def changed(*given: Any) -> Any:
        found = known(*given)
        return {**found, "pixel_values": found["pixel_values"] + 1} if part == "image_processor" else found[:-1]

    setattr(sizes, other, changed)
    for _ in range(chat_pictures._SEEN + 1):
        for (dialogue, shown), item in zip(READ[:2], expected, strict=True):
            assert_same(processor.read(dialogue, [shown]), item)


def test_a_part_that_fails_leaves_the_picture_to_the_processor() -> None:
    processor = made("llava")
    for _ in range(chat_pictures._SEEN):
        expected = processor.read(*_alone(0))

    def fails(*_: Any) -> Any:
        raise RuntimeError("no such picture")

    processor._sizes._shown = fails  # type: ignore[method-assign]
    assert_same(processor.read(*_alone(0)), expected)


def counted(processor: HfChatProcessor) -> list[str]:
    """The texts that the whole processor is given from now on."""
    seen: list[str] = []
    whole = type(processor)._processed

    class Counting(HfChatProcessor):
        def _processed(self, text: str, pictures: Sequence[Image.Image]) -> dict[str, Tensor]:
            seen.append(text)
            return whole(self, text, pictures)

    processor.__class__ = Counting
    return seen


def _alone(number: int) -> tuple[Dialogue, list[Image.Image]]:
    dialogue, shown = READ[number]
    return dialogue, [shown]
