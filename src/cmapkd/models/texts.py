"""Texts through a model's text tower: embeddings of many, and the class vectors that class names become."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from cmapkd.config import ConfigError
from cmapkd.data.templates import ClassPrompts
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
    own: tuple[tuple[str, ...], ...] = (),
    batch_size: int = 256,
    device: torch.device | str,
    autocast: torch.dtype | None = None,
) -> Float[Tensor, "classes dim"]:
    """One unit vector for each class: the mean of the unit embeddings of its prompts, normalised again.

    Args:
        templates: of a model that has no `class_templates` of its own.
        own: texts of each class by itself, besides the templates, see `ClassPrompts`; likewise.
    Raises:
        ValueError: there are no class names, or a class has no prompts.
    Source: Radford et al. 2021, arXiv:2103.00020, section 3.1.4 (prompt ensembling in embedding space).
    """
    if not class_names or not (templates or own):
        raise ValueError(f"a classifier needs class names and templates, got {len(class_names)} and {len(templates)}")
    if model.class_templates:
        templates, own = model.class_templates, ()
    weights: list[Tensor] = []
    prompts = ClassPrompts(tuple(class_names), tuple(templates), own).of_class
    step = max(1, _TEXTS_AT_ONCE // max(map(len, prompts)))
    for first in range(0, len(class_names), step):
        some = prompts[first : first + step]
        texts = embed_texts(
            model, [text for each in some for text in each], batch_size=batch_size, device=device, autocast=autocast
        )
        weights.append(F.normalize(_means(texts, [*map(len, some)]), dim=-1))
    return model.class_rows(class_names, torch.cat(weights))


def _means(rows: Float[Tensor, "rows dim"], counts: Sequence[int]) -> Float[Tensor, "classes dim"]:
    """Means of the rows of each class, which stand together."""
    if len(set(counts)) == 1:
        return rows.view(len(counts), counts[0], -1).mean(1)
    sizes = torch.tensor(counts)
    of_class = torch.repeat_interleave(torch.arange(len(counts)), sizes).to(rows.device, non_blocking=True)
    sums = rows.new_zeros(len(counts), rows.shape[1]).index_add(0, of_class, rows)
    return sums / sizes[:, None].to(rows.device, non_blocking=True)


def prompt_bank(
    model: DualEncoder,
    texts: Sequence[Sequence[str]],
    *,
    batch_size: int = 256,
    device: torch.device | str,
    autocast: torch.dtype | None = None,
) -> tuple[Float[Tensor, "classes prompts dim"], Bool[Tensor, "classes prompts"]]:
    """The unit embedding of every text of every class; of classes with fewer texts than others the rest is zero.

    Args:
        texts: of each class, at least one.
    Returns:
        The embeddings, float32, on the CPU, and which of them are there. Where all are, their mean over the prompts,
        normalised again, is `class_vectors`.
    Raises:
        ValueError: there are no classes, or one has no text.
    """
    if not texts or not all(texts):
        raise ValueError(f"a bank of prompts needs texts of every class, got {[len(each) for each in texts]}")
    counts = [len(each) for each in texts]
    flat = [text for each in texts for text in each]
    rows = embed_texts(model, flat, batch_size=batch_size, device=device, autocast=autocast).split(counts)
    bank = nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
    mask = torch.arange(bank.shape[1]) < torch.tensor(counts)[:, None]
    return bank, mask


def mean_class_texts(
    model: DualEncoder, classes: ClassPrompts, *, device: torch.device | str
) -> Float[Tensor, "classes dim"]:
    """The mean text embedding of each class's prompts, not normalised before or after; float32, on the CPU.

    Classes may have unequal numbers of prompts. Of a model with `class_templates` its own count alone.
    """
    if model.class_templates:
        classes = ClassPrompts(classes.names, model.class_templates)
    rows: list[Tensor] = []
    prompts = classes.of_class
    texts = [text for each in prompts for text in each]
    order = encode_texts(model, texts, lambda tower: rows.append(tower.embedding.float().cpu()),
                         batch_size=256, device=device)  # fmt: skip
    return _means(torch.cat(rows)[order], [*map(len, prompts)])


def frozen_class_vectors(teacher: FrozenTeacher, classes: ClassPrompts) -> Float[Tensor, "classes dim"]:
    """A frozen teacher's `class_vectors`, made where it is; on the CPU. The teacher is live: a cache has no classes.

    Raises:
        ConfigError: its text tower is untrained.
    """
    if "text" in teacher.model.random_towers:
        raise ConfigError(
            f"classes are told apart by the teacher's text tower, and that of {teacher.name} has random weights: name "
            "a teacher with a trained one"
        )
    device = next(teacher.model.parameters()).device
    return class_vectors(teacher.model, classes.names, classes.templates, own=classes.own, device=device)


class LearnedClassVectors:
    """Class vectors by a text tower that learns: as it is now, with gradient.

    Args:
        at_once: prompts of a class in each call, drawn anew by their places, the same for all classes; None, or as many
            as there are: all. A class with fewer prompts than another counts its own from the first again.
    """

    def __init__(self, classes: ClassPrompts, model: DualEncoder, *, at_once: int | None = None) -> None:
        self.counts = [len(prompts) for prompts in classes.of_class]
        self.most = max(self.counts)
        self.at_once = min(at_once or self.most, self.most)
        self.tokens = model.tokenizer(classes.texts)  # class by class
        counts = torch.tensor(self.counts)
        self._count, self._first = counts[:, None], (counts.cumsum(0) - counts)[:, None]

    def __call__(self, model: DualEncoder, generator: torch.Generator | None = None) -> Float[Tensor, "classes dim"]:
        """One unit vector for each class, float32 or wider.

        Args:
            generator: what the prompts are drawn from, on the CPU, the same in every process. None: only where all
                prompts are read.
        Raises:
            ValueError: prompts are to be drawn and there is no generator.
        """
        tokens, counts = self.tokens, self.counts
        if self.at_once < self.most:
            if generator is None:
                raise ValueError(
                    f"{self.at_once} of {self.most} templates are to be drawn, but from what? Give a generator"
                )
            drawn = torch.randperm(self.most, generator=generator)[: self.at_once]
            tokens = tokens.rows((self._first + drawn % self._count).flatten())
            counts = [self.at_once] * len(counts)
        embedding = model.encode_text(tokens.to(model.log_logit_scale.device, non_blocking=True)).embedding
        wide = embedding.float() if embedding.dtype in (torch.bfloat16, torch.float16) else embedding
        return F.normalize(_means(F.normalize(wide, dim=-1), counts), dim=-1)


class LearnedSentences:
    """Unit vectors of sentences by a text tower that learns: as it is now, with gradient.

    Args:
        at_once: sentences in each call, drawn anew; None, or as many as there are: all.
    """

    def __init__(self, sentences: Sequence[str], model: DualEncoder, *, at_once: int | None = None) -> None:
        self.number, self.at_once = len(sentences), min(at_once or len(sentences), len(sentences))
        self.tokens = model.tokenizer(sentences)

    def __call__(
        self, model: DualEncoder, generator: torch.Generator
    ) -> tuple[Float[Tensor, "drawn dim"], Int[Tensor, " drawn"]]:
        """The vectors of the sentences that this call draws, and which these are; float32 or wider.

        Args:
            generator: what they are drawn from, on the CPU, the same in every process.
        """
        device, tokens, drawn = model.log_logit_scale.device, self.tokens, torch.arange(self.number)
        if self.at_once < self.number:
            drawn = torch.randperm(self.number, generator=generator)[: self.at_once]
            tokens = tokens.rows(drawn)
        embedding = model.encode_text(tokens.to(device, non_blocking=True)).embedding
        wide = embedding.float() if embedding.dtype in (torch.bfloat16, torch.float16) else embedding
        return F.normalize(wide, dim=-1), drawn.to(device, non_blocking=True)
