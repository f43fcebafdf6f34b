"""What a generative model exposes of a batch: flat rows of the positions that somebody reads, never a padded grid.

Teacher and student have prompts of different lengths and the same answers, so flat rows of answers line up by
themselves. Row i of the answers is the state that predicts token i: the shift by one stands in the model alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

Where = Literal["answer", "visual", "prompt"]
"""Positions that predict a token of an answer; visual tokens; the other positions of prompts."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The tokens that a model can write. Rows of its head beyond the real tokens are padding, and never counted.

    Attributes:
        size: real tokens; their ids are 0 to size - 1.
        rows: of the head, >= size.
        end_ids: tokens that end an answer; the first one is the one that answers are learned with.
        pad_id: fills short rows; may be an end token too.
        image_id: the placeholder of visual tokens.
        digest: of all (id, piece); equal digests are equal vocabularies.
        pieces: by id, as the tokenizer names them; empty where they are not known. With them, two vocabularies of which
            one has more tokens at its end can be told to agree on the others.
        lead: whitespace that is written before each answer and is no part of its text; mostly none.
        spoken: text is written in tokens below this id; those from it on were added, as marks. 0: not known.
    """

    size: int
    rows: int
    end_ids: tuple[int, ...]
    pad_id: int
    image_id: int
    digest: str
    pieces: tuple[str, ...] = field(default=(), repr=False)
    lead: str = ""
    spoken: int = 0


@dataclass(frozen=True, slots=True)
class TokenNeeds:
    """What somebody will read; a model computes and returns no more.

    Attributes:
        where: whose final states.
        levels: names among `image_levels` and `text_levels`.
        attention: layers of the language model whose attention maps are read, from 0.
        projected: whether the projected visual tokens are read, as the language model is fed with them.
        encoded: whether the vision tower's tokens are read, as the projector is given them.
        attention_mean: whether the mean of all layers' attention maps is read.
        hidden: Bool[batch length length], what each position may not attend to in the language model; None: nothing is
            hidden.
    """

    where: frozenset[Where] = frozenset({"answer"})
    levels: tuple[str, ...] = ()
    attention: tuple[int, ...] = ()
    projected: bool = False
    encoded: bool = False
    attention_mean: bool = False
    hidden: Tensor | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Rows:
    """Values of positions, flat.

    Attributes:
        values: Float[rows width].
        sample: Int[rows], the dialogue in the batch; ascending.
        place: Int[rows], the position in its row of tokens, or the visual token's number in its picture.
    """

    values: Float[Tensor, "rows width"]
    sample: Int[Tensor, " rows"]
    place: Int[Tensor, " rows"]


@dataclass(frozen=True, slots=True)
class Seen:
    """What a language model is fed of the pictures of a batch.

    Attributes:
        tokens: projected visual tokens, dialogue by dialogue.
        deeper: Float[rows width] each, further outputs of the vision tower that are added to the states of visual
            tokens after the first layers (Qwen3-VL); of other models none.
    """

    tokens: Rows
    deeper: tuple[Tensor, ...] = ()


@dataclass(frozen=True, slots=True)
class EncodedShape:
    """What a projector is given of each tile of a picture; most models make one tile of a picture.

    Attributes:
        tokens: how many, row by row of a square.
        width: of each.
    """

    tokens: int
    width: int


@dataclass(frozen=True, slots=True)
class TopTokens:
    """The likeliest tokens that a cached teacher knows of each row.

    Attributes:
        ids: Int[rows k], the likeliest first.
        log_p: Float[rows k], log-probabilities under the softmax over all tokens, at the temperature asked for.
        rest: Float[rows], log of the probability of all other tokens together; -inf where there is none.
    """

    ids: Int[Tensor, "rows k"]
    log_p: Float[Tensor, "rows k"]
    rest: Float[Tensor, " rows"]


@dataclass(frozen=True, slots=True)
class LogitHead:
    """From final states to logits over the real tokens, with what autograd needs to be written out by hand.

    `logits = cap(scale * (hidden @ weight.T + bias))`, where cap(z) = softcap * tanh(z / softcap).

    Attributes:
        weight: Float[size width], of the real tokens; a view of the model's own parameter.
        bias: Float[size].
    """

    weight: Float[Tensor, "size width"]
    bias: Float[Tensor, " size"] | None = None
    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, hidden: Float[Tensor, "rows width"]) -> Float[Tensor, "rows size"]:
        """Logits in float32 (float64 of float64)."""
        logits = F.linear(
            hidden, self.weight.to(hidden.dtype), None if self.bias is None else self.bias.to(hidden.dtype)
        )
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


@dataclass(frozen=True, slots=True)
class TokenFeatures:
    """One model's view of a batch of dialogues.

    Attributes:
        hidden: final states by where they stand.
        targets: Int[rows], the answer's tokens: `hidden["answer"]` row i predicts `targets[i]`.
        head: makes logits of final states; None of a cached teacher.
        projected: visual tokens as the language model is fed with them.
        levels: by level and where: outputs of vision blocks and of the projector have `visual` rows only.
        attention: by layer, Float[batch heads length length]; the mean of all of them, Float[batch length length],
            under `tap_attention.MEAN`.
        top: of a cached teacher, in place of `hidden`.
        encoded: Float[tiles tokens width], the vision tower's tokens as the projector is given them, tile by tile; None
            where the batch shows no picture.
    """

    hidden: Mapping[Where, Rows]
    targets: Int[Tensor, " rows"]
    head: LogitHead | None = None
    projected: Rows | None = None
    levels: Mapping[str, Mapping[Where, Rows]] = field(default_factory=dict)
    attention: Mapping[int, Tensor] = field(default_factory=dict)
    top: TopTokens | None = None
    encoded: Tensor | None = None
