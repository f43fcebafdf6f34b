"""`StoredTowers`: what a model says of its towers that do not learn, and how it goes on from what these answered."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from cmapkd.data.types import ModelInput
from cmapkd.models.types import Features, LevelRequest, Tower


class StoredTowers:
    """Of a model that cannot go on from stored answers: none is frozen. Models of parts say otherwise."""

    name: str

    @property
    def frozen_towers(self) -> tuple[Tower, ...]:
        """Towers whose first blocks, or all, never learn, of a model that can go on from what these answer; of others
        none."""
        return ()

    @property
    def why_towers_live(self) -> str | None:
        """Why a tower is not among `frozen_towers` although some of it is frozen; None: it is, or nothing is frozen."""
        return None

    @property
    def frozen_levels(self) -> LevelRequest:
        """Levels behind which nothing learns, of a model whose parts say so for themselves."""
        return LevelRequest()

    def learn_only(self, parts: Collection[str]) -> None:
        """Is told that the whole run trains these parts alone, before any stage; towers of others are frozen for good.

        Raises:
            ConfigError: names the setting.
        """

    @property
    def stored_levels(self) -> LevelRequest:
        """What `pooled_towers(frozen_towers)` are to be asked for beside embeddings, so that the model can go on."""
        return LevelRequest()

    def pooled_towers(self, towers: Collection[Tower]) -> Any:  # noqa: ARG002  for those that have some
        """Some of `frozen_towers`, without what follows them, as a `DualEncoder`: pooled features are its embeddings.

        Raises:
            ValueError: this model cannot go on from such features.
        """
        raise ValueError(f"{self.name} has no towers that can be taken apart from its heads")

    def from_pooled(
        self,
        stored: Features,  # noqa: ARG002
        towers: Collection[Tower],  # noqa: ARG002
        inputs: ModelInput | None,  # noqa: ARG002
        needs: LevelRequest,  # noqa: ARG002
    ) -> Features:
        """The model's features from what `pooled_towers(towers)` answered; the other towers are asked now.

        Args:
            inputs: of the batch; None where both towers have answered.
        """
        raise ValueError(f"{self.name} has no towers that can be taken apart from its heads")


def live_within(inner: StoredTowers, form: str) -> str | None:
    """`why_towers_live` of a model that holds another one.

    Args:
        inner: whose image tower it has.
        form: of the outer model, in words.
    """
    if "image" not in inner.frozen_towers:
        return inner.why_towers_live
    return f"{inner.name} is part of {form} here, which cannot go on from stored answers"
