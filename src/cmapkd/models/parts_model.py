"""`PartsModel`: an image tower and a text encoder of any origin, joined by two heads."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cmapkd.config import ConfigError
from cmapkd.data.types import ModelInput, TokenBatch
from cmapkd.models import parts_folder
from cmapkd.models.architecture import settings_text
from cmapkd.models.base import DualEncoder, eval_mode
from cmapkd.models.heads import HeadConfig, asked_of, behind, make_head
from cmapkd.models.image_tower import ImageTower
from cmapkd.models.part_tower import PartTower
from cmapkd.models.parts import split_by_name
from cmapkd.models.storage import load_weights, read_weights
from cmapkd.models.text_towers import TextTower
from cmapkd.models.types import BOTH, Features, LevelInfo, LevelRequest, Tower, TowerFeatures

START_SCALE = math.log(1 / 0.07)  # CLIP, arXiv:2103.00020, section 2.5


class PartsModel(DualEncoder):
    """Each tower gives pooled features or its last tokens, and a head of its own leads from there to the joint space.

    What does not learn of a tower stays in eval mode: nothing in it is dropped, and no statistics change. So what it
    answers can be stored, see `PooledTowers`.

    Args:
        bias: start of a learned logit bias, for a sigmoid loss; None: the model has none.
    """

    def __init__(
        self,
        image: ImageTower,
        text: TextTower,
        *,
        image_head: HeadConfig,
        text_head: HeadConfig,
        embed_dim: int,
        bias: float | None,
        name: str,
    ) -> None:
        super().__init__()
        self.image, self.text = image, text
        # widths and biases of open_clip's own heads behind a timm and a transformers tower
        self.image_head = make_head(image_head, image, embed_dim, hidden=2 * embed_dim, bias=image_head.kind == "mlp")
        self.text_head = make_head(text_head, text, embed_dim, hidden=(text.width + embed_dim) // 2, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(START_SCALE))
        self.learned_bias = None if bias is None else nn.Parameter(torch.tensor(bias))
        self.name, self.embed_dim = name, embed_dim
        self.image_spec, self.tokenizer = image.spec, text.tokenizer
        self.image_levels, self.text_levels = image.levels, text.levels

    @property
    def architecture(self) -> str:
        return settings_text(self, self.describe())

    @property
    def log_logit_scale(self) -> nn.Parameter:
        return self.logit_scale

    @property
    def logit_bias(self) -> Tensor | None:
        return self.learned_bias

    def clamp_logit_scale(self) -> None:
        """CLIP's clamp; not where there is a bias, as SigLIP (arXiv:2303.15343) has none and ends above 100."""
        if self.learned_bias is None:
            super().clamp_logit_scale()

    @property
    def parts(self) -> Mapping[str, frozenset[str]]:
        prefixes = {
            "image": ("image",),
            "text": ("text",),
            "projections": ("image_head", "text_head"),
            "scale": ("logit_scale", "learned_bias"),
        }
        return split_by_name((name for name, _ in self.named_parameters()), prefixes)

    @property
    def image_blocks(self) -> tuple[nn.Module, ...]:
        return self.image.blocks

    @property
    def token_embedding(self) -> nn.Module:
        table: nn.Module = self.text.transformer.get_input_embeddings()
        return table

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self._settle()
        return self

    def encode_image(self, images: Float[Tensor, "batch 3 height width"], levels: Sequence[str] = ()) -> TowerFeatures:
        self.check_levels("image", levels)
        self._settle()
        return behind(self.image_head, self.image(images, asked_of(self.image_head, levels)))

    def encode_text(self, texts: TokenBatch, levels: Sequence[str] = ()) -> TowerFeatures:
        self.check_levels("text", levels)
        self._settle()
        return behind(self.text_head, self.text(texts, asked_of(self.text_head, levels)))

    def _settle(self) -> None:
        """What does not learn is in eval mode, the rest in the model's."""
        for tower in (self._modules["image"], self._modules["text"]):  # None where a method keeps one tower alone
            if isinstance(tower, PartTower):
                tower.settle(self.training)

    @property
    def frozen_towers(self) -> tuple[Tower, ...]:
        return tuple(tower for tower in BOTH if self._tower(tower).needs_input is None)

    def _tower(self, tower: Tower) -> PartTower:
        return self.image if tower == "image" else self.text

    @property
    def why_towers_live(self) -> str | None:
        learning = self.image.needs_input
        if learning is not None and learning != self.image.name:
            return f"{learning} learns from its first block on, so pictures are read in every step"
        if learning is not None and self.text.needs_input is None:
            return "the image tower learns, and answers of a text encoder alone are not stored"
        return None

    @property
    def frozen_levels(self) -> LevelRequest:
        return LevelRequest(self.image.frozen_levels, self.text.frozen_levels)

    def learn_only(self, parts: Collection[str]) -> None:
        for tower in BOTH:
            freezing = self._tower(tower).freezing()
            each = freezing if isinstance(freezing, list) else [freezing]
            if tower in parts and all(one is True for one in each):
                raise ConfigError(
                    f"training.train_parts names {tower}, and options.{tower} of {self.name} says frozen: leave one of "
                    "them out"
                )
            if tower not in parts and any(one is not True and one for one in each):
                raise ConfigError(
                    f"options.{tower} of {self.name} says frozen_blocks, so its other blocks are to learn, and "
                    f"training.train_parts leaves {tower} out: add {tower} to it, or set frozen: true"
                )
        for tower in BOTH:
            if tower not in parts:
                self._tower(tower).freeze()

    @property
    def stored_levels(self) -> LevelRequest:
        image, text = self._stored("image"), self._stored("text")
        return LevelRequest(tuple(level.name for level in image), tuple(level.name for level in text))

    def _stored(self, tower: Tower) -> tuple[LevelInfo, ...]:
        head = self.image_head if tower == "image" else self.text_head
        return self._tower(tower).stored_levels(head.reads) if tower in self.frozen_towers else ()

    def pooled_towers(self, towers: Collection[Tower]) -> DualEncoder:
        levels = {tower: self._stored(tower) if tower in towers else () for tower in BOTH}
        return PooledTowers(self, towers, levels)

    def from_pooled(
        self, stored: Features, towers: Collection[Tower], inputs: ModelInput | None, needs: LevelRequest
    ) -> Features:
        self._settle()
        # as in a pass from the inputs: of a tower that nobody reads no features, and nothing is drawn for dropout
        image, text = (TowerFeatures(side.embedding[:, :0]) for side in (stored.image, stored.text))
        if "image" in needs.towers:
            if "image" in towers:
                found = self.image.go_on(stored.image, asked_of(self.image_head, needs.image_levels))
                image = behind(self.image_head, found)
            elif inputs is not None:
                image = self.encode_image(self.image_spec.to_model(inputs.images), needs.image_levels)
        if "text" in needs.towers:
            if "text" in towers:
                found = self.text.go_on(stored.text, asked_of(self.text_head, needs.text_levels))
                text = behind(self.text_head, found)
            else:
                assert inputs is not None
                text = self.encode_text(inputs.texts, needs.text_levels)

        def asked(pool: str) -> bool:
            return needs.pools is None or pool in needs.pools

        if "text" in towers:
            more = {pool: behind(self.text_head, found) for pool, found in stored.more_texts.items() if asked(pool)}
        else:
            assert inputs is not None
            more = {pool: self.encode_text(texts) for pool, texts in inputs.more_texts.items() if asked(pool)}
        return Features(image, text, self.logit_scale.exp(), self.learned_bias, more)

    def with_words_of(self, texts: Iterable[str]) -> PartsModel:
        self.text.cut_words(texts)
        self.tokenizer = self.text.tokenizer
        return self

    def load_checkpoint(self, path: str | Path, *, averaged: bool = False) -> None:
        load_weights(self, read_weights(path, averaged=averaged), where=path)

    def write(self, folder: Path) -> None:
        """Ours; in open_clip's own format where open_clip has words for these towers and heads."""
        with eval_mode(self):
            parts_folder.save(self, folder)

    def describe(self) -> dict[str, Any]:
        """Plain data from which `parts_family.load` makes the untrained model."""
        return {
            "embed_dim": self.embed_dim,
            "image": self.image.describe(),
            "text": self.text.describe(),
            "image_head": self.image_head.config.model_dump(mode="json"),
            "text_head": self.text_head.config.model_dump(mode="json"),
            "bias": self.learned_bias is not None,
        }


