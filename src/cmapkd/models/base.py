"""`Model`, `ImageEncoder`, `DualEncoder`: what a model looks like to the rest of cmapkd, whatever its library."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar, Literal, Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cmapkd.config import ConfigError, closest
from cmapkd.data.types import ModelInput, TokenBatch
from cmapkd.models.architecture import settings_text
from cmapkd.models.embedding import Embeddings, Picture, embedded_images, embedded_texts
from cmapkd.models.images import ImageSpec
from cmapkd.models.parts import undecayed
from cmapkd.models.prunable import PrunableTower, TowerSizes
from cmapkd.models.storage import load_weights, read_weights
from cmapkd.models.stored_towers import StoredTowers
from cmapkd.models.types import BOTH, Features, Level, LevelInfo, LevelRequest, StatedCosts, Tower, TowerFeatures

__all__ = ["MAX_LOGIT_SCALE", "DualEncoder", "ImageEncoder", "ImageSpec", "Model", "Tokenizer", "eval_mode"]

NO_TOKENS = "has no image tokens in the joint space"
MAX_LOGIT_SCALE = 100.0  # CLIP, arXiv:2103.00020, section 2.5: clipped to keep training stable


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode; afterwards every module is back in the mode it had, also a frozen part's eval."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


class Tokenizer(Protocol):
    """Texts to ids, the model's own way. Picklable: it works inside data workers."""

    context_length: int
    vocab_size: int

    def __call__(self, texts: str | Sequence[str], *, spans: bool = False) -> TokenBatch:
        """Ids and padding mask of `texts`, one or many, truncated to `context_length`.

        Args:
            spans: whether to say where each token stands, which costs time; see `TokenBatch.spans`.
        """
        ...


class Model(nn.Module, ABC):
    """What the trainer, averages, checkpoints and reports ask of any model, whatever it computes.

    Attributes:
        name: how the model is named in recipes, for messages and reports.
        does: what a model of this contract does, for messages.
        held: names of parameters that are held in bf16 in place of their own numbers, see `held_weights`.
    """

    name: str
    does: ClassVar[str]
    held: frozenset[str] = frozenset()

    @property
    def device(self) -> torch.device:
        """Where the model's parameters are. A model has one device."""
        return next(self.parameters()).device

    @property
    @abstractmethod
    def parts(self) -> Mapping[str, frozenset[str]]:
        """Names of parameters by part. Every parameter is in exactly one part; a part may be empty."""

    @property
    def architecture(self) -> str:
        """Settings that change what the model answers and that no weight shows, as text; part of a cache's identity."""
        return settings_text(self)

    def no_weight_decay(self) -> frozenset[str]:
        """Names of parameters that are never decayed: positions, class and register tokens, logit scale and bias, and
        those that the model's own library lists. Vectors need not be listed, since optimizers leave them out."""
        return undecayed(self)

    def after_step(self) -> None:
        """Called after each optimizer step, on every process: keeps parameters in the range that the model allows."""

    def measurements(self) -> dict[str, Tensor]:
        """Scalars worth logging, detached, on the model's device: reading them is left to who logs them."""
        return {}

    def save(self, folder: str | Path) -> None:
        """Writes weights (safetensors), architecture and tokenizer so that `cmapkd.load(folder)` reads them back.

        Args:
            folder: made where it is missing; files of an earlier save in it are replaced.
        Raises:
            ValueError: weights are held in bf16.
        """
        self.check_own_weights()
        self.write(Path(folder))

    def check_own_weights(self) -> None:
        """Refuses a model that has rounded weights in place of its own.

        Raises:
            ValueError: weights are held in bf16.
        """
        if self.held:
            raise ValueError(
                f"{len(self.held)} weights of {self.name} are held in bf16, to answer under autocast: load the model "
                "again for its own weights"
            )

    @abstractmethod
    def write(self, folder: Path) -> None:
        """What `save` does, in the way of the family."""

    def load_checkpoint(self, path: str | Path, *, averaged: bool = False) -> None:
        """Loads a weight file over this model; adapters also take their library's own names.

        Args:
            averaged: the moving average that a training script kept beside the weights, in place of the weights.
        Raises:
            ValueError: the file is missing or unsafe, or any name or shape does not fit.
        """
        load_weights(self, read_weights(path, averaged=averaged), where=path)

    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    def num_borrowed_parameters(self) -> int:
        """How many of `num_parameters` are another model's, as the teacher's text tower that a student is read with."""
        return 0


