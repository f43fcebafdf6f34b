"""Trainable maps from the student's joint space to the teacher's, one for each modality."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from cmapkd.models.types import Features


class PairProjector(nn.Module):
    """Linear maps of image and text embeddings to another width; the identity where the widths already agree.

    It belongs to a method and is trained with the student, but is no part of the student that is saved.
    """

    def __init__(self, student_dim: int, teacher_dim: int) -> None:
        super().__init__()
        same = student_dim == teacher_dim
        self.image = nn.Identity() if same else nn.Linear(student_dim, teacher_dim)
        self.text = nn.Identity() if same else nn.Linear(student_dim, teacher_dim)

    def forward(self, features: Features) -> Features:
        """The features with both embeddings mapped, not normalised."""
        return replace(
            features,
            image=replace(features.image, embedding=self.image(features.image.embedding)),
            text=replace(features.text, embedding=self.text(features.text.embedding)),
        )
