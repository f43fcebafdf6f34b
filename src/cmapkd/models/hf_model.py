"""`HfModel`: a CLIP or SigLIP model of transformers behind our contract."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cmapkd.config import ConfigError
from cmapkd.config.disk import usual_rights
from cmapkd.data.types import TokenBatch
from cmapkd.models.base import NO_TOKENS, DualEncoder
from cmapkd.models.cut_words import configs_in, cut_native, cut_table, renumber
from cmapkd.models.hf_tokenizer import HfTokenizer
from cmapkd.models.images import ImageSpec
from cmapkd.models.parts import split_by_name
from cmapkd.models.storage import load_weights, read_weights, write_model_folder
from cmapkd.models.types import Level, LevelInfo, TowerFeatures

_FILTERS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # PIL's numbers, as processor configs store them


class HfModel(DualEncoder):
    """Wraps `CLIPModel` or `SiglipModel`. Levels are `blocks.N`, the output of block N of either tower.

    CLIP pools at the tokenizer's end token. Its texts are padded on the right and its attention is causal, so a real
    token sees no padding, and the mask is not given to the model: transformers would make the host wait to look at it.
    SigLIP was trained on texts padded to full length without a mask, and is run that way, as transformers documents.
    The mask of the levels marks the real tokens; what stands behind them means nothing.
    """

    tokenizer: HfTokenizer

    def __init__(self, model: Any, *, tokenizer: HfTokenizer, processor: Any, name: str) -> None:
        super().__init__()
        self.model: Any = model
        self.name, self.tokenizer, self.processor = name, tokenizer, processor
        config = self.model.config
        self.model_type: str = config.model_type
        self._end_id: int = tokenizer.native.eos_token_id  # CLIP pools there: `hf_family` checks that there is one
        vision, text = config.vision_config, config.text_config
        self.embed_dim = int(config.projection_dim if self.model_type == "clip" else text.projection_size)
        self.image_spec = image_spec(processor.to_dict(), vision.image_size)
        self.image_levels = _blocks(vision)
        self.text_levels = _blocks(text)

    @property
    def log_logit_scale(self) -> nn.Parameter:
        parameter: nn.Parameter = self.model.logit_scale
        return parameter

    @property
    def logit_bias(self) -> Tensor | None:
        bias: Tensor | None = getattr(self.model, "logit_bias", None)
        return None if bias is None else bias.reshape(())

    def clamp_logit_scale(self) -> None:
        """CLIP's clamp; not for SigLIP (arXiv:2303.15343), which has none and ends above 100."""
        if self.logit_bias is None:
            super().clamp_logit_scale()

    @property
    def parts(self) -> Mapping[str, frozenset[str]]:
        """SigLIP's image tower ends in attention pooling and has no projection; its text tower's head is one."""
        projections = ("visual_projection", "text_projection", "text_model.head")
        prefixes = {
            "image": ("model.vision_model",),
            "text": ("model.text_model",),
            "projections": [f"model.{name}" for name in projections],
            "scale": ("model.logit_scale", "model.logit_bias"),
        }
        return split_by_name((name for name, _ in self.named_parameters()), prefixes)

    @property
    def image_blocks(self) -> tuple[nn.Module, ...]:
        return tuple(self.model.vision_model.encoder.layers)

    @property
    def token_embedding(self) -> nn.Module:
        table: nn.Module = self.model.text_model.embeddings.token_embedding
        return table

    def encode_image(self, images: Float[Tensor, "batch 3 height width"], levels: Sequence[str] = ()) -> TowerFeatures:
        self.check_levels("image", levels)
        # The towers and not `get_image_features`, whose return type changed in transformers 5; tested to be equal.
        output = self.model.vision_model(pixel_values=images, output_hidden_states=bool(levels))
        pooled = output.pooler_output
        embedding = self.model.visual_projection(pooled) if self.model_type == "clip" else pooled
        patch = self.model.config.vision_config.patch_size
        grid = (images.shape[-2] // patch, images.shape[-1] // patch)
        num_prefix = 1 if self.model_type == "clip" else 0
        kept = {name: Level(value, "tokens", num_prefix, grid) for name, value in _take(output, levels).items()}
        return TowerFeatures(embedding, kept)

    def tokens_in_joint_space(self, level: Level) -> Float[Tensor, "batch tokens dim"]:
        if self.model_type != "clip":
            raise ValueError(f"{self.name} {NO_TOKENS}: its image tower pools them by attention")
        projected: Tensor = self.model.visual_projection(self.model.vision_model.post_layernorm(level.values))
        return projected

    def encode_text(self, texts: TokenBatch, levels: Sequence[str] = ()) -> TowerFeatures:
        self.check_levels("text", levels)
        output = self.model.text_model(input_ids=texts.ids, output_hidden_states=bool(levels))
        embedding = output.pooler_output
        if self.model_type == "clip":
            # Not the library's pooling: with the `eos_token_id: 2` of old configs it takes the highest id of a text.
            end = torch.eq(texts.ids, self._end_id).int().argmax(-1)
            rows = torch.arange(end.shape[0], device=end.device)  # a graph of any batch knows no len()
            embedding = self.model.text_projection(output.last_hidden_state[rows, end])
        kept = {name: Level(value, "tokens", mask=texts.mask) for name, value in _take(output, levels).items()}
        return TowerFeatures(embedding, kept)

    def with_words_of(self, texts: Iterable[str]) -> HfModel:
        read, config = self.tokenizer, self.model.config
        native, kept = cut_native(read.native, texts, name=self.name, clean=read.clean)
        cut_table(self.model.text_model.embeddings.token_embedding, kept)
        numbers = {old: new for new, old in enumerate(kept)}
        for each in configs_in(config):
            renumber(each, numbers)
        config.text_config.vocab_size = len(kept)
        if self.model_type == "clip":
            config.text_config.eos_token_id = self.model.text_model.eos_token_id = native.eos_token_id
        self.tokenizer, self._end_id = read.over(native), native.eos_token_id
        return self

    def load_checkpoint(self, path: str | Path, *, averaged: bool = False) -> None:
        weights = read_weights(path, averaged=averaged)
        ours = all(key.startswith("model.") for key in weights)
        load_weights(self if ours else self.model, _without_positions(weights), where=path)

    def write(self, folder: Path) -> None:
        """Ours, and transformers' own: the Auto classes read model, tokenizer and image processor from the folder."""
        options = {"model_type": self.model_type, "context_length": self.tokenizer.context_length}
        write_model_folder(folder, family="hf", name=self.name, options=options)
        if self.model_type == "clip":  # one tower alone is built by its own config
            for part in (self.model.config.text_config, self.model.config.vision_config):
                part.projection_dim = self.embed_dim
        self.model.save_pretrained(folder)
        usual_rights(folder.glob("*.safetensors"))
        self.tokenizer.native.save_pretrained(folder)
        self.processor.save_pretrained(folder)


def image_spec(processor: Mapping[str, Any], image_size: int) -> ImageSpec:
    """A transformers image processor in our terms.

    Raises:
        ConfigError: it resizes to something other than the square that the model takes.
    """
    size, crop = dict(processor.get("size") or {}), dict(processor.get("crop_size") or {})
    cropped = bool(processor.get("do_center_crop")) and bool(crop)
    if cropped and size.get("shortest_edge"):
        fits = size["shortest_edge"] == crop.get("height") == crop.get("width") == image_size
    else:
        fits = size.get("height") == size.get("width") == image_size
    if not fits or not processor.get("do_resize", True):
        raise ConfigError(
            f"the image processor resizes to {size}{f' and crops to {crop}' if cropped else ''}, the model takes "
            f"{image_size} x {image_size} pixels: set size (and crop_size) to that in preprocessor_config.json."
        )
    normalised = processor.get("do_normalize", True)
    mean = tuple(processor["image_mean"]) if normalised else (0.0, 0.0, 0.0)
    std = tuple(processor["image_std"]) if normalised else (1.0, 1.0, 1.0)
    resample = int(processor.get("resample", 3))
    if resample not in _FILTERS:
        raise ConfigError(f"the image processor's resample {resample} is not supported, only {_FILTERS}")
    return ImageSpec(
        image_size,
        mean=mean,
        std=std,
        interpolation=_FILTERS[resample],  # type: ignore[arg-type]
        fit="crop" if cropped and size.get("shortest_edge") else "squash",
    )


def _blocks(config: Any) -> tuple[LevelInfo, ...]:
    return tuple(LevelInfo(f"blocks.{n}", config.hidden_size, "tokens") for n in range(config.num_hidden_layers))


def _take(output: Any, levels: Sequence[str]) -> dict[str, Tensor]:
    """`hidden_states` starts with the embeddings: block N's output is number N + 1."""
    return {name: output.hidden_states[int(name.removeprefix("blocks.")) + 1] for name in levels}


def _without_positions(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Older transformers saved `position_ids`, which are only 0, 1, 2, ..."""
    return {key: value for key, value in weights.items() if not key.endswith(".position_ids")}
