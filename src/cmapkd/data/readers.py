"""How one model reads a batch: two towers read pixels and captions apart, a model that writes reads whole dialogues."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from PIL import Image
from torch import Tensor

from cmapkd.config import ConfigError
from cmapkd.data.dialogues import ChatInput, ChatItem, ChatProcessing, join_items
from cmapkd.data.records import Unusable
from cmapkd.data.ring import joined, stack
from cmapkd.data.tokens import united_texts
from cmapkd.data.turns import Turn
from cmapkd.data.types import BadSampleError, Input, ModelInput, Source, TokenBatch
from cmapkd.data.views import CropBox

T = TypeVar("T")
Said = tuple[Sequence[str], Mapping[str, Sequence[str]]]  # captions, and by pool further texts

_MEASURED = 16  # samples whose pictures tell the memory of a dialogue
_UNKNOWN = 12 * 448**2  # bytes of a dialogue where its picture cannot tell: float32 pixels of a usual resolution


class Shared:
    """What the models of one batch have in common, made once and found by equal keys."""

    def __init__(self) -> None:
        self._made: list[tuple[Any, Any]] = []

    def __call__(self, key: Any, make: Callable[[], T]) -> T:
        for known, value in self._made:
            if known == key:
                found: T = value
                return found
        made = make()
        self._made.append((key, made))
        return made


class Reader(Protocol):
    """How one model reads a batch. Picklable: it works inside data workers.

    Attributes:
        reads_together: whether texts are read together with the picture, so that they need it.
        looks: equal of readers that make the same of a picture.
    """

    reads_together: ClassVar[bool]

    @property
    def looks(self) -> Any: ...

    def read(self, picture: Image.Image, box: CropBox | None, said: Any) -> Any:
        """One sample's view, as the model reads it.

        Args:
            box: the crop, in pixels of `picture`; None for all of it.
            said: the texts that were chosen for it, see `Choice.choose`.
        Raises:
            Unusable: the model cannot read it.
        """
        ...

    def without_picture(self, item: Any) -> Any:
        """What is left of an item where the answer to its picture is stored; None: nothing."""
        ...

    def join(
        self,
        items: Sequence[Any],
        captions: Sequence[str],
        more_texts: Mapping[str, Sequence[str]],
        more_items: Mapping[str, Sequence[Any]],
        shared: Shared,
    ) -> Input:
        """The model's input.

        Args:
            items: one of each sample, None where it reads nothing of the picture.
            captions: one text of each sample.
            more_texts: by pool one or more texts of each sample, those of a sample together.
            more_items: by name of a further view, those of a sample together.
        """
        ...

    def unite(self, parts: Sequence[Any], said: Sequence[Said], shared: Shared) -> Input:
        """The input of several pieces of a batch, as `join` makes it of all their items at once.

        Args:
            parts: inputs, None of a piece that reads nothing here, because all its answers are stored.
            said: captions and further texts of each piece.
        """
        ...

    def bytes_of(self, views: int, source: Source) -> int:
        """About the bytes of one sample of the source, of so many views."""
        ...


class Preprocessing(Protocol):
    """A model's own way from a picture to its input, as far as it is made in bytes; see `models.ImageSpec`.

    Attributes:
        raw_form: equal where `raw` is.
    """

    @property
    def raw_form(self) -> Any: ...

    def raw(self, image: Image.Image, box: CropBox | None = None) -> Tensor: ...


class Tokenize(Protocol):
    """A model's own tokenizer, see `models.base.Tokenizer`. One that is never asked for spans need not know of them."""

    def __call__(self, texts: list[str], *, spans: bool = ...) -> TokenBatch: ...


