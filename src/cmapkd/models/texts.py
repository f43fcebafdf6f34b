"""Texts through a model's text tower: embeddings of many, and the class vectors that class names become."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from cmapkd.data.templates import ClassPrompts, fill
from cmapkd.models.base import DualEncoder, eval_mode
from cmapkd.models.teacher import FrozenTeacher
from cmapkd.models.types import TowerFeatures

_TEXTS_AT_ONCE = 8_192  # prompts whose embeddings are held before they are averaged


@contextmanager
def evaluating(model: nn.Module, device: torch.device | str, autocast: torch.dtype | None) -> Iterator[None]:
    """Eval mode without gradient; afterwards every module is back in the mode it had, also a frozen part's eval."""
    model.to(device)
    # without a cache: entries made without gradient would still be used by a training step's autocast around us
    cast = torch.autocast(torch.device(device).type, dtype=autocast, enabled=autocast is not None, cache_enabled=False)
    with eval_mode(model), torch.no_grad(), cast:
        yield


def encode_texts(
    model: DualEncoder,
    texts: Sequence[str],
    keep: Callable[[TowerFeatures], None],
    *,
    levels: Sequence[str] = (),
    batch_size: int,
    device: torch.device | str,
    autocast: torch.dtype | None = None,
    batches: slice = slice(None),
) -> Int[Tensor, " texts"]:
    """The text tower over `texts`: similar lengths share a batch, equal texts are encoded once.

    Args:
        batches: which of all batches are encoded.
        keep: is given each batch's features, and keeps of them what is wanted.
    Returns:
        For each of `texts` its row in what `keep` is given of all batches.
    """
    different = sorted(set(texts), key=lambda text: (-len(text), text))
    with evaluating(model, device, autocast):
        for first in range(0, len(different), batch_size)[batches]:
            tokens = model.tokenizer(different[first : first + batch_size])
            keep(model.encode_text(tokens.to(device), levels))
    place = {text: number for number, text in enumerate(different)}
    return torch.tensor([place[text] for text in texts], dtype=torch.long)


def embed_texts(
    model: DualEncoder,
    texts: Sequence[str],
    *,
    batch_size: int,
    device: torch.device | str,
    autocast: torch.dtype | None = None,
) -> Float[Tensor, "texts dim"]:
    """Unit embeddings of `texts`, in their order, float32, on the CPU."""
    rows = [torch.empty(0, model.embed_dim)]

    def keep(tower: TowerFeatures) -> None:
        rows.append(F.normalize(tower.embedding.float(), dim=-1).cpu())

    order = encode_texts(model, texts, keep, batch_size=batch_size, device=device, autocast=autocast)
    return torch.cat(rows)[order]


def class_vectors(
    model: DualEncoder,
    class_names: Sequence[str],
    templates: Sequence[str],
    *,
    batch_size: int = 256,
    device: torch.device | str,
    autocast: torch.dtype | None = None,
) -> Float[Tensor, "classes dim"]:
    """One unit vector for each class: the mean of the unit embeddings of its prompts, normalised again.

    Raises:
        ValueError: there are no class names or no templates.
    Source: Radford et al. 2021, arXiv:2103.00020, section 3.1.4 (prompt ensembling in embedding space).
    """
    if not class_names or not templates:
        raise ValueError(f"a classifier needs class names and templates, got {len(class_names)} and {len(templates)}")
    weights: list[Tensor] = []
    step = max(1, _TEXTS_AT_ONCE // len(templates))
    for first in range(0, len(class_names), step):
        names = class_names[first : first + step]
        prompts = [fill(template, name) for name in names for template in templates]
        texts = embed_texts(model, prompts, batch_size=batch_size, device=device, autocast=autocast)
        weights.append(F.normalize(texts.view(len(names), len(templates), -1).mean(1), dim=-1))
    return torch.cat(weights)


def mean_class_texts(
    model: DualEncoder, classes: ClassPrompts, *, device: torch.device | str
) -> Float[Tensor, "classes dim"]:
    """The mean text embedding of each class's prompts, not normalised before or after; float32, on the CPU."""
    rows: list[Tensor] = []
    texts = classes.texts
    order = encode_texts(model, texts, lambda tower: rows.append(tower.embedding.float().cpu()),
                         batch_size=256, device=device)  # fmt: skip
    return torch.cat(rows)[order].view(len(classes.names), len(classes.templates), -1).mean(1)


def frozen_class_vectors(teacher: FrozenTeacher, classes: ClassPrompts) -> Float[Tensor, "classes dim"]:
    """A frozen teacher's `class_vectors`, made where it is; on the CPU. The teacher is live: a cache has no classes."""
    device = next(teacher.model.parameters()).device
    return class_vectors(teacher.model, classes.names, classes.templates, device=device)


class LearnedClassVectors:
    """Class vectors by a text tower that learns: as it is now, with gradient.

    Args:
        at_once: templates in each call, drawn anew and the same for all classes; None, or as many as there are: all.
    """

    def __init__(self, classes: ClassPrompts, model: DualEncoder, *, at_once: int | None = None) -> None:
        self.num_classes, self.num_templates = len(classes.names), len(classes.templates)
        self.at_once = min(at_once or self.num_templates, self.num_templates)
        self.tokens = model.tokenizer(classes.texts)  # class by class

    def __call__(self, model: DualEncoder, generator: torch.Generator | None = None) -> Float[Tensor, "classes dim"]:
        """One unit vector for each class, float32 or wider.

        Args:
            generator: what the templates are drawn from, on the CPU, the same in every process. None: only where all
                templates are read.
        Raises:
            ValueError: templates are to be drawn and there is no generator.
        """
        tokens = self.tokens
        if self.at_once < self.num_templates:
            if generator is None:
                raise ValueError(
                    f"{self.at_once} of {self.num_templates} templates are to be drawn, but from what? Give a generator"
                )
            drawn = torch.randperm(self.num_templates, generator=generator)[: self.at_once]
            tokens = tokens.rows((torch.arange(self.num_classes)[:, None] * self.num_templates + drawn).flatten())
        embedding = model.encode_text(tokens.to(model.log_logit_scale.device, non_blocking=True)).embedding
        wide = embedding.float() if embedding.dtype in (torch.bfloat16, torch.float16) else embedding
        units = F.normalize(wide, dim=-1).view(self.num_classes, self.at_once, -1)
        return F.normalize(units.mean(1), dim=-1)
