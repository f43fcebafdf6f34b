"""What the label of a scene can be: eight tasks of one world, each with its class names and prompts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType

from cmapkd.data.scenes.language import TEMPLATES
from cmapkd.data.scenes.spec import BACKGROUND_TEXTURES, BACKGROUNDS, CLASS_NAMES, COLOURS, SHAPES, TEXTURES
from cmapkd.data.scenes.words import NUMBERS
from cmapkd.data.scenes.world import Scene

_SIZES = ("small", "medium", "large")
_COUNTS = tuple(f"{number} object{'s'[: place > 1]}" for place, number in enumerate(NUMBERS) if place)


@dataclass(frozen=True, slots=True)
class LabelKind:
    """One task.

    Attributes:
        names: of the classes, by label.
        templates: zero-shot prompts with `{}` where a name goes, in wordings near those of captions.
        name_of: what a scene is called.
    """

    names: tuple[str, ...]
    templates: tuple[str, ...]
    name_of: Callable[[Scene], str]

    def label(self, scene: Scene) -> int:
        """The number of the scene's class."""
        return self.names.index(self.name_of(scene))


_OF_LARGEST = (
    "the {} object is the largest object",
    "the {} object is the biggest object",
    "a picture with the {} object as its largest object",
    "the largest object is the {} object",
)
_GROUNDS = ("a picture on a {} background", "a {} background", "objects on a {} backdrop")

LABEL_KINDS = MappingProxyType(
    {
        "object": LabelKind(CLASS_NAMES, TEMPLATES, lambda scene: scene.objects[0].name),
        "colour": LabelKind(tuple(COLOURS), _OF_LARGEST, lambda scene: scene.objects[0].colour),
        "shape": LabelKind(SHAPES, TEMPLATES, lambda scene: scene.objects[0].shape),
        "texture": LabelKind(TEXTURES, _OF_LARGEST, lambda scene: scene.objects[0].texture),
        "size": LabelKind(_SIZES, _OF_LARGEST, lambda scene: scene.objects[0].size),
        "background": LabelKind(tuple(BACKGROUNDS), _GROUNDS, lambda scene: scene.background.colour),
        "background_texture": LabelKind(BACKGROUND_TEXTURES, _GROUNDS, lambda scene: scene.background.texture),
        "count": LabelKind(
            _COUNTS,
            ("a picture of {}", "a picture with {}", "{} in a picture"),
            lambda scene: _COUNTS[len(scene.objects) - 1],
        ),
    }
)
"""By the value of `scenes?label=`. Of objects the largest one is meant."""