class ImageEncoder(StoredTowers, Model):
    """Embeds pictures: what models of two towers and classifiers have in common.

    Attributes:
        embed_dim: width of the embeddings.
        image_spec: the model's own resize and normalisation.
        tokenizer: the model's own tokenizer; of one that reads no texts a stand-in.
        image_levels: the intermediate outputs that can be asked for, shallow to deep.
        random_towers: the towers that have random weights, of a model that was just built; () once it was trained.
    """

    does: ClassVar[str] = "embeds pictures"
    embed_dim: int
    image_spec: ImageSpec
    tokenizer: Tokenizer
    image_levels: tuple[LevelInfo, ...]
    random_towers: tuple[Tower, ...] = ()

    @property
    def image_blocks(self) -> tuple[nn.Module, ...]:
        """The image tower's blocks in their order, where each maps [batch tokens width] to the same, for any number of
        tokens; empty for other towers."""
        return ()

    @abstractmethod
    def encode_image(self, images: Float[Tensor, "batch 3 height width"], levels: Sequence[str] = ()) -> TowerFeatures:
        """Image embedding [batch, embed_dim], not normalised, and the named levels.

        Args:
            images: normalised pixels: `image_spec(picture)` of each, or `image_spec.to_model` of a batch's pixels.
        Raises:
            ValueError: a level that this tower does not have.
        """

    def check_levels(self, tower: Literal["image", "text"], asked: Sequence[str]) -> None:
        """Refuses a level this tower does not have, naming the closest ones."""
        known = [level.name for level in getattr(self, f"{tower}_levels")]
        for name in asked:
            if name not in known:
                raise ValueError(
                    f"{self.name} has no {tower} level {name!r}{closest(name, known)}. "
                    f"It has: {', '.join(known) or 'none'}."
                )


