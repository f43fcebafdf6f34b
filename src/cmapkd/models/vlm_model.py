"""`AssembledVlm`: an image tower, a projector and a causal language model of any origin, in the form of LLaVA."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from cmapkd.data.dialogues import ChatInput
from cmapkd.models.architecture import settings_text
from cmapkd.models.hf_vlm import HfVlm
from cmapkd.models.lora import adapters_of, merged
from cmapkd.models.lora_files import write_adapters
from cmapkd.models.storage import write_model_folder
from cmapkd.models.token_types import EncodedShape, Rows, Seen
from cmapkd.models.types import LevelInfo
from cmapkd.models.vlm_language import save_language
from cmapkd.models.vlm_rows import grid_rows
from cmapkd.models.vlm_tower import Projector, VisualTokens

LANGUAGE, PROCESSOR = "language", "processor"  # inside a model folder


class AssembledVlm(HfVlm):
    """Vision levels are those of the image tower, under its own names.

    Parts that do not learn stay in eval mode: nothing in them is dropped, and batch norms keep their statistics.
    """

    @property
    def vision(self) -> VisualTokens:
        found: VisualTokens = self.model.model.vision_tower
        return found

    @property
    def encoded_shape(self) -> EncodedShape:
        return EncodedShape(self.vision.count, self.vision.width)

    @property
    def architecture(self) -> str:
        vision = self.vision
        return settings_text(self, vision.tower.describe(), vision.level, self.model.model.multi_modal_projector.kind)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self._settle()
        return self

    def see(self, inputs: ChatInput) -> Seen:
        self._settle()
        return super().see(inputs)

    def write(self, folder: Path) -> None:
        """Ours: one weight file, the config of each part, and transformers' processor. Adapters are merged."""
        options = self.write_settings(folder)
        with merged(self.model):
            weights = self.state_dict()
            if self.tied:
                del weights["model.lm_head.weight"]
            write_model_folder(folder, family="vlm", name=self.name, options=options, weights=weights)
        if adapters_of(self.model):
            write_adapters(self.model, folder / "adapters", base=self.name)

    def write_settings(self, folder: Path) -> dict[str, Any]:
        """All but the weights. What it returns must be kept too: `vlm_family.blank` needs both."""
        projector: Projector = self.model.model.multi_modal_projector
        self.vision.tower.save_config(folder)
        save_language(self._language.config, self.model.generation_config, folder / LANGUAGE)
        self.processor.native.save_pretrained(folder / PROCESSOR)
        return {
            "image": self.vision.tower.describe(),
            "level": self.vision.level,
            "projector": projector.kind,
            "max_tokens": self.processor.max_tokens,
        }

    @property
    def tied(self) -> bool:
        """Whether the head is the table of words."""
        tied: bool = self.model.lm_head.weight is self._language.embed_tokens.weight
        return tied

    def _image_levels(self) -> tuple[LevelInfo, ...]:
        return self.vision.tower.levels

    @contextmanager
    def _vision_outputs(self, levels: Sequence[str]) -> Iterator[dict[str, Tensor]]:
        self._settle()
        with self.vision.keeping(levels) as kept:
            yield kept

    def _patches(self, values: Tensor | None, inputs: ChatInput, *, width: int) -> Rows:
        if values is None:
            return super()._patches(values, inputs, width=width)
        return grid_rows(values, inputs.extents["pixel_values"])

    def _settle(self) -> None:
        for part in (self.vision, self.model.model.multi_modal_projector, self._language):
            mode = self.training and any(parameter.requires_grad for parameter in part.parameters())
            if part.training != mode:
                part.train(mode)


def joined(vision: VisualTokens, projector: Projector, language: Any, picture: int) -> Any:
    """transformers' LLaVA around the parts.

    Args:
        language: a causal language model.
        picture: the token that stands for a picture.
    """
    from transformers import LlavaConfig, LlavaForConditionalGeneration, SiglipVisionConfig

    size = vision.tower.spec.size
    stand_in = SiglipVisionConfig(
        hidden_size=vision.width,
        intermediate_size=1,
        num_hidden_layers=1,
        num_attention_heads=1,
        image_size=size,
        patch_size=size,
    )
    config = LlavaConfig(
        vision_config=stand_in,  # of a tower that is exchanged below: it has the sizes that others ask for
        text_config=language.config,
        image_token_index=picture,
        image_seq_length=vision.count,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        tie_word_embeddings=bool(language.config.tie_word_embeddings),
    )
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    model.model.vision_tower, model.model.multi_modal_projector = vision, projector
    model.model.language_model, model.lm_head = language.base_model, language.lm_head
    model.generation_config = language.generation_config
    return model
