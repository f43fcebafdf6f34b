"""`OpenClipModel`: a dual encoder that open_clip builds (native, ResNet or timm image tower) behind our contract."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from cmapkd.data.types import TokenBatch
from cmapkd.models.architecture import settings_text
from cmapkd.models.base import DualEncoder
from cmapkd.models.open_clip_build import construct, fit_image_size, image_spec, load_native_weights
from cmapkd.models.open_clip_levels import (
    embedding_of_tokens,
    has_transformers_text,
    image_levels,
    outputs_of,
    projected_tokens,
    projections,
    text_blocks,
    text_width,
    visual_blocks,
    visual_features,
)
from cmapkd.models.open_clip_pruning import prunable_towers, resize
from cmapkd.models.open_clip_text import encode_short, is_causal, why_whole
from cmapkd.models.open_clip_tokenizer import KEPT_TOKENS, OpenClipTokenizer
from cmapkd.models.open_clip_words import cut_words
from cmapkd.models.parts import split_by_name
from cmapkd.models.prunable import PrunableTower, TowerSizes
from cmapkd.models.storage import load_weights, read_weights, write_model_folder, write_tensors
from cmapkd.models.types import Level, LevelInfo, Tower, TowerFeatures

NATIVE_CONFIG, NATIVE_WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
_SHORT_TEXTS = ("a", "a red circle")
TEXT_CONFIG = "text_tower"  # a transformers text tower's own config, inside a model folder


class OpenClipModel(DualEncoder):
    """Wraps `open_clip.CLIP` or `open_clip.CustomTextCLIP`; `config` is open_clip's `model_cfg` of it.

    `sizes` are those of towers that were cut to smaller ones than a `model_cfg` can describe. `either_activation` says
    that weights of this architecture come with GELU and with QuickGELU, and nobody has said which. `kept` are the ids
    that were left of the whole tokenizer.

    Levels come from open_clip's `forward_intermediates`. A ViT's are `blocks.N` with its class and register tokens at
    the front; a convolutional or windowed tower's are `stages.N` maps, the stem not counted. Texts have `blocks.N`.
    """

    tokenizer: OpenClipTokenizer

    def __init__(
        self,
        model: nn.Module,
        *,
        config: Mapping[str, Any],
        preprocess: Mapping[str, Any],
        tokenizer: OpenClipTokenizer,
        name: str,
        family: str = "open_clip",
        sizes: Mapping[Tower, TowerSizes] | None = None,
        either_activation: bool = False,
        kept: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.model: Any = model
        self.sizes, self.either_activation, self.kept = sizes, either_activation, kept
        self.config, self.preprocess = deepcopy(dict(config)), dict(preprocess)
        self.name, self.family = name, family
        examples = tokenizer.padded("these show where it pools")(_SHORT_TEXTS)
        self.tokenizer = tokenizer.padded(why_whole(model, examples))
        self.embed_dim = int(config["embed_dim"])
        self.image_spec = image_spec(self.model.visual, preprocess)
        self._indices = image_levels(self.model.visual)
        self.image_levels = tuple(self._indices)
        blocks = text_blocks(self.model)
        width = text_width(self.model)
        self.text_levels = tuple(LevelInfo(f"blocks.{number}", width, "tokens") for number in range(len(blocks)))

    @property
    def architecture(self) -> str:
        return settings_text(self, self.config)

    @property
    def log_logit_scale(self) -> nn.Parameter:
        parameter: nn.Parameter = self.model.logit_scale
        return parameter

    @property
    def logit_bias(self) -> Tensor | None:
        bias: Tensor | None = self.model.logit_bias
        return None if bias is None else bias.reshape(())

    def clamp_logit_scale(self) -> None:
        """CLIP's clamp; not where there is a bias, as SigLIP (arXiv:2303.15343) has none and ends above 100."""
        if self.model.logit_bias is None:
            super().clamp_logit_scale()

    @property
    def parts(self) -> Mapping[str, frozenset[str]]:
        prefixes = {
            "image": ("model.visual",),
            "text": ("model",),  # open_clip.CLIP keeps its text tower's weights beside the image tower
            "projections": [f"model.{name}" for name in projections(self.model)],
            "scale": ("model.logit_scale", "model.logit_bias"),
        }
        return split_by_name((name for name, _ in self.named_parameters()), prefixes)

    @property
    def image_blocks(self) -> tuple[nn.Module, ...]:
        return visual_blocks(self.model.visual, self.image_levels)

    @property
    def token_embedding(self) -> nn.Module:
        return embedding_of_tokens(self.model)

    @property
    def prunable(self) -> Mapping[Tower, PrunableTower]:
        return {tower: parts.within("model") for tower, parts in prunable_towers(self.model).items()}

    def resized(self, sizes: Mapping[Tower, TowerSizes]) -> OpenClipModel:
        model = deepcopy(self.model)
        resize(model, sizes)
        return type(self)(
            model,
            config=self.config,
            preprocess=self.preprocess,
            tokenizer=self.tokenizer,
            name=self.name,
            family=self.family,
            sizes=sizes,
            kept=self.kept,
        )

    def with_words_of(self, texts: Iterable[str]) -> OpenClipModel:
        before = self.kept  # of the whole tokenizer, where words were left out already
        self.tokenizer, kept = cut_words(self.model, self.config, self.tokenizer, texts, name=self.name)
        self.kept = kept if before is None else [before[number] for number in kept]
        return self

    def encode_image(self, images: Float[Tensor, "batch 3 height width"], levels: Sequence[str] = ()) -> TowerFeatures:
        self.check_levels("image", levels)
        if not levels:
            return TowerFeatures(self.model.encode_image(images))
        return visual_features(self.model.visual, images, levels, self._indices, name=self.name)

    def tokens_in_joint_space(self, level: Level) -> Float[Tensor, "batch tokens dim"]:
        return projected_tokens(self.model.visual, level, name=self.name)

    def encode_text(self, texts: TokenBatch, levels: Sequence[str] = ()) -> TowerFeatures:
        self.check_levels("text", levels)
        wanted = sorted({int(name.removeprefix("blocks.")) for name in levels})
        embedding, values = self._encode_text(texts.ids, wanted)
        taken = {name: values[int(name.removeprefix("blocks."))] for name in levels}
        return TowerFeatures(
            embedding, {name: Level(value, "tokens", mask=texts.mask) for name, value in taken.items()}
        )

    def _encode_text(self, ids: Tensor, wanted: Sequence[int]) -> tuple[Tensor, Mapping[int, Tensor]]:
        """Embeddings, and what the wanted blocks return; by open_clip's own code where that takes such texts."""
        transformers, tower = has_transformers_text(self.model), getattr(self.model, "text", self.model)
        if not transformers and ids.shape[1] < self.tokenizer.context_length and is_causal(tower):
            return encode_short(tower, ids, wanted)
        if not wanted:
            return self.model.encode_text(ids), {}
        if transformers:
            with outputs_of(text_blocks(self.model), wanted) as values:
                return self.model.encode_text(ids), values
        output = self.model.forward_intermediates(text=ids, text_indices=wanted, normalize=False)
        return output["text_features"], dict(zip(wanted, output["text_intermediates"], strict=True))

    def load_checkpoint(self, path: str | Path, *, averaged: bool = False) -> None:
        weights = read_weights(path, averaged=averaged)
        if all(key.startswith("model.") for key in weights):  # our own names
            load_weights(self, weights, where=path)
        else:
            load_native_weights(self.model, weights, where=path)
        if self.either_activation:
            self.assumed_activation = "quick_gelu" if self.config.get("quick_gelu") else "gelu"

    def activation_twin(self) -> OpenClipModel | None:
        if self.assumed_activation is None:
            return None
        config = {**self.config, "quick_gelu": self.assumed_activation == "gelu"}
        model: Any = construct(config, self.preprocess, where=self.name)
        fit_image_size(model, where=self.name)
        model.load_state_dict(self.model.state_dict())
        twin = type(self)(
            model,
            config=config,
            preprocess=self.preprocess,
            tokenizer=self.tokenizer,
            name=self.name,
            family=self.family,
            kept=self.kept,
        )
        return twin.to(self.device).train(self.training)

    def write(self, folder: Path) -> None:
        """Ours, and open_clip's: `open_clip.create_model_and_transforms("local-dir:FOLDER")` reads it too.

        A timm ViT whose `image_size` is not its own is an exception: open_clip builds it at its own size first. So is a
        model whose towers were cut, or its tokens: open_clip has no words for it, and it is written without
        open_clip's config.
        """
        from open_clip.push_to_hf_hub import save_config_for_hf

        options: dict[str, Any] = {"config": self.config, "preprocess": self.preprocess}
        if self.sizes is not None:
            options["sizes"] = {tower: sizes.plain() for tower, sizes in self.sizes.items()}
        write_model_folder(folder, family=self.family, name=self.name, options=options)
        if self.kept is not None:
            (folder / KEPT_TOKENS).write_text(json.dumps(self.kept) + "\n", encoding="utf-8")
        if self.sizes is None and self.kept is None:
            save_config_for_hf(self.model, folder / NATIVE_CONFIG, model_config=self.config)
        write_tensors(folder / NATIVE_WEIGHTS, self.model.state_dict())
        if hasattr(self.tokenizer.native, "save_pretrained"):
            self.tokenizer.native.save_pretrained(folder)
        if has_transformers_text(self.model):
            self.model.text.config.save_pretrained(folder / TEXT_CONFIG)
