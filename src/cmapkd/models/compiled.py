"""A model that `torch.compile` compiles: in one graph, and for texts of all lengths in a few."""

from __future__ import annotations

import torch

from cmapkd.models.base import DualEncoder, ImageEncoder, Model
from cmapkd.models.reach import example_output


def compile_in_place(model: Model) -> None:
    """Compiles a model's forward pass; names of weights, checkpoints and the saved model stay as they are.

    Libraries prepare their blocks in a first pass, which no compiler follows, so one is made before. Lengths of texts
    are left to the compiler: after the second it makes a graph for all.
    """
    with torch.no_grad():
        if isinstance(model, ImageEncoder):
            for level in model.image_levels[-1:]:
                example_output(model, "image", level.name)
        if isinstance(model, DualEncoder):
            for level in model.text_levels[-1:]:
                example_output(model, "text", level.name)
    model.compile()
