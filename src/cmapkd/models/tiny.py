"""`tiny`: a small ViT with a convolutional stem and a small text transformer.

Ours because the libraries' smallest image-text models are a hundred times too large for the built-in world and for
tests that must train in seconds on a CPU. Pre-norm transformer blocks as in ViT (arXiv:2010.11929) and CLIP
(arXiv:2103.00020); the stem follows "Early Convolutions Help Transformers See Better" (arXiv:2106.14881).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Literal, Self

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from cmapkd.config import Config
from cmapkd.data.types import TokenBatch
from cmapkd.models.base import DualEncoder
from cmapkd.models.images import ImageSpec
from cmapkd.models.parts import split_by_name
from cmapkd.models.prunable import BlockNames, PrunableTower, TowerSizes
from cmapkd.models.storage import MAX_LAYERS, MAX_WIDTH, write_model_folder
from cmapkd.models.types import BOTH, Level, LevelInfo, Tower, TowerFeatures
from cmapkd.models.vocabulary import TrainedTokenizer

HEAD_WIDTH = 32


class TinyOptions(Config):
    """Sizes of a `tiny` model; head width is fixed at 32 channels.

    A tower whose layers name neither heads nor units has width / 32 heads and four times its width of hidden units in
    each.
    """

    image_size: int = Field(64, ge=16, le=4096, description="Height and width of the input, in pixels.")
    fit: Literal["crop", "squash"] = Field("crop", description="What becomes of a picture that is not square.")
    patch_size: int = Field(8, ge=4, le=1024, description="Pixels per side of one token; a power of two.")
    stem_width: int = Field(
        16, ge=4, le=1024, description="Channels of the stem's first convolution; each later one has twice as many."
    )
    vision_width: int = Field(96, ge=1, le=MAX_WIDTH, description="Channels of the image tower.")
    vision_depth: int = Field(4, ge=1, le=MAX_LAYERS, description="Blocks of the image tower.")
    vision_heads: tuple[int, ...] | None = Field(None, description="Heads of each of its blocks.")
    vision_units: tuple[int, ...] | None = Field(None, description="Hidden units of each of its blocks.")
    text_width: int = Field(64, ge=1, le=MAX_WIDTH, description="Channels of the text tower.")
    text_depth: int = Field(2, ge=1, le=MAX_LAYERS, description="Blocks of the text tower.")
    text_heads: tuple[int, ...] | None = Field(None, description="Heads of each of its blocks.")
    text_units: tuple[int, ...] | None = Field(None, description="Hidden units of each of its blocks.")
    embed_dim: int = Field(128, ge=8, le=MAX_WIDTH, description="Width of the joint space.")
    context_length: int = Field(40, ge=4, le=10_000, description="Longest text, in tokens, start and end included.")
    vocab_size: int = Field(
        2048, ge=8, le=1_000_000, description="Largest vocabulary learned from the training captions."
    )

    @model_validator(mode="after")
    def _patches_fit(self) -> Self:
        if self.patch_size & (self.patch_size - 1):
            raise ValueError(f"patch_size must be a power of two, got {self.patch_size}")
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")
        return self

    @model_validator(mode="after")
    def _layers_fit(self) -> Self:
        for tower in ("vision", "text"):
            width, depth, heads, units = (
                getattr(self, f"{tower}_{key}") for key in ("width", "depth", "heads", "units")
            )
            if heads is None and width % HEAD_WIDTH:
                raise ValueError(
                    f"{tower}_width must be a multiple of {HEAD_WIDTH}, the width of a head, got {width}; or name the "
                    f"heads of each block in {tower}_heads"
                )
            for key, counts in (("heads", heads), ("units", units)):
                if counts is not None and (len(counts) != depth or min(counts) < 1):
                    raise ValueError(
                        f"{tower}_{key} needs a number of at least 1 for each of the {depth} blocks, got {[*counts]}"
                    )
        return self

    def sizes(self, tower: Tower) -> TowerSizes:
        """Of a tower, its layers written out."""
        prefix = _PREFIXES[tower]
        width, depth, heads, units = (getattr(self, f"{prefix}_{key}") for key in ("width", "depth", "heads", "units"))
        return TowerSizes(width, heads or (width // HEAD_WIDTH,) * depth, units or (4 * width,) * depth)

    def resized(self, sizes: Mapping[Tower, TowerSizes]) -> TinyOptions:
        """These with towers of other sizes."""
        changed = {
            f"{_PREFIXES[tower]}_{key}": value
            for tower, size in sizes.items()
            for key, value in (("width", size.width), ("heads", size.heads), ("units", size.units))
        }
        return self.model_copy(update=changed)


_PREFIXES: dict[Tower, str] = {"image": "vision", "text": "text"}


PRESETS: dict[str, TinyOptions] = {
    "large": TinyOptions(
        patch_size=16, stem_width=32, vision_width=160, vision_depth=5, text_width=128, text_depth=3, embed_dim=256
    ),
    "base": TinyOptions(
        patch_size=16, stem_width=12, vision_width=96, vision_depth=3, text_width=64, text_depth=1, embed_dim=128
    ),
    "small": TinyOptions(
        patch_size=16, stem_width=4, vision_width=64, vision_depth=2, text_width=32, text_depth=1, embed_dim=64
    ),
    "base-32": TinyOptions(
        patch_size=32, stem_width=4, vision_width=96, vision_depth=3, text_width=64, text_depth=1, embed_dim=128
    ),
    "small-32": TinyOptions(
        patch_size=32, stem_width=4, vision_width=64, vision_depth=2, text_width=32, text_depth=1, embed_dim=64
    ),
    "debug": TinyOptions(
        image_size=32,
        patch_size=8,
        stem_width=8,
        vision_width=32,
        vision_depth=2,
        text_width=32,
        text_depth=2,
        embed_dim=32,
    ),
}
"""`base` and `small` have about a fifth and a twentieth of the parameters of `large`; the `-32` ones besides have four
image tokens instead of sixteen (docs/results/scenes.md measures both beside the packaged teacher)."""


class Block(nn.Module):
    """Pre-norm self-attention, then a two-layer perceptron: of four times the width where nothing else is said."""

    def __init__(self, width: int, heads: int | None = None, units: int | None = None) -> None:
        super().__init__()
        self.heads = heads = heads or width // HEAD_WIDTH
        units = units or 4 * width
        self.norm_attention = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * heads * HEAD_WIDTH)
        self.out = nn.Linear(heads * HEAD_WIDTH, width)
        self.norm_mlp = nn.LayerNorm(width)
        self.expand = nn.Linear(width, units)
        self.shrink = nn.Linear(units, width)

    def forward(
        self, x: Float[Tensor, "batch tokens width"], mask: Bool[Tensor, "#batch #heads #queries tokens"] | None = None
    ) -> Float[Tensor, "batch tokens width"]:
        batch, tokens, _ = x.shape
        qkv = self.qkv(self.norm_attention(x)).view(batch, tokens, 3, self.heads, HEAD_WIDTH).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2], attn_mask=mask)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        mixed: Tensor = x + self.shrink(F.gelu(self.expand(self.norm_mlp(x))))
        return mixed


def _blocks(sizes: TowerSizes) -> nn.ModuleList:
    layers = zip(sizes.heads, sizes.units, strict=True)
    return nn.ModuleList(Block(sizes.width, heads, units) for heads, units in layers)


def image_spec_of(options: TinyOptions) -> ImageSpec:
    """How pictures are resized and normalised."""
    return ImageSpec(options.image_size, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), fit=options.fit)


class VisionTower(nn.Module):
    """Stem of stride-two convolutions, a class token, learned positions, blocks; the class token is projected."""

    def __init__(self, options: TinyOptions) -> None:
        super().__init__()
        width, halvings = options.vision_width, int(math.log2(options.patch_size))
        channels = [3, *(options.stem_width * 2**i for i in range(halvings))]
        self.stem = nn.Sequential(*(_stem_layer(a, b) for a, b in pairwise(channels)))
        self.to_width = nn.Conv2d(channels[-1], width, 1)
        self.side = options.image_size // options.patch_size
        self.class_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.positions = nn.Parameter(torch.randn(1, self.side**2 + 1, width) * 0.02)
        self.blocks = _blocks(options.sizes("image"))
        self.norm = nn.LayerNorm(width)
        self.project = nn.Linear(width, options.embed_dim, bias=False)

    def forward(self, images: Float[Tensor, "batch 3 height width"], levels: Sequence[str] = ()) -> TowerFeatures:
        patches = self.to_width(self.stem(images)).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(images.shape[0], -1, -1), patches], dim=1) + self.positions
        kept: dict[str, Level] = {}
        for number, block in enumerate(self.blocks):
            x = block(x)
            if (name := f"blocks.{number}") in levels:
                kept[name] = Level(x, "tokens", num_prefix=1, grid=(self.side, self.side))
        return TowerFeatures(self.project(self.norm(x[:, 0])), kept)


def _stem_layer(channels_in: int, channels_out: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 3, stride=2, padding=1), nn.GroupNorm(1, channels_out), nn.GELU()
    )


class TextTower(nn.Module):
    """Token and position embeddings, bidirectional blocks over the real tokens; their mean is projected."""

    def __init__(self, options: TinyOptions) -> None:
        super().__init__()
        width = options.text_width
        self.tokens = nn.Embedding(options.vocab_size, width)
        nn.init.normal_(self.tokens.weight, std=0.02)
        self.positions = nn.Parameter(torch.randn(1, options.context_length, width) * 0.01)
        self.blocks = _blocks(options.sizes("text"))
        self.norm = nn.LayerNorm(width)
        self.project = nn.Linear(width, options.embed_dim, bias=False)

    def forward(self, texts: TokenBatch, levels: Sequence[str] = ()) -> TowerFeatures:
        mask = texts.mask[:, None, None, :]
        x = self.tokens(texts.ids) + self.positions[:, : texts.ids.shape[1]]
        kept: dict[str, Level] = {}
        for number, block in enumerate(self.blocks):
            x = block(x, mask)
            if (name := f"blocks.{number}") in levels:
                kept[name] = Level(x, "tokens", mask=texts.mask)
        weights = texts.mask.to(x.dtype)[..., None]
        pooled = (self.norm(x) * weights).sum(1) / weights.sum(1).clamp_min(1)
        return TowerFeatures(self.project(pooled), kept)


class TinyDualEncoder(DualEncoder):
    """The two towers with CLIP's learned logit scale (initially 1 / 0.07)."""

    tokenizer: TrainedTokenizer

    def __init__(self, options: TinyOptions, tokenizer: TrainedTokenizer, *, name: str = "tiny") -> None:
        super().__init__()
        options = options.model_copy(update={"vocab_size": tokenizer.vocab_size})
        self.name, self.options, self.tokenizer = name, options, tokenizer
        self.embed_dim = options.embed_dim
        self.image_spec = image_spec_of(options)
        self.vision, self.text = VisionTower(options), TextTower(options)
        self._log_logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.image_levels = tuple(
            LevelInfo(f"blocks.{i}", options.vision_width, "tokens") for i in range(options.vision_depth)
        )
        self.text_levels = tuple(
            LevelInfo(f"blocks.{i}", options.text_width, "tokens") for i in range(options.text_depth)
        )

    @property
    def log_logit_scale(self) -> nn.Parameter:
        return self._log_logit_scale

    @property
    def parts(self) -> Mapping[str, frozenset[str]]:
        prefixes = {
            "image": ("vision",),
            "text": ("text",),
            "projections": ("vision.project", "text.project"),
            "scale": ("_log_logit_scale",),
        }
        return split_by_name((name for name, _ in self.named_parameters()), prefixes)

    @property
    def image_blocks(self) -> tuple[nn.Module, ...]:
        return tuple(self.vision.blocks)

    @property
    def token_embedding(self) -> nn.Module:
        return self.text.tokens

    @property
    def prunable(self) -> Mapping[Tower, PrunableTower]:
        writes = {
            "image": {"to_width.weight": 0, "to_width.bias": 0, "class_token": 2, "positions": 2},
            "text": {"tokens.weight": 1, "positions": 2},
        }
        towers: dict[Tower, PrunableTower] = {}
        for tower in BOTH:
            sizes, prefix = self.options.sizes(tower), _PREFIXES[tower]
            towers[tower] = PrunableTower.of(
                sizes,
                head_width=HEAD_WIDTH,
                blocks=[_block_names(f"{prefix}.blocks.{number}") for number in range(len(sizes.heads))],
                writes={f"{prefix}.{name}": axis for name, axis in writes[tower].items()},
                reads={f"{prefix}.project.weight": 1},
                norms=[f"{prefix}.norm"],
            )
        return towers

    def resized(self, sizes: Mapping[Tower, TowerSizes]) -> TinyDualEncoder:
        return type(self)(self.options.resized(sizes), self.tokenizer, name=self.name)

    def encode_image(self, images: Float[Tensor, "batch 3 height width"], levels: Sequence[str] = ()) -> TowerFeatures:
        self.check_levels("image", levels)
        output: TowerFeatures = self.vision(images, levels)
        return output

    def tokens_in_joint_space(self, level: Level) -> Float[Tensor, "batch tokens dim"]:
        projected: Tensor = self.vision.project(self.vision.norm(level.values))
        return projected

    def encode_text(self, texts: TokenBatch, levels: Sequence[str] = ()) -> TowerFeatures:
        self.check_levels("text", levels)
        output: TowerFeatures = self.text(texts, levels)
        return output

    def with_tokenizer_of(self, other: DualEncoder) -> DualEncoder:
        """An untrained model of these sizes with the other's vocabulary.

        Raises:
            ValueError: it allows longer texts than this model has positions for.
        """
        if not isinstance(other, TinyDualEncoder):
            return self
        length = other.tokenizer.context_length
        if length > self.options.context_length:
            raise ValueError(
                f"{self.name} has {self.options.context_length} text positions and {other.name} texts of up to "
                f"{length} tokens: set options.context_length to {length}"
            )
        return type(self)(self.options, other.tokenizer, name=self.name)

    def write(self, folder: Path) -> None:
        write_model_folder(
            folder,
            family="tiny",
            name=self.name,
            options=self.options.model_dump(exclude_none=True),
            weights=self.state_dict(),
        )
        self.tokenizer.save(folder)


def _block_names(block: str) -> BlockNames:
    return BlockNames(
        norms=(f"{block}.norm_attention", f"{block}.norm_mlp"),
        qkv=(f"{block}.qkv.weight", f"{block}.qkv.bias"),
        out=f"{block}.out",
        expand=f"{block}.expand",
        shrink=f"{block}.shrink",
    )