class PooledTowers(DualEncoder):
    """Towers of a `PartsModel` without their heads: what a cache stores of those that are frozen.

    Its embeddings are pooled features, of another width for each tower, and of width 0 where a tower is not held. In
    front of a reader they have width 0 too, and the level `LAST` is what is stored; of a tower whose last blocks learn
    the level `MIDDLE`. Logit scale, heads and blocks that learn are not its own: they may change while the answers stay
    as they are.

    Args:
        levels: that are stored.
    """

    def __init__(
        self, model: PartsModel, towers: Collection[Tower], levels: Mapping[Tower, tuple[LevelInfo, ...]]
    ) -> None:
        super().__init__()
        self.image: Any = model.image.stored_part() if "image" in towers else None
        self.text: Any = model.text.stored_part() if "text" in towers else None
        self.nothing = nn.Parameter(torch.zeros(()), requires_grad=False)
        self.name, self.embed_dim = f"{model.name}: frozen {' and '.join(towers)}", model.embed_dim
        self.image_spec, self.tokenizer = model.image_spec, model.tokenizer
        self.image_levels, self.text_levels = levels["image"], levels["text"]

    @property
    def architecture(self) -> str:
        held: list[Any] = [None if tower is None else tower.describe() for tower in (self.image, self.text)]
        read = [level.name for level in (*self.image_levels, *self.text_levels)]
        return settings_text(self, *held, *([read] if read else []))

    @property
    def log_logit_scale(self) -> nn.Parameter:
        return self.nothing

    @property
    def device(self) -> torch.device:
        held = self.image if self.image is not None else self.text
        return self.nothing.device if held is None else next(held.parameters()).device

    @property
    def parts(self) -> Mapping[str, frozenset[str]]:
        prefixes = {"image": ("image",), "text": ("text",), "projections": (), "scale": ("nothing",)}
        return split_by_name((name for name, _ in self.named_parameters()), prefixes)

    def encode_image(self, images: Float[Tensor, "batch 3 height width"], levels: Sequence[str] = ()) -> TowerFeatures:
        if self.image is None:
            return TowerFeatures(images.new_empty(len(images), 0))
        tower: TowerFeatures = self.image(images, levels)
        return tower

    def encode_text(self, texts: TokenBatch, levels: Sequence[str] = ()) -> TowerFeatures:
        if self.text is None:
            return TowerFeatures(self.nothing.new_empty(len(texts.ids), 0))
        tower: TowerFeatures = self.text(texts, levels)
        return tower

    def write(self, folder: Path) -> None:
        raise NotImplementedError("towers without heads are a part of a model: save the model")
