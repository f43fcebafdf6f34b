"""The probe that finds objects: a simple feature pyramid, boxes at every cell, and the text tower as the classifier."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from cmapkd.data.types import Box
from cmapkd.evaluation.probes.probe import Head, HeadInput
from cmapkd.features.pyramid import Grid

_SIZE = 2.5  # sides of a level's cell in the boxes that it is for, and that it predicts to begin with
_RADIUS = 1.5  # cells around a box's centre that predict it: FCOS's centre sampling, arXiv:1904.01355v5
_PRIOR = 0.01  # probability of a class at the start, so that the many empty cells cost little: arXiv:1708.02002
_CANDIDATES = 300  # of an image, by score, before boxes that overlap are thinned out
_LEAST_SCORE = 0.005


class Cells(NamedTuple):
    """What the head says of every cell of every level, levels one after the other."""

    classes: Float[Tensor, "batch cells classes"]  # logits
    boxes: Float[Tensor, "batch cells 4"]  # left, top, right, bottom, as shares of the picture's sides
    centred: Float[Tensor, "batch cells"]  # logit of how well the cell lies in the middle of its box


class CellPositions(NamedTuple):
    """Where the cells are, as shares of the picture's sides."""

    centres: Float[Tensor, "cells 2"]
    strides: Float[Tensor, "cells 2"]
    level: Int[Tensor, " cells"]


@dataclass(frozen=True, slots=True)
class Detections:
    """Detections of one picture, best first: boxes as shares of its sides (left, top, right, bottom), class numbers."""

    boxes: Float[Tensor, "detections 4"]
    scores: Float[Tensor, " detections"]
    classes: Int[Tensor, " detections"]


