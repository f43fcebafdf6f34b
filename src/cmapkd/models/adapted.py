"""`AdaptedEncoder`: a frozen model with an adapter behind its image tower, and pictures that stand for some classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import sqrt
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from cmapkd.config import ConfigError
from cmapkd.data.types import TokenBatch
from cmapkd.models.architecture import settings_text
from cmapkd.models.base import DualEncoder
from cmapkd.models.contracts import dual
from cmapkd.models.families import Loader
from cmapkd.models.parts import joined_parts, within
from cmapkd.models.storage import WEIGHTS, load_weights, read_weights, write_model_folder
from cmapkd.models.stored_towers import live_within
from cmapkd.models.texts import evaluating
from cmapkd.models.types import Level, TowerFeatures

WITHOUT_IT = "name the model without it, which is in the folder `model` within its own (student/model of a run)"
_NOT_OF_PICTURES = ("text", "scale", "context")  # parts that no embedding of a picture depends on


class VisualAdapter(nn.Module):
    """Embeddings x to N(relu(α W₂ relu(W₁ x) + (1 - α) x)), without biases, so that the length of x has no influence.

    Source: Peng et al. 2024, SgVA-CLIP, arXiv:2211.16191 (the form of its code; α begins at 0.5 and learns).
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(width, hidden, bias=False), nn.Linear(hidden, width, bias=False)
        self.alpha = nn.Parameter(torch.full((1,), 0.5))

    def forward(self, embedding: Float[Tensor, "... dim"]) -> Float[Tensor, "... dim"]:
        """Of length one and without negative numbers; zero where nothing is above zero."""
        changed = self.outer(F.relu(self.inner(embedding)))
        adapted: Tensor = F.normalize(F.relu(self.alpha * changed + (1 - self.alpha) * embedding), dim=-1)
        return adapted


