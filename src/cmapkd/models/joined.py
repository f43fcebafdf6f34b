"""`JoinedEncoder`: one model's image tower in the joint space of another, whose text tower it is paired with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from cmapkd.data.types import TokenBatch
from cmapkd.models.base import DualEncoder
from cmapkd.models.contracts import dual
from cmapkd.models.families import Loader
from cmapkd.models.heads import ProjectorKind, make_projector
from cmapkd.models.parts import joined_parts, split_by_name, within
from cmapkd.models.prompts import DeepPrompts
from cmapkd.models.reach import example_output, parameters_behind
from cmapkd.models.storage import WEIGHTS, load_weights, read_weights, write_model_folder
from cmapkd.models.stored_towers import live_within
from cmapkd.models.teacher import FrozenTeacher
from cmapkd.models.types import Level, TowerFeatures

_MODELS = ("image.", "text.")  # parts that are saved as models of their own


class JoinedEncoder(DualEncoder):
    """A student's image tower, with prompts inside and a projector behind it, beside its teacher's frozen text tower.

    What a method trains whose classifier is made of the teacher's texts: images are embedded where those are, so the
    result is a dual encoder that is evaluated, saved and loaded as any other. Of a frozen teacher the text tower is no
    submodule: it is in no checkpoint and no wrapper. The saved folder has it, whole, so that the folder is complete.

    Attributes:
        image: the student as it was given; its own text tower is not used.
        project: from its embeddings to the teacher's width.
        prompts: inside its image tower; None without.
    """

    def __init__(
        self,
        image: DualEncoder,
        text: FrozenTeacher | DualEncoder,
        *,
        projector: ProjectorKind,
        prompts: DeepPrompts | None = None,
    ) -> None:
        super().__init__()
        self.image, self.projector_kind = image, projector
        self._frozen = text if isinstance(text, FrozenTeacher) else None
        if self._frozen is not None:
            self._frozen.shared = True  # this model is saved with its weights, and evaluated in fp32
        self.text = text if isinstance(text, DualEncoder) else None
        self.prompts = prompts
        self.project = make_projector(projector, image.embed_dim, text.embed_dim).to(image.log_logit_scale.dtype)
        self.name = image.name
        self.embed_dim = text.embed_dim if projector != "none" else image.embed_dim
        if self.embed_dim != text.embed_dim:
            raise ValueError(
                f"{image.name} embeds in {image.embed_dim} numbers and {text.name} in {text.embed_dim}: a "
                "projector has to map one to the other"
            )
        self.image_spec, self.image_levels = image.image_spec, image.image_levels
        self.tokenizer, self.text_levels = self.text_model.tokenizer, self.text_model.text_levels

    @classmethod
    def at_width(cls, image: DualEncoder, text: FrozenTeacher) -> JoinedEncoder:
        """With a linear map where the widths differ, and none where they agree."""
        return cls(image, text, projector="none" if image.embed_dim == text.embed_dim else "linear")

    @property
    def text_model(self) -> DualEncoder:
        """The model whose text tower this is."""
        if self.text is not None:
            return self.text
        assert self._frozen is not None
        model: DualEncoder = self._frozen.model
        return model

    @property
    def log_logit_scale(self) -> nn.Parameter:
        return self.image.log_logit_scale

    @property
    def logit_bias(self) -> Tensor | None:
        return self.image.logit_bias

    @property
    def parts(self) -> Mapping[str, frozenset[str]]:
        """Those of the student, with the projector among its projections; `prompts` where there are any.

        A text model that this one owns, as a loaded folder does, is in them part by part.
        """
        prefixes = {"projections": ("project",), "prompts": ("prompts",)}
        names = [name for name, _ in self.named_parameters() if not name.startswith(_MODELS)]
        own = {part: found for part, found in split_by_name(names, prefixes).items() if found or part != "prompts"}
        text = {} if self.text is None else within("text", self.text.parts)
        return joined_parts(within("image", self.image.parts), text, own)

    @property
    def why_towers_live(self) -> str | None:
        return live_within(self.image, "a joined model")

    @property
    def image_blocks(self) -> tuple[nn.Module, ...]:
        return self.image.image_blocks

    @property
    def token_embedding(self) -> nn.Module | None:
        return self.text_model.token_embedding

    def clamp_logit_scale(self) -> None:
        self.image.clamp_logit_scale()

    def encode_image(self, images: Float[Tensor, "batch 3 height width"], levels: Sequence[str] = ()) -> TowerFeatures:
        tower = self.before_projector(images, levels)
        return replace(tower, embedding=self.project(tower.embedding))

    def tokens_in_joint_space(self, level: Level) -> Float[Tensor, "batch tokens dim"]:
        tokens = self.image.tokens_in_joint_space(level)
        projected: Tensor = self.project(tokens.flatten(0, 1))  # whose batch norm takes rows
        rows: Tensor = projected.unflatten(0, tokens.shape[:2])
        return rows

    def before_projector(self, images: Tensor, levels: Sequence[str] = ()) -> TowerFeatures:
        """The image tower's own embedding; a projector that normalises over the batch wants the whole of it."""
        if self.prompts is None:
            return self.image.encode_image(images, levels)
        with self.prompts.inside(self.image.image_blocks):
            tower = self.image.encode_image(images, levels)
        kept = {}
        for name, level in tower.levels.items():  # a library that notes what a block returns may note the prompts too
            places = level.num_prefix + level.grid[0] * level.grid[1] if level.grid else level.values.shape[1]
            kept[name] = replace(level, values=level.values[:, :places])
        return replace(tower, levels=kept)

    def encode_text(self, texts: TokenBatch, levels: Sequence[str] = ()) -> TowerFeatures:
        if self._frozen is not None:
            self._frozen.to(texts.ids.device)
        return self.text_model.encode_text(texts, levels)

    def freeze_unused(self, *, scale: bool = True) -> None:
        """Freezes what no picture's embedding depends on: the student's own text tower, its logit scale and bias.

        Args:
            scale: whether the logit scale is frozen, too; a method whose loss reads it keeps it.
        """
        used = parameters_behind(self, partial(example_output, self, "image"))
        for name, parameter in self.named_parameters():
            if name not in used and (scale or parameter is not self.log_logit_scale):
                parameter.requires_grad_(False)

    def num_parameters(self) -> int:
        """Of the two towers that are used: the student's for images, with all that was added, and the teacher's."""
        sizes = {name: parameter.numel() for name, parameter in self.named_parameters()}
        own = sum(sizes[name] for name in parameters_behind(self, partial(example_output, self, "image")))
        scales = [self.log_logit_scale] + ([] if self.logit_bias is None else [self.logit_bias])
        return own + sum(scale.numel() for scale in scales) + self.num_borrowed_parameters()

    def num_borrowed_parameters(self) -> int:
        text = self.text_model
        sizes = {name: parameter.numel() for name, parameter in text.named_parameters()}
        return sum(sizes[name] for name in parameters_behind(text, partial(example_output, text, "text")))

    def write(self, folder: Path) -> None:
        tokens = None if self.prompts is None else self.prompts.tokens.shape
        options = {"projector": self.projector_kind, "prompts": None if tokens is None else [*tokens]}
        own = {key: value for key, value in self.state_dict().items() if not key.startswith(_MODELS)}
        write_model_folder(folder, family="joined", name=self.name, options=options, weights=own)
        self.image.save(folder / "image")
        self.text_model.save(folder / "text")


def load(folder: Path, description: dict[str, Any], load_model: Loader) -> DualEncoder:
    """A folder that `JoinedEncoder.save` wrote."""
    options = description["options"]
    shape = options["prompts"]
    prompts = None if shape is None else DeepPrompts(shape[2], depth=shape[0], count=shape[1])
    image, text = (dual(load_model(folder / part), "a joined model") for part in ("image", "text"))
    model = JoinedEncoder(image, text, projector=options["projector"], prompts=prompts)
    weights = {key: value for key, value in model.state_dict().items() if key.startswith(_MODELS)}
    if weights.keys() != model.state_dict().keys():
        weights |= read_weights(folder / WEIGHTS)
    load_weights(model, weights, where=folder)
    return model
