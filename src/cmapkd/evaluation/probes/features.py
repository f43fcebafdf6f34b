"""What a probe reads of an encoder: patch features and embedding of whole pictures, token features of texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, UInt8
from PIL import Image
from torch import Tensor

from cmapkd.data.types import Source
from cmapkd.features.pyramid import Grid, grid_of, level_grid
from cmapkd.models.base import DualEncoder, ImageSpec
from cmapkd.models.texts import evaluating
from cmapkd.models.types import LevelInfo, TowerFeatures


@dataclass(frozen=True, slots=True)
class ImageFeatures:
    """A frozen image tower's answers, on the CPU; patches in half precision, which is what they take memory for."""

    patches: Float[Tensor, "images cells width"]
    embeddings: Float[Tensor, "images dim"]
    grid: Grid

    def __len__(self) -> int:
        return len(self.patches)


@dataclass(frozen=True, slots=True)
class TextFeatures:
    """A frozen text tower's answers, likewise."""

    tokens: Float[Tensor, "texts tokens width"]
    mask: Bool[Tensor, "texts tokens"]
    embeddings: Float[Tensor, "texts dim"]


def whole_picture(spec: ImageSpec, image: Image.Image) -> UInt8[Tensor, "3 size size"]:
    """The whole picture squashed to the model's square: nothing is cropped away that a box or question is about.

    In bytes; `spec.to_model` normalises them.
    """
    return spec.raw(image, (0.0, 0.0, float(image.width), float(image.height)))


def patch_level(model: DualEncoder) -> LevelInfo:
    """The level whose cells probes read: of a ViT the last block but one, of a convolutional tower the last stage.

    In a ViT that pools its class token nothing reads the patches of the last block, so no training shaped them; LLaVA
    (arXiv:2304.08485, section 4) reads the block before for that reason too.

    Raises:
        ValueError: the tower exposes no level.
    """
    if not model.image_levels:
        raise ValueError(f"{model.name} exposes no image level, and probes read patches: choose another image tower.")
    last = model.image_levels[-1]
    return model.image_levels[-2] if last.layout == "tokens" and len(model.image_levels) > 1 else last


def text_level(model: DualEncoder) -> LevelInfo:
    """The level whose tokens the fusion classifier reads: the last block.

    Raises:
        ValueError: the tower exposes no level.
    """
    if not model.text_levels:
        raise ValueError(
            f"{model.name} exposes no text level, and the vqa probe reads tokens: take another text tower."
        )
    return model.text_levels[-1]


def patches_of(model: DualEncoder, tower: TowerFeatures) -> tuple[Float[Tensor, "batch cells width"], Grid]:
    """The cells of `patch_level`, row by row without prefix tokens, and their grid."""
    level = tower.levels[patch_level(model).name]
    return level_grid(level), grid_of(level)


def encode_images(
    model: DualEncoder,
    source: Source,
    indices: Sequence[int],
    *,
    batch_size: int,
    device: torch.device | str,
    memory: float,
) -> ImageFeatures:
    """Features of the samples at `indices`, all of which can be read; the model's modes are restored after.

    Args:
        memory: GiB that the result may take.
    Raises:
        ValueError: it would take more; said before the second batch is encoded.
    """
    name = patch_level(model).name
    kept: list[Tensor] = []
    embeddings: list[Tensor] = []
    grid: Grid = (0, 0)
    with evaluating(model, device, None):
        for first in range(0, len(indices), batch_size):
            pictures = [source[index].image for index in indices[first : first + batch_size]]
            pixels = torch.stack([whole_picture(model.image_spec, picture) for picture in pictures])
            tower = model.encode_image(model.image_spec.to_model(pixels.to(device)), (name,))
            patches, grid = patches_of(model, tower)
            needed = len(indices) * (2 * patches[0].numel() + 4 * tower.embedding[0].numel()) / 2**30
            if needed > memory:
                raise ValueError(
                    f"features of {len(indices)} images of {source.name} under {model.name} take {needed:.1f} GiB, "
                    f"more than probes.memory={memory:g}: lower probes.samples (or limit), or raise probes.memory."
                )
            kept.append(patches.half().cpu())
            embeddings.append(tower.embedding.float().cpu())
    return ImageFeatures(torch.cat(kept), torch.cat(embeddings), grid)


def encode_texts(
    model: DualEncoder, texts: Sequence[str], *, batch_size: int, device: torch.device | str
) -> TextFeatures:
    """Token features and embeddings of `texts`, in order, tokens padded to the longest."""
    name = text_level(model).name
    parts: list[tuple[Tensor, Tensor]] = []
    embeddings: list[Tensor] = []
    with evaluating(model, device, None):
        for first in range(0, len(texts), batch_size):
            tokens = model.tokenizer(texts[first : first + batch_size]).to(device)
            tower = model.encode_text(tokens, (name,))
            parts.append((tower.levels[name].values.half().cpu(), tokens.mask.cpu()))
            embeddings.append(tower.embedding.float().cpu())
    length = max(mask.shape[1] for _, mask in parts)
    values = [F.pad(part, (0, 0, 0, length - part.shape[1])) for part, _ in parts]
    masks = [F.pad(mask, (0, length - mask.shape[1])) for _, mask in parts]
    return TextFeatures(torch.cat(values), torch.cat(masks), torch.cat(embeddings))
