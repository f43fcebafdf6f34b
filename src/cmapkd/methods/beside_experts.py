"""Methods over models that write, whose teachers are image encoders: they see the pictures, and write nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from cmapkd.config import ConfigError, closest
from cmapkd.data.types import Batch
from cmapkd.features.pyramid import level_grid
from cmapkd.features.taps import level_at
from cmapkd.methods.generative import GenerativeMethod
from cmapkd.models import DualEncoder, Features, LevelRequest, Model
from cmapkd.models.picture_attention import attention_in, check_blocks, has_class_token, looked_at
from cmapkd.models.token_types import TokenFeatures

NO_TEXTS = "its teachers are image encoders, and the cache of a run that writes holds next-token distributions"


class SeenByExperts(NamedTuple):
    """What experts make of pictures at one level each, without gradient.

    Attributes:
        tokens: Float[pictures tokens width] by role, of patches.
        classes: Float[pictures width] by role: the class token, or the mean of patches where there is none.
        looked: Float[pictures tokens], what one expert's class token attends to; None where nobody asked.
    """

    tokens: Mapping[str, Tensor]
    classes: Mapping[str, Tensor]
    looked: Tensor | None


class ExpertMethod(GenerativeMethod):
    """A method that asks image encoders about the pictures of a batch; their texts are never read.

    Each has a role of its own: `teacher`, and the names in `more_teachers`.
    """

    learns_from: ClassVar[type[Model] | None] = DualEncoder
    several_teachers: ClassVar[bool] = True
    pictures_alone: ClassVar[bool] = True
    of_teacher: ClassVar[frozenset[str]] = frozenset()
    not_cached: str | None = NO_TEXTS

    @property
    def compares_tokens(self) -> bool:
        return False

    def check_roles(self, named: Mapping[str, Any], setting: str) -> None:
        """Refuses settings of teachers that the run does not have.

        Raises:
            ConfigError: with the nearest name.
        """
        for role in named:
            if role not in self.teachers:
                raise ConfigError(
                    f"method.{setting} names {role!r}{closest(role, self.teachers)}, and the teachers are "
                    f"{', '.join(self.teachers)}"
                )

    def level_of(self, role: str, where: str | float) -> str:
        """The name of an expert's image level.

        Raises:
            ConfigError: it has no such level.
        """
        try:
            return level_at(self.teachers[role].model.image_levels, where, tower="image").name
        except ValueError as error:
            raise ConfigError(f"teacher {self.teachers[role].name}: {error}") from None

    def size_of(self, role: str, level: str | None) -> tuple[int, int]:
        """Tokens and width of an expert's level, found by a run on an empty picture; None: of its embedding."""
        model = self.teachers[role].model
        if level is None:
            return 1, int(model.embed_dim)
        side = model.image_spec.size
        with torch.no_grad():
            found = model.encode_image(model.log_logit_scale.new_zeros(1, 3, side, side), (level,))
        _, tokens, width = level_grid(found.levels[level]).shape
        return int(tokens), int(width)

    def ask(self, part: Batch, role: str, levels: tuple[str, ...]) -> Features:
        """What an expert sees in the pictures of a part of the batch, also where a dialogue does not show them."""
        teacher: Any = self.teachers[role]
        own = part.only(teacher.reads).to(self.device, non_blocking=True)
        found: Features = teacher(own, LevelRequest(levels, towers=("image",)))
        return found

    @torch.no_grad()
    def ask_all(
        self, part: Batch, shown: Sequence[int], levels: Mapping[str, str], *, attention_of: str | None
    ) -> SeenByExperts:
        """What experts make of some pictures of a part of the batch.

        Args:
            shown: rows of the part.
            levels: by role.
            attention_of: a role whose class token's attention in its level is read, too; None: of nobody.
        Raises:
            ConfigError: that level is no block, or its attention cannot be read.
        """
        rows = torch.tensor(shown).to(self.device, non_blocking=True)
        tokens, classes, looked = {}, {}, None
        for role, name in levels.items():
            model = self.teachers[role].model
            if role == attention_of:
                with attention_in(check_blocks(model, name)) as maps:
                    level = self.ask(part, role, (name,)).image.levels[name]
                by_class = has_class_token(model, level.num_prefix)
                looked = looked_at(maps, level.num_prefix, model.name, by_class=by_class)[rows]
            else:
                level = self.ask(part, role, (name,)).image.levels[name]
            tokens[role] = level_grid(level)[rows]
            classes[role] = level.values[rows, 0] if has_class_token(model, level.num_prefix) else tokens[role].mean(1)
        return SeenByExperts(tokens, classes, looked)

    def read_teacher(self, part: Batch, role: str | None = None) -> TokenFeatures | None:
        """Asks the experts for their embeddings, and has no tokens to give: for who times a step."""
        for each in self.teachers if role is None else (role,):
            self.ask(part, each, ())
        return None


def tokens_of(features: Features, level: str | None) -> Tensor:
    """Float[batch tokens width]: a level's tokens without class tokens, or the embedding as one token."""
    return features.image.embedding[:, None] if level is None else level_grid(features.image.levels[level])
