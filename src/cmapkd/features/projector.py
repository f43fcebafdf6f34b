"""Small trainable modules of methods: from a model's features to another space, or to classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from cmapkd.models.types import Features


class PairProjector(nn.Module):
    """Linear maps of image and text embeddings to another width; the identity where the widths already agree.

    It belongs to a method and is trained with the student, but is no part of the student that is saved.

    Args:
        shared: one map for both modalities, without bias and at first an isometry (as far as the widths allow one).
            Image and text then move together: what is near in the teacher's space is near in the student's own, which
            is the one that retrieval uses. Two maps can meet in the teacher's space and differ in the student's.
    """

    def __init__(self, student_dim: int, teacher_dim: int, *, shared: bool = False) -> None:
        super().__init__()
        same = student_dim == teacher_dim
        self.both = nn.Linear(student_dim, teacher_dim, bias=False) if shared and not same else None
        if self.both is not None:
            nn.init.orthogonal_(self.both.weight)
            return
        self.image = nn.Identity() if same else nn.Linear(student_dim, teacher_dim)
        self.text = nn.Identity() if same else nn.Linear(student_dim, teacher_dim)

    def of_images(self, embeddings: Float[Tensor, "batch student_dim"]) -> Float[Tensor, "batch teacher_dim"]:
        """Embeddings of images alone, mapped, not normalised."""
        mapped: Tensor = (self.both if self.both is not None else self.image)(embeddings)
        return mapped

    def forward(self, features: Features) -> Features:
        """The features with both embeddings mapped, not normalised."""
        of_image, of_text = (self.both, self.both) if self.both is not None else (self.image, self.text)
        return replace(
            features,
            image=replace(features.image, embedding=of_image(features.image.embedding)),
            text=replace(features.text, embedding=of_text(features.text.embedding)),
        )


class Adapter(nn.Module):
    """Linear, layer norm, GELU, linear: from the student's embeddings to those of one tower of one teacher.

    Where the widths agree its input is added to what it returns.

    Args:
        width: of the student's embeddings; `to`: of the teacher's.
        hidden: units between the maps; None: the larger of both widths.
    """

    def __init__(self, width: int, to: int, *, hidden: int | None = None) -> None:
        super().__init__()
        inner = hidden or max(width, to)
        self.inside = nn.Sequential(nn.Linear(width, inner), nn.LayerNorm(inner), nn.GELU(), nn.Linear(inner, to))
        self.residual = width == to

    def forward(self, embeddings: Float[Tensor, "batch width"]) -> Float[Tensor, "batch to"]:
        """Embeddings at the teacher's width, not normalised."""
        mapped: Tensor = self.inside(embeddings)
        return embeddings + mapped if self.residual else mapped


class TokenAdapter(nn.Module):
    """Another encoder's tokens in the student's number and width: a linear map of each axis with GELU between them.

    Args:
        own: number and width of the encoder's tokens; `to`: of the student's.
    """

    def __init__(self, own: tuple[int, int], to: tuple[int, int]) -> None:
        super().__init__()
        self.channels, self.tokens = nn.Linear(own[1], to[1]), nn.Linear(own[0], to[0])

    def forward(self, tokens: Float[Tensor, "pictures tokens width"]) -> Float[Tensor, "pictures others channels"]:
        mapped: Tensor = self.tokens(F.gelu(self.channels(tokens)).transpose(1, 2))
        return mapped.transpose(1, 2)


class Fusion(nn.Module):
    """A linear map of each modality's student embedding, beside the teacher's, to one fused embedding.

    Args:
        student_dim: of the fused embeddings, which are as wide as the student's own.
        teacher_dim: of the embeddings that come in: the student's are at the teacher's width.
    """

    def __init__(self, student_dim: int, teacher_dim: int) -> None:
        super().__init__()
        self.image = nn.Linear(2 * teacher_dim, student_dim)
        self.text = nn.Linear(2 * teacher_dim, student_dim)

    def forward(
        self,
        student: Sequence[Float[Tensor, "batch teacher_dim"]],
        teacher: Sequence[Float[Tensor, "batch teacher_dim"]],
    ) -> tuple[Float[Tensor, "batch student_dim"], Float[Tensor, "batch student_dim"]]:
        """Fused embeddings of images and of texts, not normalised.

        Args:
            student, teacher: unit embeddings of images, and of texts.
        """
        image, text = (torch.cat(both, dim=-1) for both in zip(student, teacher, strict=True))
        return self.image(image), self.text(text)


class ClassProxy(nn.Module):
    """Logits of classes from an inner level's pooled vector: linear, batch norm, leaky ReLU, linear.

    Source: the proxies of C2KD, Huo et al., CVPR 2024, https://github.com/huofushuo/C2KD.
    """

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, width, bias=False), nn.BatchNorm1d(width), nn.LeakyReLU(0.1), nn.Linear(width, num_classes)
        )

    def forward(self, values: Float[Tensor, "batch width"]) -> Float[Tensor, "batch classes"]:
        logits: Tensor = self.layers(values)
        return logits