class DetectorHead(Head):
    """A one-stage detector in the manner of FCOS (arXiv:1904.01355) on the simple feature pyramid of ViTDet
    (arXiv:2203.16527, section 3), which is made of one level of the encoder.

    A cell belongs to a class as far as its vector, mapped into the joint space, points along the text embedding of the
    class's name (both centred by the mean of the training names): classes that training never saw need only a name.
    """

    def __init__(
        self,
        *,
        patch_width: int,
        embed_dim: int,
        grid: Grid,
        names: Float[Tensor, "classes dim"],
        scales: Sequence[float],
        width: int,
        depth: int,
    ) -> None:
        """A head for the training classes `names`, unit embeddings of the text tower."""
        super().__init__()
        self.grid, self.scales = grid, tuple(scales)
        self.normalise, self.shrink = nn.LayerNorm(patch_width), nn.Linear(patch_width, width)
        self.whole = nn.Sequential(nn.LayerNorm(embed_dim), nn.Linear(embed_dim, width))
        self.levels = nn.ModuleList(_level(scale, width) for scale in scales)
        self.class_tower, self.box_tower = _tower(width, depth), _tower(width, depth)
        self.to_joint, self.to_box = nn.Conv2d(width, names.shape[1], 1), nn.Conv2d(width, 5, 3, padding=1)
        nn.init.normal_(self.to_box.weight, std=0.01)
        nn.init.zeros_(self.to_box.bias)  # type: ignore[arg-type]
        self.log_scale = nn.Parameter(torch.tensor(2.0))
        self.bias = nn.Parameter(torch.logit(torch.tensor(_PRIOR)))
        self.names: Tensor
        self.mean: Tensor
        self.register_buffer("mean", names.mean(0))
        self.register_buffer("names", self.centred_names(names), persistent=False)
        self._positions: CellPositions | None = None

    def centred_names(self, names: Float[Tensor, "classes dim"]) -> Float[Tensor, "classes dim"]:
        """Unit embeddings without what all training names share; a single name stays as it is."""
        centred = names - self.mean
        return F.normalize(torch.where(centred.norm(dim=-1, keepdim=True) > 1e-4, centred, names), dim=-1)

    def positions(self, device: torch.device) -> CellPositions:
        """The cells' positions, the same for every picture."""
        if self._positions is None or self._positions.centres.device != device:
            parts = [
                _grid_positions(grid, number, device) for number, grid in enumerate(_grids(self.grid, self.scales))
            ]
            self._positions = CellPositions(*(torch.cat(column) for column in zip(*parts, strict=True)))
        return self._positions

    def forward(self, inputs: HeadInput, names: Float[Tensor, "classes dim"]) -> Cells:
        """`names` are centred unit embeddings, see `centred_names`."""
        cells = self.shrink(self.normalise(inputs.patches)) + self.whole(inputs.embedding)[:, None]
        maps = cells.transpose(1, 2).unflatten(2, self.grid)
        classes, boxes = [], []
        for level in self.levels:
            values = level(maps)
            joint = self.to_joint(self.class_tower(values)).flatten(2).transpose(1, 2)
            classes.append(F.normalize(joint, dim=-1) @ names.T * self.log_scale.exp() * 4 + self.bias)
            boxes.append(self.to_box(self.box_tower(values)).flatten(2).transpose(1, 2))
        raw = torch.cat(boxes, dim=1).float()
        return Cells(torch.cat(classes, dim=1).float(), self._decode(raw), raw[..., 4])

    def _decode(self, raw: Float[Tensor, "batch cells 5"]) -> Float[Tensor, "batch cells 4"]:
        positions = self.positions(raw.device)
        centres = positions.centres + raw[..., :2] * positions.strides
        half = raw[..., 2:4].clamp(-4, 4).exp() * positions.strides * _SIZE / 2
        return torch.cat([centres - half, centres + half], dim=-1)

    def loss(self, inputs: HeadInput, targets: dict[str, Tensor]) -> Float[Tensor, ""]:
        """Focal loss of classes, GIoU of boxes and cross-entropy of centredness, over the number of boxed cells.

        Reads `boxes` (Float[batch boxes 4]) and `labels` (Int[batch boxes], -1 where there is none) of the targets.

        The targets may bring `names`, the classes' embeddings as they are now: their text tower learns too.
        """
        from torchvision.ops import generalized_box_iou_loss, sigmoid_focal_loss

        cells = self(inputs, self.centred_names(targets["names"]) if "names" in targets else self.names)
        boxes, labels = targets["boxes"], targets["labels"]
        owner = assign(self.positions(boxes.device), boxes, labels >= 0)
        picture, cell = (owner >= 0).nonzero(as_tuple=True)
        box = owner[picture, cell]
        wanted = torch.zeros_like(cells.classes)
        wanted[picture, cell, labels[picture, box]] = 1
        count = max(1, len(box))
        classes: Tensor = sigmoid_focal_loss(cells.classes, wanted, reduction="sum") / count
        if not len(box):
            nothing: Tensor = classes + 0 * (cells.boxes.sum() + cells.centred.sum())
            return nothing
        truth = boxes[picture, box]
        overlap = generalized_box_iou_loss(cells.boxes[picture, cell], truth, reduction="sum") / count
        middle = centredness(self.positions(boxes.device).centres[cell], truth)
        centred = F.binary_cross_entropy_with_logits(cells.centred[picture, cell], middle, reduction="sum") / count
        total: Tensor = classes + 2 * overlap + centred
        return total

    def size(self, targets: dict[str, Tensor]) -> Int[Tensor, ""]:
        boxes = targets["boxes"]
        return (assign(self.positions(boxes.device), boxes, targets["labels"] >= 0) >= 0).sum()

    @torch.no_grad()
    def find(
        self, inputs: HeadInput, names: Float[Tensor, "classes dim"], *, nms_iou: float, max_boxes: int
    ) -> list[Detections]:
        """Detections of each picture among the classes of `names`, which need not be the training's."""
        from torchvision.ops import batched_nms

        cells = self(inputs, self.centred_names(names))
        scores = (cells.classes.sigmoid() * cells.centred.sigmoid()[..., None]).sqrt()
        detections = []
        for score, boxes in zip(scores, cells.boxes.clamp(0, 1), strict=True):
            best, place = score.flatten().topk(min(_CANDIDATES, score.numel()))
            place, best = place[best > _LEAST_SCORE], best[best > _LEAST_SCORE]
            cell, kind = place // score.shape[1], place % score.shape[1]
            kept = batched_nms(boxes[cell], best, kind, nms_iou)[:max_boxes]
            detections.append(Detections(boxes[cell[kept]], best[kept], kind[kept]))
        return detections