class DualEncoder(ImageEncoder):
    """An image tower and a text tower that meet in one embedding space.

    Its parts are `image`, `text`, `projections` and `scale`. A model that something was added to names that as a
    further part.

    Attributes:
        embed_dim: width of the joint space.
        text_levels: as `image_levels`, of the text tower.
        towers: those that it has; a model of pictures alone can only be a further teacher.
        assumed_activation: `gelu` or `quick_gelu` where a checkpoint was loaded that may want the other; None: known.
        class_templates: prompts with `{}` that its text tower was tuned to; classifiers of it are made of these and no
            others. None: of those that are asked for.
    """

    does: ClassVar[str] = "embeds pictures and texts"
    text_levels: tuple[LevelInfo, ...]
    assumed_activation: Literal["gelu", "quick_gelu"] | None = None
    towers: tuple[Tower, ...] = BOTH
    class_templates: tuple[str, ...] | None = None

    @property
    @abstractmethod
    def log_logit_scale(self) -> nn.Parameter:
        """The learned log of the logit scale, as the library stores it."""

    @property
    def logit_bias(self) -> Tensor | None:
        """The learned bias added to the logits (SigLIP); None where the model has none."""
        return None

    @property
    def whole_texts(self) -> str | None:
        """Why texts are always padded to the tokenizer's `context_length`; None: to the longest text of their batch.

        A tower may leave out the padding that all texts of a batch share where nothing that is read depends on it: the
        attention is causal, or masks padding, and what is pooled is a real token. A family says so to its tokenizer,
        as `whole_because`, and the tokenizer gives tokens that are `TokenBatch.measured` where there is no reason.
        """
        because: str | None = getattr(self.tokenizer, "whole_because", None)
        return because

    @property
    def token_embedding(self) -> nn.Module | None:
        """What makes vectors [batch tokens width] of the ids of a text; None where it cannot be reached."""
        return None

    @property
    def prunable(self) -> Mapping[Tower, PrunableTower]:
        """What can be taken out of each tower, and where it stands in the weights; empty where nothing can be."""
        return {}

    def resized(self, sizes: Mapping[Tower, TowerSizes]) -> DualEncoder:  # noqa: ARG002  for those that can be
        """A model like this one with towers of these sizes, whose weights are yet to be set; of a `prunable` model.

        Raises:
            ValueError: this model's towers have one size.
        """
        raise ValueError(f"{self.name} cannot have towers of other sizes")

    @abstractmethod
    def encode_text(self, texts: TokenBatch, levels: Sequence[str] = ()) -> TowerFeatures:
        """Text embedding [batch, embed_dim], not normalised, and the named levels."""

    def class_rows(self, names: Sequence[str], texts: Tensor) -> Float[Tensor, "classes dim"]:  # noqa: ARG002
        """Unit vectors that classify: those of the classes' texts [classes dim], unless it knows a name by pictures."""
        return texts

    def tokens_in_joint_space(self, level: Level) -> Float[Tensor, "batch tokens dim"]:
        """Every token of the last image level, by the tower's own norm and projection; not normalised.

        Where the tower pools its class token, that token's row is the embedding. Nothing trained the others' rows.

        Args:
            level: the last of `image_levels`, as `encode_image` gives it.
        Raises:
            ValueError: the tower has no tokens, or no way from one of them to the joint space.
        """
        del level
        raise ValueError(f"{self.name} {NO_TOKENS}: its image tower is no plain ViT of tiny, open_clip, timm or hf")

    def stated_costs(self) -> StatedCosts | None:
        """What the model's files say that it costs; None where torch can measure it."""
        return None

    def activation_twin(self) -> DualEncoder | None:
        """The same weights with the other activation, on the same device; None where none is assumed."""
        return None

    def with_tokenizer_of(self, other: DualEncoder) -> DualEncoder:  # noqa: ARG002  for models that can take another's
        """This model, or an untrained one like it, that reads texts as `other` does, if the family can."""
        return self

    def with_words_of(self, texts: Iterable[str]) -> DualEncoder:  # noqa: ARG002  for models whose words can be cut
        """This model with the tokens that the texts need, control tokens, and bytes or letters for all other words.

        The texts have the same tokens as before under other ids, and so the same embeddings. May change this model.

        Raises:
            ConfigError: its words cannot be cut.
        """
        raise ConfigError(
            f"vocabulary: texts is not for {self.name}: leave it out. It is for models of open_clip:, timm:, hf: and "
            "parts: (a tiny model learns its own words, see its option vocab_size)"
        )

    def forward(self, inputs: ModelInput, needs: LevelRequest | None = None) -> Features:
        needs = needs or LevelRequest()
        image = text = TowerFeatures(self.log_logit_scale.new_empty(len(inputs.texts.ids), 0))
        if "image" in needs.towers:
            image = self.encode_image(self.image_spec.to_model(inputs.images), needs.image_levels)
        if "text" in needs.towers:
            text = self.encode_text(inputs.texts, needs.text_levels)
        return Features(
            image=image,
            text=text,
            logit_scale=self.log_logit_scale.exp().reshape(()),  # some libraries store it as a vector of one
            logit_bias=self.logit_bias,
            more_texts={
                pool: self.encode_text(texts)
                for pool, texts in inputs.more_texts.items()
                if needs.pools is None or pool in needs.pools
            },
            more_images={view: self.encode_image(self.image_spec.to_model(inputs[view])) for view in needs.views},
        )

    @torch.no_grad()
    def embed(
        self,
        images: Picture | Iterable[Picture] | None = None,
        texts: str | Iterable[str] | None = None,
        *,
        batch_size: int = 64,
    ) -> Embeddings:
        """Unit embeddings of pictures and texts, by the model's own preprocessing and tokenizer.

        The model computes on the device where it is, in eval mode, without gradient; its modes are restored after.

        Args:
            images: paths, bytes of image files or PIL images, one or many; an iterator is read batch by batch.
            texts: one text or many.
            batch_size: how many are encoded at once; without influence on the result beyond rounding.
        Raises:
            ValueError: neither images nor texts are given, or `batch_size` is below 1.
            FileNotFoundError: a picture's file is not there.
            BadSampleError: a picture cannot be read; the message names it.
            TypeError: an item is no picture, or no text.
        """
        if images is None and texts is None:
            raise ValueError("embed() got neither images nor texts: give one of them, or both")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}: give a whole number >= 1")
        dim = self.embed_dim
        with eval_mode(self):
            return Embeddings(
                None
                if images is None
                else embedded_images(images, self.image_spec, self._of_pixels, dim=dim, batch_size=batch_size),
                None if texts is None else embedded_texts(texts, self._of_texts, dim=dim, batch_size=batch_size),
            )

    def _of_pixels(self, pixels: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch dim"]:
        return self.encode_image(pixels.to(self.device)).embedding

    def _of_texts(self, texts: list[str]) -> Float[Tensor, "batch dim"]:
        return self.encode_text(self.tokenizer(texts).to(self.device)).embedding

    def after_step(self) -> None:
        if self.log_logit_scale.requires_grad:  # a frozen one stays as it is
            self.clamp_logit_scale()

    def measurements(self) -> dict[str, Tensor]:
        return {"logit_scale": self.log_logit_scale.detach().exp().reshape(())}

    @torch.no_grad()
    def clamp_logit_scale(self) -> None:
        """Keeps the logit scale within [1, 100], as CLIP does after every step."""
        self.log_logit_scale.clamp_(0.0, math.log(MAX_LOGIT_SCALE))