@dataclass(frozen=True, slots=True)
class DualReader:
    """How a model of two towers reads a batch.

    Attributes:
        spans: whether batches say where the tokens of captions stand (`TokenBatch.spans`); those of pools never do.
    """

    reads_together: ClassVar[bool] = False

    preprocess: Preprocessing
    tokenize: Tokenize
    spans: bool = False

    @property
    def looks(self) -> Any:
        return self.preprocess.raw_form

    def read(self, picture: Image.Image, box: CropBox | None, said: Any) -> Tensor:  # noqa: ARG002
        """UInt8[3 height width]."""
        return self.preprocess.raw(picture, box)

    def without_picture(self, item: Tensor) -> None:  # noqa: ARG002
        return None

    def join(
        self,
        items: Sequence[Tensor | None],
        captions: Sequence[str],
        more_texts: Mapping[str, Sequence[str]],
        more_items: Mapping[str, Sequence[Tensor]],
        shared: Shared,
    ) -> ModelInput:
        """`images` holds the pixels of the samples that have an item."""

        def stacked(pixels: Sequence[Tensor]) -> Tensor:
            return shared(("pixels", [*map(id, pixels)]), lambda: stack(pixels))

        shown = [item for item in items if item is not None]
        texts, pools = shared(("texts", self.tokenize, self.spans), lambda: self._texts(captions, more_texts))
        images = stacked(shown) if shown else torch.empty(0)
        return ModelInput(images, texts, pools, {name: stacked(pixels) for name, pixels in more_items.items()})

    def unite(self, parts: Sequence[ModelInput | None], said: Sequence[Said], shared: Shared) -> ModelInput:
        """See `Reader`."""
        each = [
            self.join([None] * len(texts[0]), *texts, {}, Shared()) if part is None else part
            for part, texts in zip(parts, said, strict=True)
        ]

        def pixels(views: Sequence[Tensor]) -> Tensor:
            shown = [view for view in views if view.numel()]
            return shared(("pixels", [*map(id, views)]), lambda: joined(shown) if shown else views[0])

        texts, pools = shared(
            ("texts", self.tokenize, self.spans),
            lambda: (
                united_texts([part.texts for part in each]),
                {pool: united_texts([part.more_texts[pool] for part in each]) for pool in each[0].more_texts},
            ),
        )
        more = {name: pixels([part.more_images[name] for part in each]) for name in each[0].more_images}
        return ModelInput(pixels([part.images for part in each]), texts, pools, more)

    def input(
        self,
        images: Tensor,
        captions: Sequence[str],
        more: Mapping[str, Sequence[str]] | None = None,
        more_images: Mapping[str, Tensor] | None = None,
    ) -> ModelInput:
        """The model's input.

        Args:
            images: its own pixels of the main views, [batch 3 height width]; see `ModelInput`.
            captions: one text of each sample.
            more: by pool one or more texts of each sample, those of a sample together (`TextChoice.columns`).
            more_images: its own pixels of further views by name, those of a sample together.
        """
        return ModelInput(images, *self._texts(captions, more or {}), dict(more_images or {}))

    def _texts(
        self, captions: Sequence[str], more: Mapping[str, Sequence[str]]
    ) -> tuple[TokenBatch, dict[str, TokenBatch]]:
        pools = {
            pool: replace(self.tokenize([*texts]), per_sample=len(texts) // len(captions))
            for pool, texts in more.items()
        }
        return self.tokenize([*captions], spans=True) if self.spans else self.tokenize([*captions]), pools

    def bytes_of(self, views: int, source: Source) -> int:  # noqa: ARG002
        return views * self.preprocess.raw(Image.new("RGB", (1, 1))).nbytes


@dataclass(frozen=True, slots=True)
class ChatReader:
    """How a model that writes reads a batch: each dialogue with its picture, through the model's own processor.

    Attributes:
        max_tokens: longest dialogue with its picture; None: as long as the model takes.
        num_tokens: how many tokens, the first by id, answers may have, because all models know them; None: all.
        pictures_alone: whether dialogues without a picture cannot be read, because every process must run the vision
            tower in every step, whose weights are shared out.
    """

    reads_together: ClassVar[bool] = True

    processor: ChatProcessing
    max_tokens: int | None = None
    num_tokens: int | None = None
    pictures_alone: bool = False

    @property
    def looks(self) -> ChatProcessing:
        return self.processor

    def read(self, picture: Image.Image, box: CropBox | None, said: tuple[Turn, ...]) -> ChatItem:
        """The dialogue in the model's tokens, with the crop of its picture if it shows one.

        Raises:
            Unusable: the processor cannot use it, with the processor's reason; or it is too long, or an answer has a
                token that another model does not know.
        """
        shown = [_cropped(picture, box)] if any(turn.pictures for turn in said) else []
        if self.pictures_alone and not shown:
            raise Unusable(
                "its dialogue shows no picture, and with training.sharding: fsdp2 every process must run the vision "
                "tower in every step: set training.sharding: none to learn from texts alone, too"
            )
        try:
            item = self.processor.read(said, shown)
        except ConfigError:  # about the run, not about this sample
            raise
        except ValueError as error:
            raise Unusable(str(error)) from None
        length = max(len(item.ids), item.length_rejected)
        if self.max_tokens is not None and length > self.max_tokens:
            raise Unusable(
                f"the dialogue has {length} tokens with its picture, more than data.max_tokens={self.max_tokens}"
            )
        learned = item.ids[item.answer]
        if self.num_tokens is not None and len(unknown := learned[learned >= self.num_tokens]):
            raise Unusable(
                f"an answer has token {int(unknown[0])}, and the models of this run have only their first "
                f"{self.num_tokens} tokens in common"
            )
        return item

    def without_picture(self, item: ChatItem) -> ChatItem:
        return replace(item, pictures={})

    def join(
        self,
        items: Sequence[ChatItem | None],
        captions: Sequence[str],  # noqa: ARG002
        more_texts: Mapping[str, Sequence[str]],  # noqa: ARG002
        more_items: Mapping[str, Sequence[ChatItem]],  # noqa: ARG002
        shared: Shared,
    ) -> ChatInput:
        """A sample without item has a row without tokens."""
        return shared(("dialogues", self.processor, [*map(id, items)]), lambda: self._joined(items))

    def unite(self, parts: Sequence[ChatInput | None], said: Sequence[Said], shared: Shared) -> ChatInput:
        """See `Reader`. A piece without input has rows without tokens."""

        def whole() -> ChatInput:
            items: list[ChatItem | None] = []
            for part, texts in zip(parts, said, strict=True):
                items += [None] * len(texts[0]) if part is None else part.items()
            return self._joined(items)

        return shared(("dialogues", self.processor, [*map(id, parts)]), whole)

    def _joined(self, items: Sequence[ChatItem | None]) -> ChatInput:
        some = next(item for item in items if item is not None)
        empty = ChatItem(
            some.ids[:0], some.answer[:0], some.visual[:0], {key: each[:0] for key, each in some.sequence.items()}
        )
        made = join_items([empty if item is None else item for item in items], self.processor.pad_id)
        limits = [each for each in (self.processor.max_tokens, self.max_tokens) if each is not None]
        return replace(made, max_tokens=min(limits, default=None))

    def bytes_of(self, views: int, source: Source) -> int:
        """Of the sample with most bytes of a few: processors of any resolution give more of a larger picture."""
        return views * max(map(self._bytes_of_picture, _sizes(source)), default=_UNKNOWN)

    def _bytes_of_picture(self, size: tuple[int, int]) -> int:
        try:
            item = self.read(Image.new("RGB", size, "grey"), None, (Turn("user", "a", 1), Turn("assistant", "a")))
        except Unusable:  # so large a picture is never read: others are, and there may be no room for many
            return _UNKNOWN
        tensors = (item.ids, item.answer, item.visual, *item.sequence.values(), *item.pictures.values())
        return sum(tensor.nbytes for tensor in tensors)


def first_alike(readers: Mapping[str, Reader], own_views: Mapping[str, Any]) -> dict[str, str]:
    """For each role the first one that makes the same of a picture, and sees the same views of it."""
    first: dict[str, str] = {}
    for role, reader in readers.items():
        like = (other for other in first if readers[other].looks == reader.looks)
        first[role] = next((other for other in like if own_views.get(other) == own_views.get(role)), role)
    return first


def refuse_more_views(roles: Iterable[str], readers: Mapping[str, Reader]) -> None:
    """Refuses further views of samples that these roles would read as dialogues.

    Raises:
        ConfigError: one of them does.
    """
    if any(readers[role].reads_together for role in roles):
        raise ConfigError("further views of a sample are for models of two towers, and a model here reads dialogues")


def _sizes(source: Source) -> set[tuple[int, int]]:
    """Widths and heights of the pictures of a few samples, spread evenly over the source."""
    sizes = set()
    for index in range(0, len(source), max(1, len(source) // _MEASURED))[:_MEASURED]:
        try:
            sizes.add(source[index].image.size)
        except BadSampleError:  # the run meets it again
            continue
    return sizes


def _cropped(picture: Image.Image, box: CropBox | None) -> Image.Image:
    """The crop to whole pixels, at least one."""
    if box is None:
        return picture
    left, top = (min(int(side), length - 1) for side, length in zip(box[:2], picture.size, strict=True))
    right, bottom = round(box[2]), round(box[3])
    return picture.crop((left, top, max(left + 1, right), max(top + 1, bottom)))