def box_targets(
    boxes: Sequence[Box], size: tuple[int, int], place: Mapping[str, int]
) -> tuple[Float[Tensor, "boxes 4"], Int[Tensor, " boxes"]]:
    """A picture's boxes as shares of its sides, cut to it, and class numbers; -1 for what is no object to learn.

    Args:
        size: width and height in pixels.
        place: class numbers by name; other names have none.
    """
    width, height = size
    corners = [(b.x / width, b.y / height, (b.x + b.width) / width, (b.y + b.height) / height) for b in boxes]
    shares = torch.tensor(corners).reshape(-1, 4).clamp(0, 1)
    inside = (shares[:, 2:] > shares[:, :2]).all(1)  # something of it is in the picture
    numbers = [-1 if box.crowd else place.get(box.name, -1) for box in boxes]
    return shares, torch.where(inside, torch.tensor(numbers, dtype=torch.long), -1)


def assign(
    positions: CellPositions, boxes: Float[Tensor, "batch boxes 4"], real: Bool[Tensor, "batch boxes"]
) -> Int[Tensor, "batch cells"]:
    """The box that each cell predicts, -1 where it is background.

    A box belongs to the level whose cells times 2.5 are nearest to its size, and there to the cells whose centres
    lie within 1.5 cells of its own and inside it, and to the cell that holds its centre. Of several boxes the smallest.
    """
    centre, size = (boxes[..., :2] + boxes[..., 2:]) / 2, (boxes[..., 2:] - boxes[..., :2]).clamp_min(1e-6)
    num_levels = int(positions.level.max()) + 1
    strides = torch.stack([positions.strides[positions.level == level][0] for level in range(num_levels)])
    distance = ((size[:, :, None] / strides / _SIZE).log2().mean(-1)).abs()  # batch boxes levels
    level = distance.argmin(-1)
    offset = positions.centres[None, :, None] - centre[:, None]  # batch cells boxes 2
    stride = positions.strides[None, :, None]
    inside = (offset.abs() <= size[:, None] / 2).all(-1) & (offset.abs() <= _RADIUS * stride).all(-1)
    holds = ((offset > -stride / 2) & (offset <= stride / 2)).all(-1)
    candidate = (inside | holds) & (positions.level[None, :, None] == level[:, None]) & real[:, None]
    area = torch.where(candidate, size.prod(-1)[:, None], torch.inf)
    smallest, owner = area.min(-1)
    return torch.where(smallest.isfinite(), owner, -1)


def centredness(points: Float[Tensor, "cells 2"], boxes: Float[Tensor, "cells 4"]) -> Float[Tensor, " cells"]:
    """1 in the middle of the box, 0 at its edge: FCOS, equation 3."""
    near = torch.minimum(points - boxes[:, :2], boxes[:, 2:] - points).clamp_min(0)
    far = torch.maximum(points - boxes[:, :2], boxes[:, 2:] - points).clamp_min(1e-6)
    return (near / far).prod(-1).sqrt()


def _grids(grid: Grid, scales: Sequence[float]) -> list[Grid]:
    return [(max(1, int(grid[0] * scale)), max(1, int(grid[1] * scale))) for scale in scales]


def _grid_positions(grid: Grid, level: int, device: torch.device) -> CellPositions:
    rows, columns = grid
    y, x = torch.meshgrid(
        (torch.arange(rows, device=device) + 0.5) / rows,
        (torch.arange(columns, device=device) + 0.5) / columns,
        indexing="ij",
    )
    centres = torch.stack([x, y], dim=-1).flatten(0, 1)
    strides = torch.tensor([1 / columns, 1 / rows], device=device).expand_as(centres)
    return CellPositions(centres, strides, torch.full((rows * columns,), level, device=device))


def _level(scale: float, width: int) -> nn.Module:
    """The encoder's map at `scale` times its grid: transposed convolutions up, pooling down."""
    steps: list[nn.Module] = []
    while scale > 1:
        steps += [nn.ConvTranspose2d(width, width, 2, stride=2), nn.GroupNorm(8, width), nn.GELU()]
        scale /= 2
    if scale < 1:
        steps.append(_Shrink(round(1 / scale)))
    return nn.Sequential(*steps, nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(8, width))


class _Shrink(nn.Module):
    def __init__(self, factor: int) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, maps: Float[Tensor, "batch width rows columns"]) -> Tensor:
        rows, columns = maps.shape[-2:]
        return F.adaptive_max_pool2d(maps, (max(1, rows // self.factor), max(1, columns // self.factor)))


def _tower(width: int, depth: int) -> nn.Module:
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(8, width), nn.GELU()]
    return nn.Sequential(*layers)
