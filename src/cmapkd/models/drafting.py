"""Speculative decoding: a draft proposes tokens, and its teacher verifies all of them in one pass.

Decoding is greedy: a proposed token stays where the teacher's likeliest token is the same, and behind the last one that
stays the teacher writes one of its own. So the text is the teacher's.

The teacher's side is transformers' assisted generation. Its drafts are another matter: they are given the teacher's
prompt, and no pictures (5.23). Here a draft reads the dialogue in its own form, as any model does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cmapkd.data.dialogues import ChatInput
from cmapkd.models.base import eval_mode
from cmapkd.models.draws import KeyedChoice, until_end
from cmapkd.models.generative import Decoding, GenerativeModel
from cmapkd.models.hf_vlm import HfVlm
from cmapkd.models.token_types import Vocabulary


class Drafted(NamedTuple):
    """An answer that a teacher wrote with a draft.

    Attributes:
        ids: its tokens, up to and including the end token, if it ended.
        passes: of the teacher, the first one with its prompt among them.
        proposed: tokens of the draft, over all passes.
        accepted: those of them that stayed.
    """

    ids: list[int]
    passes: int
    proposed: int
    accepted: int


def why_no_draft(teacher: GenerativeModel, draft: GenerativeModel) -> str | None:
    """Why a model cannot propose tokens to another one, in a clause; None where it can."""
    if teacher is draft:
        return f"{teacher.name} would be a draft of itself: load it twice"
    for model in (teacher, draft):
        if not isinstance(model, HfVlm):
            return f"{model.name} is no model of transformers, whose generation verifies what a draft proposes"
        if (why := why_state(model)) is not None:
            return why
    from transformers import DynamicCache, __version__

    if not hasattr(DynamicCache, "activate_past_recording"):
        return f"transformers {__version__} cannot take tokens of a draft back: install a newer version"
    return why_other_tokens(teacher.vocabulary, draft.vocabulary)


def why_state(model: GenerativeModel) -> str | None:
    """Why a model can neither draft nor verify, in a clause; None where it can."""
    if model.cache_shape is None or not model.cache_shape.state:
        return None
    return f"{model.name} has linear attention, whose state cannot take tokens back: take one with softmax alone"


def why_other_tokens(teacher: Vocabulary, draft: Vocabulary) -> str | None:
    """Why a draft does not know all tokens of its teacher, in a clause; None where it does."""
    if teacher.lead != draft.lead:
        return (
            f"the teacher writes {teacher.lead!r} before an answer and the draft {draft.lead!r}: give the draft the "
            "teacher's chat template"
        )
    if not _reads_all(teacher, draft):
        return (
            "the draft must know every token that the teacher writes, under the same number, and has "
            f"{draft.size:,} tokens ({draft.digest[:8]}) where the teacher has {teacher.size:,} "
            f"({teacher.digest[:8]}): take a draft with the teacher's tokenizer"
        )
    return None


def _reads_all(teacher: Vocabulary, draft: Vocabulary) -> bool:
    if (teacher.size, teacher.digest) == (draft.size, draft.digest):
        return True
    return bool(teacher.pieces) and draft.pieces[: teacher.size] == teacher.pieces


@torch.no_grad()
def write_with_draft(
    teacher: GenerativeModel,
    draft: GenerativeModel,
    inputs: ChatInput,
    draft_inputs: ChatInput,
    how: Decoding,
    *,
    proposals: int,
) -> Drafted:
    """A teacher's greedy answer to one dialogue, for which a draft proposes up to `proposals` tokens at a time.

    Passes over several tokens round otherwise than passes over one. So where two tokens are equally likely up to
    rounding, the text may differ from `teacher.generate`.

    Args:
        inputs, draft_inputs: the same dialogue, as each model reads it.
        how: greedy, without a least number of tokens.
    Raises:
        ValueError: several dialogues, no proposals, drawn tokens, or `why_no_draft`.
    """
    if (why := why_no_draft(teacher, draft)) is not None:
        raise ValueError(why)
    assert isinstance(teacher, HfVlm)
    assert isinstance(draft, HfVlm)
    if len(inputs) != 1 or len(draft_inputs) != 1:
        raise ValueError(f"one dialogue is written at a time, not {len(inputs)} and {len(draft_inputs)}")
    if proposals < 1 or how.temperature > 0 or how.min_new_tokens:
        raise ValueError(f"a draft proposes 1 token or more, greedily, to the end of an answer: {proposals}, {how}")
    prompt = teacher.arguments(inputs.prompts())
    start = prompt["input_ids"].shape[1]
    proposing = _Proposals(draft, draft_inputs, start, how, proposals, teacher.vocabulary.size)
    choice = _choice(teacher, how, start, teacher.vocabulary.size)
    with eval_mode(teacher), eval_mode(draft), draft.plain_generation(how), _assisted(teacher, how, proposing):
        written = teacher.model.generate(**prompt, logits_processor=[choice])
    proposing.count(written)
    ids = until_end(written[0, start:].tolist(), teacher.vocabulary.end_ids)
    return Drafted(ids, proposing.passes, proposing.proposed, proposing.accepted)


def _choice(model: HfVlm, how: Decoding, start: int, size: int) -> KeyedChoice:
    return KeyedChoice(size=size, never=(model.vocabulary.image_id, *how.never), start=start, keys=None)


@contextmanager
def _assisted(teacher: HfVlm, how: Decoding, proposing: _Proposals) -> Iterator[None]:
    """Inside this context transformers' model verifies what `proposing` proposes.

    Assisted generation begins where a number of tokens to look up is set. Who proposes is chosen by a method of the
    model, which no argument can replace.
    """
    model = teacher.model
    with teacher.plain_generation(how):
        model.generation_config.prompt_lookup_num_tokens = proposing.most
        model._get_candidate_generator = lambda **_: proposing
        try:
            yield
        finally:
            del model._get_candidate_generator


class _Proposals:
    """A draft, as transformers' assisted generation asks for candidates.

    Args:
        inputs: one dialogue, as the draft reads it.
        start: tokens of the teacher's prompt.
        most: tokens at a time.
        size: only tokens below it are proposed.
    """

    requires_model_outputs = False

    def __init__(self, draft: HfVlm, inputs: ChatInput, start: int, how: Decoding, most: int, size: int) -> None:
        from transformers import DynamicCache

        self.draft, self.start, self.how, self.most = draft, start, how, most
        self.passes = self.proposed = self.accepted = 0
        self._prompt = draft.arguments(inputs.prompts())
        own_start = self._prompt["input_ids"].shape[1]
        self._choice = _choice(draft, how, own_start, min(size, draft.vocabulary.size))
        self._cache = DynamicCache(config=draft.model.config.get_text_config(decoder=True))
        self._cache.activate_past_recording()  # of windows of attention, so that tokens can be taken back
        self._offered: Sequence[int] = ()
        self._before = start

    def get_candidates(self, ids: Tensor, **_: Any) -> tuple[Tensor, None]:
        """The teacher's tokens so far, and behind them what the draft proposes next."""
        self.count(ids)
        self.passes += 1
        room = self.how.max_new_tokens - (ids.shape[1] - self.start) - 1  # one is the teacher's own
        self._before = ids.shape[1]
        if room < 1:
            return ids, None
        offered = self._propose(ids[:, self.start :], min(room, self.most))
        self._offered = offered[0].tolist()
        self.proposed += len(self._offered)
        return torch.cat([ids, offered.to(ids.device)], dim=1), None

    def update_candidate_strategy(self, *_: Any) -> None:
        """Always the same number of tokens."""

    def count(self, ids: Tensor) -> None:
        """Notes which of the last proposals are among the teacher's tokens."""
        for offered, written in zip(self._offered, ids[0, self._before :].tolist(), strict=False):
            if offered != written:
                break
            self.accepted += 1
        self._offered = ()

    def _propose(self, written: Tensor, number: int) -> Tensor:
        given = self._prompt
        if (known := self._cache.get_seq_length()) > 0:  # the prompt and its pictures, and tokens that did not stay
            prompt = given["input_ids"]
            ids = torch.cat([prompt, written.to(prompt.device)], dim=1)
            self._cache.crop(-max(0, known - (ids.shape[1] - 1)))
            given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        found = self.draft.model.generate(
            **given, past_key_values=self._cache, max_new_tokens=number, logits_processor=[self._choice]
        )
        tokens: Tensor = found[:, given["input_ids"].shape[1] :]
        return tokens
