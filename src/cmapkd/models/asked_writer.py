"""A model that writes, asked the same questions about every picture: its odds of yes are the picture's embedding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from cmapkd.config import ConfigError
from cmapkd.data.dialogues import ChatItem, Turn, join_items
from cmapkd.data.types import TokenBatch
from cmapkd.models.base import DualEncoder
from cmapkd.models.generative import GenerativeModel
from cmapkd.models.images import ImageSpec
from cmapkd.models.no_texts import NoTexts
from cmapkd.models.types import Tower, TowerFeatures
from cmapkd.models.yes_no import first_tokens

_SIDE = 448  # pixels, of pictures of a model that reads any size


class AskedWriter(DualEncoder):
    """Reads pictures as an image tower does. An embedding holds log p(yes) - log p(no) of each question.

    Both are over the first tokens of answers, as in the released code of MaKD. Pictures are squared first, at the
    size of the model's vision tower where that has one.

    Args:
        questions: each is asked about every picture, in a dialogue of its own.
        at_once: dialogues that are read together.
    Raises:
        ConfigError: the model begins yes and no with the same token.
    """

    towers: tuple[Tower, ...] = ("image",)

    def __init__(self, model: GenerativeModel, questions: Sequence[str], *, at_once: int = 64) -> None:
        super().__init__()
        tokens = first_tokens(model)
        if tokens is None:
            raise ConfigError(f"{model.name} begins yes and no with the same token, so its first token tells neither")
        self.writer, self.questions, self.at_once, self.tokens = model, tuple(questions), at_once, tokens
        self.nothing = nn.Parameter(torch.zeros(()), requires_grad=False)  # of a scale: nobody compares it with texts
        self.name, self.embed_dim = model.name, len(self.questions)
        self.image_spec = ImageSpec(_side(model), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), fit="squash")
        self.tokenizer, self.image_levels, self.text_levels = NoTexts(), (), ()

    @property
    def log_logit_scale(self) -> nn.Parameter:
        return self.nothing

    @property
    def parts(self) -> Mapping[str, frozenset[str]]:
        names = frozenset(name for name, _ in self.writer.named_parameters(prefix="writer"))
        return {"image": names, "text": frozenset(), "projections": frozenset(), "scale": frozenset({"nothing"})}

    @torch.no_grad()
    def encode_image(self, images: Float[Tensor, "batch 3 height width"], levels: Sequence[str] = ()) -> TowerFeatures:
        """Log-odds [batch, questions]; without gradient, and on the host picture by picture."""
        self.check_levels("image", levels)
        pixels = (images.float() * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()
        items = [item for picture in pixels for item in self._asked(Image.fromarray(picture))]
        odds = [self._odds(items[start : start + self.at_once]) for start in range(0, len(items), self.at_once)]
        return TowerFeatures(torch.cat(odds).view(len(images), self.embed_dim))

    def encode_text(self, texts: TokenBatch, levels: Sequence[str] = ()) -> TowerFeatures:
        self.check_levels("text", levels)
        return TowerFeatures(self.nothing.new_empty(len(texts.ids), 0))

    def write(self, folder: Path) -> None:
        self.writer.write(folder)

    def _asked(self, picture: Image.Image) -> list[ChatItem]:
        read = self.writer.processor.read
        return [read((Turn("user", each, 1), Turn("assistant", "yes")), [picture]) for each in self.questions]

    def _odds(self, items: Sequence[ChatItem]) -> Float[Tensor, " dialogues"]:
        features = self.writer(join_items(items, self.writer.processor.pad_id).to(self.device))
        rows = features.hidden["answer"]
        first = torch.ones_like(rows.sample, dtype=torch.bool)
        first[1:] = rows.sample[1:] != rows.sample[:-1]
        logits = self.writer.logits(rows.values[first]).float()
        yes, no = (logits[:, self.tokens[word]].logsumexp(-1) for word in ("yes", "no"))
        return yes - no


def _side(model: GenerativeModel) -> int:
    """The side of the square pictures that the model's vision tower reads, where its config says one."""
    inner = getattr(getattr(getattr(model, "model", None), "config", None), "vision_config", None)
    side = getattr(inner, "image_size", None)
    return side if isinstance(side, int) else _SIDE
