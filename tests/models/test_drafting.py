"""Speculative decoding: the text is the teacher's, and every pass keeps what a loop over plain forward passes keeps."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from vlm_support import chat, make_vlm

from cmapkd.data.dialogues import ChatInput, join_items
from cmapkd.models.drafting import Drafted, why_no_draft, write_with_draft
from cmapkd.models.generative import Decoding
from writers import Dialogues, make_converted, make_judge, make_other, make_writer


def shaken(model: Any, scale: float) -> Any:
    """A copy with other weights."""
    made, draws = copy.deepcopy(model), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=draws, dtype=parameter.dtype))
    return made


def in_a_loop(own: list[int], draft: Any, inputs: ChatInput, most: int, proposals: int) -> Drafted:
    """What is proposed and kept of a known text, from a draft's whole forward passes."""
    ends, passes, proposed, accepted, place = draft.vocabulary.end_ids, 0, 0, 0, 0
    while place < len(own):
        offered: list[int] = []
        while len(offered) < min(proposals, most - place - 1) and not (offered and offered[-1] in ends):
            asked = inputs.with_answers([[*own[:place], *offered, 0]])
            logits = draft.logits(draft(asked).hidden["answer"].values[-1:])[0]
            logits[draft.vocabulary.image_id] = -torch.inf
            offered.append(int(logits.argmax()))
        kept = 0
        while kept < len(offered) and place + kept < len(own) and offered[kept] == own[place + kept]:
            kept += 1
        passes, proposed, accepted = passes + 1, proposed + len(offered), accepted + kept
        place += kept + 1
    return Drafted(own, passes, proposed, accepted)


def read(model: Any, *numbers: int) -> ChatInput:
    samples = [Dialogues()[number] for number in numbers]
    items = [model.processor.read(each.turns, [each.image][: each.turns[0].pictures]) for each in samples]
    return join_items(items, model.processor.pad_id)


@pytest.mark.parametrize("kind", ["llava", "smolvlm", "qwen2_5_vl", "gemma3"])
def test_every_family_can_write_with_a_draft_that_sees(kind: str) -> None:
    """A draft that is the teacher is always right. One that saw no picture, or forgot tokens, would not be."""
    teacher = make_vlm(kind)
    inputs, how = chat(teacher).rows([0]), Decoding(max_new_tokens=8)
    assert inputs.visual.any()
    own = teacher.generate(inputs, how)[0]
    found = write_with_draft(teacher, copy.deepcopy(teacher), inputs, inputs, how, proposals=3)
    assert found == (own, 2, 6, 6)
    other = write_with_draft(teacher, shaken(teacher, 0.05), inputs, inputs, how, proposals=3)
    assert (other.ids, other.accepted < other.proposed) == (own, True)
    assert "_get_candidate_generator" not in vars(teacher.model)
    assert teacher.model.generation_config.prompt_lookup_num_tokens is None


def test_a_draft_reads_the_dialogue_in_its_own_form() -> None:
    """Of other pictures, widths and numbers of visual tokens; also of dialogues without a picture."""
    teacher = make_judge(layers=2).model.eval()
    near = shaken(teacher, 0.03)
    kept = []
    for draft in (make_writer().eval(), near):
        for number in (0, 3):
            inputs, own_inputs = read(teacher, number), read(draft, number)
            for most, proposals in ((1, 4), (5, 3)):
                how = Decoding(max_new_tokens=most)
                own = teacher.generate(inputs, how)[0]
                found = write_with_draft(teacher, draft, inputs, own_inputs, how, proposals=proposals)
                with torch.no_grad():
                    assert found == in_a_loop(own, draft, own_inputs, most, proposals)
                kept.append(found.accepted)
    assert max(kept) > 0
    assert min(kept) == 0


def test_an_answer_that_ends_is_cut_at_its_end_token() -> None:
    teacher = make_judge().model.eval()
    inputs, how = read(teacher, 0), Decoding(max_new_tokens=7)
    token = teacher.generate(inputs, how)[0][2]
    teacher.vocabulary = replace(teacher.vocabulary, end_ids=(token,))
    ending = copy.deepcopy(teacher)
    own = teacher.generate(inputs, how)[0]
    assert len(own) <= 3
    assert own[-1] == token
    found = write_with_draft(teacher, ending, inputs, inputs, how, proposals=4)
    assert found == (own, 1, len(own), len(own))


def test_what_cannot_be_written_so_is_refused() -> None:
    teacher, draft = make_judge().model, make_writer()
    one, two = read(teacher, 0), read(draft, 0, 1)
    greedy = Decoding(max_new_tokens=4)
    for inputs, how, proposals, message in (
        (one, greedy, 0, "proposes 1 token or more"),
        (one, Decoding(temperature=1.0), 3, "greedily"),
        (two, greedy, 3, "one dialogue is written at a time, not 1 and 2"),
    ):
        with pytest.raises(ValueError, match=message):
            write_with_draft(teacher, draft, one, inputs, how, proposals=proposals)
    with pytest.raises(ValueError, match="must know every token"):
        write_with_draft(teacher, make_other().model, one, one, greedy, proposals=3)
    assert why_no_draft(teacher, make_writer(extra=2)) is None  # which knows more
    assert "load it twice" in str(why_no_draft(teacher, teacher))
    for models in ((make_converted(), draft), (teacher, make_converted())):  # rejected tokens stay in their state
        assert "has linear attention, whose state cannot take tokens back" in str(why_no_draft(*models))
    assert "must know every token" in str(why_no_draft(make_judge(extra=2).model, draft))
