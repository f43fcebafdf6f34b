"""The procedural world as a `Source`: coloured shapes with captions, labels, questions and boxes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from difflib import get_close_matches
from hashlib import blake2b
from typing import Any, TypeVar

from PIL import Image

from cmapkd.data.scenes.described import DESCRIPTIONS, described_classes
from cmapkd.data.scenes.labels import LABEL_KINDS
from cmapkd.data.scenes.language import captions_with_claims
from cmapkd.data.scenes.questions import questions_of
from cmapkd.data.scenes.render import pixel_box, render
from cmapkd.data.scenes.second import second_language
from cmapkd.data.scenes.spec import DIFFICULTIES, SPLITS, WORLD_VERSION
from cmapkd.data.scenes.world import WORLD_SEED, Scene, scene_at
from cmapkd.data.scenes.wrong import with_wrong
from cmapkd.data.types import Box, QuestionAnswer, Sample
from cmapkd.data.unseen import NO_PICTURE

T = TypeVar("T")

LANGUAGES = ("first", "second", "both")
DEFAULT_LENGTHS = {"train": 10_000_000, "val": 1000, "test": 1000, "ood": 1000}
_SIZES = (32, 224)


class SceneSample(Sample):
    """A sample whose captions, questions and boxes are made when first asked for: training reads only the captions."""

    __slots__ = ("_language", "_made", "_scene", "_silent", "_size", "_wrong")
    _language: str
    _made: dict[str, tuple[Any, ...]]
    _scene: Scene
    _silent: bool
    _size: int
    _wrong: float

    def __init__(
        self,
        sample_id: str,
        image: Image.Image,
        size: int,
        scene: Scene,
        language: str = "first",
        wrong: float = 0.0,
        label: int | None = None,
        silent: bool = False,
    ) -> None:
        given = {"id": sample_id, "image": image, "label": label, "_size": size, "_scene": scene, "_silent": silent}
        given |= {"_language": language, "_wrong": wrong, "turns": (), "no_turns": None}
        for name, value in given.items():
            object.__setattr__(self, name, value)
        object.__setattr__(self, "_made", {})

    def _make(self, name: str, maker: Callable[[], tuple[T, ...]]) -> tuple[T, ...]:
        if name not in self._made:
            self._made[name] = maker()
        made: tuple[T, ...] = self._made[name]
        return made

    @property
    def scene(self) -> Scene:
        """What the picture shows."""
        return self._scene

    @property
    def captions(self) -> tuple[str, ...]:
        if self._silent:
            return ("",)
        return self._make("captions", lambda: _captions(self._scene, self._language, self._wrong))

    @property
    def texts(self) -> dict[str, tuple[str, ...]]:
        """The true captions, as a captioner without fault would write them."""
        if self._silent:
            return {}
        return {"synthetic": self._make("synthetic", lambda: _captions(self._scene, self._language))}

    @property
    def questions(self) -> tuple[QuestionAnswer, ...]:
        return self._make("questions", lambda: questions_of(self._scene))

    @property
    def boxes(self) -> tuple[Box, ...]:
        return self._make("boxes", lambda: boxes_of(self._scene, self._size))

    def renamed(self, sample_id: str) -> SceneSample:
        """The same sample under another id; nothing is made by it."""
        return self._again(sample_id, self.label, self._silent)

    def without_label(self) -> SceneSample:
        """The same sample, unlabelled; nothing is made by it."""
        return self._again(self.id, None, self._silent)

    def without_captions(self) -> SceneSample:
        """The same sample with one caption, which is empty, and no further texts; nothing is made by it."""
        return self._again(self.id, self.label, True)

    def _again(self, sample_id: str, label: int | None, silent: bool) -> SceneSample:
        return SceneSample(sample_id, self.image, self._size, self._scene, self._language, self._wrong, label, silent)

    def __reduce__(self) -> tuple[type[Sample], tuple[Any, ...]]:
        """Crosses a process as a plain sample, with everything made."""
        values = (self.id, self.image, self.captions, self.label, self.questions, self.boxes, self.texts)
        return Sample, values


class ScenesSource:
    """Scenes of one split and difficulty, made on demand: nothing is stored, any index can be read at any time.

    A sample's label is the colour and shape of its largest object, unless another is asked for. Splits share no
    content, and `ood` shows pairs of colour and shape that the other splits never do (`spec.HELD_OUT`).
    """

    def __init__(
        self,
        split: str = "train",
        size: int = 64,
        difficulty: str = "standard",
        length: int | None = None,
        language: str = "first",
        wrong: float = 0.0,
        start: int = 0,
        descriptions: str = "true",
        label: str = "object",
    ) -> None:
        """A view of the world; two of the same arguments are the same.

        Args:
            split: `train`, `val`, `test` or `ood`.
            size: side of the square images in pixels, 32 to 224; the scenes are the same at every size.
            difficulty: a name in `DIFFICULTIES`.
            length: number of samples; by default 10 million for `train` and 1000 for the others.
            language: of the captions: `first` (English), `second` (see `second_language`), or `both`, five of each.
            wrong: share of captions whose colours and shapes are wrong; a sample's synthetic captions stay true.
            start: the world's sample that stands first; `start=1000` shows samples that no run with 1,000 has seen.
            descriptions: of the classes (`class_prompts`): `true`, or `shuffled`, each class having another one's.
            label: what the label says: a name in `LABEL_KINDS`. Names and prompts of the classes are those of the kind.
        Raises:
            ValueError: an unknown name, or a number out of range.
        """
        _check_known("split", split, SPLITS)
        _check_known("difficulty", difficulty, tuple(DIFFICULTIES))
        _check_known("language", language, LANGUAGES)
        _check_known("descriptions", descriptions, DESCRIPTIONS)
        _check_known("label", label, tuple(LABEL_KINDS))
        if not _SIZES[0] <= size <= _SIZES[1]:
            raise ValueError(
                f"size is {size}, but scenes are drawn at {_SIZES[0]} to {_SIZES[1]} pixels: below, textures cannot be "
                "told apart; above, nothing is gained over resizing."
            )
        if length is not None and length < 1:
            raise ValueError(f"length is {length}: give a number of samples >= 1, or none for the split's own.")
        if not 0 <= wrong <= 1:
            raise ValueError(f"wrong is {wrong:g}, but it is a share of the captions: give a number from 0 to 1.")
        if start < 0:
            raise ValueError(f"start is {start}: give the number of the first sample, >= 0.")
        self.split = split
        self.start = start
        self.wrong = wrong
        self.size = size
        self.difficulty = difficulty
        self.length = DEFAULT_LENGTHS[split] if length is None else length
        self.language = language
        self.descriptions = descriptions
        self.label = label
        self.name = f"scenes/{difficulty}/{split}"

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        """The sample at `index`, image, captions, label, questions and boxes.

        Raises:
            IndexError: the index is negative, or not below the length.
        """
        scene = self.scene(index)
        return self._sample(index, scene, render(scene, self.size))

    def unseen(self, index: int) -> Sample:
        """The sample at `index` with a dot in the place of its picture, which is not drawn."""
        return self._sample(index, self.scene(index), NO_PICTURE)

    def _sample(self, index: int, scene: Scene, image: Image.Image) -> Sample:
        sample_id, label = f"{self.name}/{self.start + index:09d}", LABEL_KINDS[self.label].label(scene)
        return SceneSample(sample_id, image, self.size, scene, self.language, self.wrong, label)

    def scene(self, index: int) -> Scene:
        """What the sample at `index` shows, without drawing it."""
        if not 0 <= index < self.length:
            raise IndexError(f"index {index} of {self.name}, which has the samples 0 to {self.length - 1}")
        return scene_at(self.difficulty, self.split, self.start + index)

    def captions(self, index: int) -> tuple[str, ...]:
        """The captions of the sample at `index`, without drawing it."""
        return _captions(self.scene(index), self.language, self.wrong)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Of the labels: every `colour shape`, unless another label is asked for."""
        return LABEL_KINDS[self.label].names

    @property
    def templates(self) -> tuple[str, ...]:
        """Zero-shot prompts for the class names."""
        return LABEL_KINDS[self.label].templates

    @property
    def class_prompts(self) -> tuple[tuple[str, ...], ...]:
        """Texts that hold of each object's class by itself, see `described_classes`; of other kinds of labels none."""
        return described_classes(self.descriptions) if self.label == "object" else ()

    def fingerprint(self) -> str:
        """A hash of the world's version and seed and of this view's own settings."""
        spec = sorted(asdict(DIFFICULTIES[self.difficulty]).items())
        parts: tuple[object, ...] = (WORLD_VERSION, WORLD_SEED, self.name, self.size, self.length, spec)
        parts += () if self.language == "first" else (self.language,)
        parts += (("wrong", self.wrong),) if self.wrong else ()
        parts += (("start", self.start),) if self.start else ()
        parts += (("descriptions", self.descriptions),) if self.descriptions != "true" else ()
        parts += (("label", self.label),) if self.label != "object" else ()
        return blake2b(repr(parts).encode(), digest_size=16).hexdigest()


def _captions(scene: Scene, language: str, wrong: float = 0.0) -> tuple[str, ...]:
    first = tuple(text for text, _ in captions_with_claims(scene))
    if wrong:
        first = with_wrong(scene, first, wrong)
    if language == "first":
        return first
    second = tuple(second_language(text) for text in first)
    return second if language == "second" else first + second


def boxes_of(scene: Scene, size: int) -> tuple[Box, ...]:
    """The boxes of a scene's objects in an image of `size` pixels, largest first."""
    boxes = []
    for thing in scene.objects:
        left, top, right, bottom = pixel_box(thing, size)
        boxes.append(Box(left, top, right - left, bottom - top, thing.name))
    return tuple(boxes)


def _check_known(kind: str, name: str, known: tuple[str, ...]) -> None:
    if name not in known:
        close = get_close_matches(name, known, n=1, cutoff=0.4)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"unknown {kind} {name!r} of the scenes world; known: {', '.join(known)}.{hint}")