class AdaptedEncoder(DualEncoder):
    """A model whose pictures are embedded twice: as it did, v, and by an adapter, a; both of length one.

    An image becomes [√p a, √(1-p) v, 0] and a text t [√p t, √(1-p) t, 0]: their cosine is p a·t + (1-p) v·t. A class
    whose pictures the model has seen is [√p P, √(1-p) w, r]: w is the vector of its texts, P the mean of its pictures'
    a, and r makes the length one. Its score is p a·P + (1-p) v·w. So evaluation, saving and loading need nothing else.

    Attributes:
        model: the model as it was given.
        adapter: behind its image tower.
        support, in_support: v of the pictures of each class, and which there are.
        share: p, in [0, 1].
    """

    support: Float[Tensor, "classes shots dim"]
    in_support: Bool[Tensor, "classes shots"]

    def __init__(
        self, model: DualEncoder, class_names: Sequence[str], *, shots: int, hidden: int, share: float
    ) -> None:
        super().__init__()
        self.model, self.class_names, self.share = model, tuple(class_names), share
        width, scale = model.embed_dim, model.log_logit_scale
        self.adapter = VisualAdapter(width, hidden).to(scale.device, scale.dtype)
        shape = len(self.class_names), shots
        # until there are pictures, nothing goes on with them
        self.register_buffer("support", scale.new_full((*shape, width), torch.nan).detach())
        self.register_buffer("in_support", torch.zeros(shape, dtype=torch.bool, device=scale.device))
        self.class_templates = model.class_templates
        self.name, self.embed_dim, self.tokenizer = model.name, 2 * width + 1, model.tokenizer
        self.image_spec, self.image_levels, self.text_levels = model.image_spec, model.image_levels, model.text_levels

    @property
    def architecture(self) -> str:
        return settings_text(self, self.model.architecture, self._options())

    @property
    def log_logit_scale(self) -> nn.Parameter:
        return self.model.log_logit_scale

    @property
    def logit_bias(self) -> Tensor | None:
        return self.model.logit_bias

    @property
    def parts(self) -> Mapping[str, frozenset[str]]:
        """Those of the model, and `adapter`."""
        own = frozenset(f"adapter.{name}" for name, _ in self.adapter.named_parameters())
        return joined_parts(within("model", self.model.parts), {"adapter": own})

    @property
    def why_towers_live(self) -> str | None:
        return live_within(self.model, "an adapted model")

    @property
    def image_blocks(self) -> tuple[nn.Module, ...]:
        return self.model.image_blocks

    def clamp_logit_scale(self) -> None:
        self.model.clamp_logit_scale()

    def encode_image(self, images: Float[Tensor, "batch 3 height width"], levels: Sequence[str] = ()) -> TowerFeatures:
        tower = self.model.encode_image(images, levels)
        return replace(tower, embedding=self._of_images(tower.embedding))

    def encode_text(self, texts: TokenBatch, levels: Sequence[str] = ()) -> TowerFeatures:
        tower = self.model.encode_text(texts, levels)
        unit = F.normalize(tower.embedding, dim=-1)
        return replace(tower, embedding=self._joined(unit, unit))

    def tokens_in_joint_space(self, level: Level) -> Float[Tensor, "batch tokens dim"]:
        return self._of_images(self.model.tokens_in_joint_space(level))

    def show(
        self, pictures: Float[Tensor, "pictures dim"], at: tuple[Int[Tensor, " pictures"], Int[Tensor, " pictures"]]
    ) -> None:
        """Takes v of pictures, in place of those that it has.

        Args:
            at: the class of each, and its place among that class's pictures.
        """
        self.support.zero_()[at] = pictures.to(self.support)
        self.in_support.zero_()[at] = True

    def prototypes(self) -> Float[Tensor, "classes dim"]:
        """The mean of the adapted pictures of each class, not normalised; zero for a class without pictures."""
        there = self.in_support.to(self.support.dtype)[..., None]
        adapted = self.adapter(torch.where(self.in_support[..., None], self.support, 0.0))
        means: Tensor = (adapted * there).sum(1) / there.sum(1).clamp_min(1)
        return means

    def class_rows(self, names: Sequence[str], texts: Float[Tensor, "classes dim"]) -> Float[Tensor, "classes dim"]:
        """The texts' vectors with pictures in their place, if the model has pictures of every one of these classes."""
        known = {name: number for number, name in enumerate(self.class_names) if bool(self.in_support[number].any())}
        if not known.keys() >= set(names):
            return texts
        with evaluating(self, self.device, None):
            rows = self.prototypes()[[known[name] for name in names]].to(texts)
        front = sqrt(self.share) * rows
        back = texts[:, front.shape[1] : -1]
        rest = (1 - front.square().sum(1) - back.square().sum(1)).clamp_min(0).sqrt()
        return torch.cat([front, back, rest[:, None]], dim=1)

    def _of_images(self, embedding: Float[Tensor, "... dim"]) -> Float[Tensor, "... joint"]:
        unit = F.normalize(embedding, dim=-1)
        return self._joined(self.adapter(unit), unit)

    def _joined(self, front: Float[Tensor, "... dim"], back: Float[Tensor, "... dim"]) -> Float[Tensor, "... joint"]:
        rows = torch.cat([sqrt(self.share) * front.to(back.dtype), sqrt(1 - self.share) * back], dim=-1)
        return F.pad(rows, (0, 1))

    def num_parameters(self) -> int:
        return self.model.num_parameters() + sum(parameter.numel() for parameter in self.adapter.parameters())

    def num_borrowed_parameters(self) -> int:
        return self.model.num_borrowed_parameters()

    def _options(self) -> dict[str, Any]:
        return {
            "class_names": [*self.class_names],
            "shots": self.support.shape[1],
            "hidden": self.adapter.inner.out_features,
            "share": self.share,
        }

    def write(self, folder: Path) -> None:
        own = {key: value for key, value in self.state_dict().items() if not key.startswith("model.")}
        write_model_folder(folder, family="adapted", name=self.name, options=self._options(), weights=own)
        self.model.save(folder / "model")


def check_kept_pictures(student: nn.Module) -> None:
    """Refuses to train an adapted model's image tower: its pictures of classes stay as that tower answered them once.

    Args:
        student: with what learns of it in the whole run.
    Raises:
        ConfigError: names the model, and what to train in its place.
    """
    for adapted in student.modules():
        if not isinstance(adapted, AdaptedEncoder):
            continue
        inner = adapted.model
        still = frozenset().union(*(names for part, names in inner.parts.items() if part in _NOT_OF_PICTURES))
        if any(parameter.requires_grad and name not in still for name, parameter in inner.named_parameters()):
            raise ConfigError(
                f"the student {adapted.name} has an adapter, and pictures of classes by its image tower as that was. "
                f"They would not follow a tower that learns: {WITHOUT_IT}, or set training.train_parts: [adapter]"
            )


def load(folder: Path, description: dict[str, Any], load_model: Loader) -> DualEncoder:
    """A folder that `AdaptedEncoder.save` wrote."""
    options = description["options"]
    inner = dual(load_model(folder / "model"), "an adapted model")
    model = AdaptedEncoder(
        inner, options["class_names"], shots=options["shots"], hidden=options["hidden"], share=options["share"]
    )
    weights = {key: value for key, value in model.state_dict().items() if key.startswith("model.")}
    load_weights(model, weights | read_weights(folder / WEIGHTS), where=folder)
    return model
