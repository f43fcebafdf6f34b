"""An exported folder as a `DualEncoder`, so that whatever measures a model measures its files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from cmapkd.data.types import TokenBatch
from cmapkd.export.check import open_session
from cmapkd.models import DualEncoder
from cmapkd.models.types import TowerFeatures


class GraphEncoder(DualEncoder):
    """Runs `vision_model` and `text_model` in onnxruntime, behind the model's own preprocessing and tokenizer.

    Args:
        model: what was exported; nothing of its towers is used.
    """

    def __init__(self, model: DualEncoder, vision: Path, text: Path) -> None:
        super().__init__()
        self.name, self.embed_dim = model.name, model.embed_dim
        self.image_spec, self.tokenizer = model.image_spec, model.tokenizer
        self.image_levels = self.text_levels = ()
        self._scale = nn.Parameter(model.log_logit_scale.detach().clone())
        self._bias = model.logit_bias
        self._vision, self._text = open_session(vision), open_session(text)
        self._text_inputs = [each.name for each in self._text.get_inputs()]

    @property
    def log_logit_scale(self) -> nn.Parameter:
        return self._scale

    @property
    def logit_bias(self) -> Tensor | None:
        return self._bias

    @property
    def parts(self) -> dict[str, frozenset[str]]:
        return {"image": frozenset(), "text": frozenset(), "projections": frozenset(), "scale": frozenset({"_scale"})}

    def encode_image(self, images: Float[Tensor, "batch 3 height width"], levels: Sequence[str] = ()) -> TowerFeatures:
        self.check_levels("image", levels)
        return _features(self._vision.run(None, {"pixel_values": images.numpy()})[0])

    def encode_text(self, texts: TokenBatch, levels: Sequence[str] = ()) -> TowerFeatures:
        self.check_levels("text", levels)
        feed = {"input_ids": texts.ids.numpy(), "attention_mask": texts.mask.long().numpy()}
        return _features(self._text.run(None, {name: feed[name] for name in self._text_inputs})[0])

    def save(self, folder: Path) -> None:  # noqa: ARG002  as it is called
        raise ValueError("an exported file is no model that can be saved: save the model that it was made from")


def _features(embedding: np.ndarray) -> TowerFeatures:
    return TowerFeatures(torch.from_numpy(embedding.astype(np.float32)))
