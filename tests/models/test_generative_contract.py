"""What every family of models that write must do, asked of a tiny random model of each."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from vlm_support import DIALOGUES, MAKERS, TEXTS, asked, chat, make_vlm, picture

from cmapkd.config import ConfigError
from cmapkd.data.dialogues import ChatInput, Turn, join_items
from cmapkd.models import Decoding, TokenNeeds, build_model, dual, load_model, writing
from cmapkd.models.draws import drawn, nucleus, until_end
from cmapkd.models.hf_vlm import HfVlm

KINDS = [*MAKERS, "tiny_vlm"]
EVERYWHERE = frozenset({"answer", "visual", "prompt"})


def make(kind: str) -> HfVlm:
    if kind != "tiny_vlm":
        return make_vlm(kind)
    torch.manual_seed(0)
    model = build_model("tiny_vlm:small", captions=TEXTS * 3)
    assert isinstance(model, HfVlm)
    return model


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest) -> HfVlm:
    return make(request.param)


def test_cross_entropy_of_the_rows_is_the_librarys_loss(model: HfVlm) -> None:
    batch = chat(model)
    found = model(batch)
    labels = batch.texts.ids.masked_fill(~batch.answer, -100)
    output = model.model(**model.arguments(batch), labels=labels)
    rows = found.hidden["answer"]
    logits = F.linear(rows.values, model.model.lm_head.weight)  # the library's loss counts the padded rows too
    torch.testing.assert_close(F.cross_entropy(logits, found.targets), output.loss)
    torch.testing.assert_close(model.logits(rows.values), logits[:, : model.vocabulary.size])
    assert batch.texts.ids[rows.sample, rows.place + 1].tolist() == found.targets.tolist()


def test_rows_and_levels_have_their_shapes(model: HfVlm) -> None:
    batch = chat(model)
    infos = (*model.image_levels, *model.text_levels)
    found = model(batch, TokenNeeds(EVERYWHERE, tuple(info.name for info in infos), projected=True))
    assert found.projected is not None
    assert len(found.projected.values) == int(batch.visual.sum()) == len(found.hidden["visual"].values)
    assert found.projected.sample.unique().tolist() == [0, 1]  # the third dialogue has no picture
    real = sum(len(rows.values) for rows in found.hidden.values())
    assert real == int(batch.texts.mask.sum()) - len(batch)  # the end tokens predict nothing
    for info in infos:
        rows = found.levels[info.name]
        assert rows.keys() == ({"visual"} if info in model.image_levels else EVERYWHERE)
        assert all(each.values.shape[1] == info.width for each in rows.values())
        for each in rows.values():
            assert (each.sample.diff() >= 0).all()
    torch.testing.assert_close(found.levels[infos[-1].name]["answer"].values, found.hidden["answer"].values)
    with pytest.raises(ValueError, match="has no level"):
        model(batch, TokenNeeds(levels=("layers.99",)))


def test_gradients_reach_every_part(model: HfVlm) -> None:
    found = model(chat(model))
    model.zero_grad()
    F.cross_entropy(model.logits(found.hidden["answer"].values), found.targets).backward()
    learned = {name for name, each in model.named_parameters() if each.grad is not None and each.grad.any()}
    assert frozenset().union(*model.parts.values()) == {name for name, _ in model.named_parameters()}
    for part in ("vision", "projector", "embeddings", "language"):
        assert model.parts[part] & learned, part
    assert model.parts["head"] <= learned
    unused = {name for name, _ in model.named_parameters()} - learned
    assert all(
        "post_layernorm" in name or "k_proj.bias" in name or "embeddings" in name or "deepstack_merger_list.1" in name
        for name in unused
    ), unused


def test_a_batch_is_its_dialogues_one_by_one(model: HfVlm) -> None:
    needs = TokenNeeds(EVERYWHERE, (model.image_levels[0].name, "projector", "layers.0"))
    whole = model(chat(model), needs)
    for number in range(3):
        alone, part = model(chat(model, [number]), needs), model(chat(model).part(number, number + 1), needs)
        for one in (alone, part):
            for found, of_whole in (
                (one.hidden, whole.hidden),
                *((one.levels[k], whole.levels[k]) for k in one.levels),
            ):
                for where, rows in found.items():
                    mine = of_whole[where].sample == number
                    torch.testing.assert_close(rows.values, of_whole[where].values[mine], atol=2e-5, rtol=1e-4)
                    assert rows.place.tolist() == of_whole[where].place[mine].tolist()


def test_gradients_of_its_parts_add_up_to_those_of_a_batch(model: HfVlm) -> None:
    """Parts have their own pixels, tiles and windows."""

    def gradients(*batches: ChatInput) -> Tensor:
        model.zero_grad()
        for each in batches:
            found = model(each)
            F.cross_entropy(model.logits(found.hidden["answer"].values), found.targets, reduction="sum").backward()
        return torch.cat([each.grad.flatten() for each in model.parameters() if each.grad is not None])

    batch = chat(model)
    whole, parts = gradients(batch), gradients(batch.part(0, 1), batch.part(1, 3))
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=2e-5 * float(whole.abs().max()))


def test_another_picture_changes_the_answer(model: HfVlm) -> None:
    dialogue = DIALOGUES[0][0]
    found = [
        model(join_items([model.processor.read(dialogue, [picture(seed)])], model.processor.pad_id)).hidden["answer"]
        for seed in (0, 5)
    ]
    assert (found[0].values - found[1].values).abs().max() > 1e-4


def test_a_saved_model_is_the_same(model: HfVlm, tmp_path: Path) -> None:
    model.save(tmp_path)
    again = load_model(tmp_path)
    assert isinstance(again, HfVlm)
    assert again.processor == model.processor
    assert again.vocabulary == model.vocabulary
    batch = chat(again)
    assert torch.equal(batch.texts.ids, chat(model).texts.ids)
    assert torch.equal(again(batch).hidden["answer"].values, model(batch).hidden["answer"].values)
    assert pickle.loads(pickle.dumps(model.processor)) == model.processor  # noqa: S301
    assert again.processor.read(*DIALOGUES[1]).ids.tolist() == model.processor.read(*DIALOGUES[1]).ids.tolist()


def test_the_library_reads_the_folder_without_us(model: HfVlm, tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model.save(tmp_path)
    theirs, processor = AutoModelForImageTextToText.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    own = model.model.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in theirs.state_dict().items())
    assert processor.tokenizer.get_vocab() == model.processor.native.tokenizer.get_vocab()
    assert processor.chat_template or processor.tokenizer.chat_template


def test_what_the_hub_says_of_generation_changes_nothing() -> None:
    """A folder may ask for sampling, or for penalties of what was written before."""
    model, batch = make("tiny_vlm"), chat(make("tiny_vlm"))
    plain = model.generate(batch, Decoding(max_new_tokens=6))
    hub = model.model.generation_config
    hub.do_sample, hub.temperature, hub.repetition_penalty, hub.max_length = True, 3.0, 9.0, 2
    assert model.generate(batch, Decoding(max_new_tokens=6)) == plain


def test_generation_is_one_by_one_and_ends(model: HfVlm) -> None:
    batch, before = chat(model), model(chat(model)).hidden["answer"].values
    for how in (Decoding(max_new_tokens=5), Decoding(max_new_tokens=5, temperature=1.5, top_p=0.9)):
        together = model.generate(batch, how, keys=[7, 8, 9])
        for number in range(3):
            assert model.generate(chat(model, [number]), how, keys=[7 + number]) == [together[number]]
        for answer in together:
            ends = [token in model.vocabulary.end_ids for token in answer]
            assert not any(ends[:-1])
            assert ends[-1] or len(answer) == 5
            assert max(answer) < model.vocabulary.size
            assert model.vocabulary.image_id not in answer
    torch.testing.assert_close(model(batch).hidden["answer"].values, before)  # nothing of it stays behind
    with pytest.raises(ValueError, match="give a key"):
        model.generate(batch, Decoding(temperature=1.0))
    rewritten = batch.with_answers(together)
    assert model(rewritten).targets.tolist() == [token for answer in together for token in answer]


def test_greedy_takes_what_the_rows_say_is_likeliest() -> None:
    model = make("tiny_vlm")
    batch = chat(model)
    written = model.generate(batch, Decoding(max_new_tokens=4))
    found = model(batch.with_answers(written))
    logits = model.logits(found.hidden["answer"].values)
    logits[:, model.vocabulary.image_id] = -torch.inf
    assert logits.argmax(-1).tolist() == found.targets.tolist()


def test_draws_follow_the_probabilities() -> None:
    p = nucleus(torch.tensor([[0.0, 1.0, 2.0, -torch.inf]]), temperature=1.0)
    u = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    counts = torch.bincount(drawn(p.expand(4000, -1).contiguous(), u), minlength=4) / 4000
    torch.testing.assert_close(counts.double(), p[0], atol=1e-3, rtol=0)
    kept = nucleus(torch.tensor([[0.0, 1.0, 2.0, -1.0]]), temperature=1.0, top_p=0.7)
    assert (kept > 0).tolist() == [[False, True, True, False]]
    assert until_end([5, 2, 7, 2], (2,)) == [5, 2]


def test_a_bad_dialogue_has_a_reason() -> None:
    processor = make_vlm("llava", max_tokens=60).processor
    for dialogue, pictures, reason in (
        (asked("What?", " "), [picture(0)], "empty"),
        (asked("What is <image> this?", "a"), [picture(0)], "control token '<image>'"),
        (asked("What?", "a<|im_end|>"), [picture(0)], "control token"),
        (asked("What?" * 30, "a"), [picture(0)], "more than 60"),
        (asked("What?", "a"), [], "speak of 1 pictures"),
        ((Turn("assistant", "a"),), [], "needs a question"),
    ):
        with pytest.raises(ValueError, match=reason):
            processor.read(dialogue, pictures)


def test_every_answer_is_learned_that_its_turn_does_not_exclude() -> None:
    dialogue = (*DIALOGUES[0][0], Turn("user", TEXTS[3]), Turn("assistant", "2"))
    processor = make_vlm("qwen2_vl").processor
    excluded = tuple(replace(turn, learned=number != 1) for number, turn in enumerate(dialogue))
    one, both = processor.read(excluded, [picture(0)]), processor.read(dialogue, [picture(0)])
    assert one.ids.tolist() == both.ids.tolist()
    assert one.ids[one.answer].tolist() == processor.encode_answer("2")
    assert both.ids[both.answer].tolist() == [*processor.encode_answer("yes"), *processor.encode_answer("2")]


def test_a_template_without_a_generation_prompt_is_refused() -> None:
    model = make_vlm("llava")
    native = copy.deepcopy(model.processor.native)
    native.chat_template = "{% for m in messages %}{% for c in m['content'] %}{{ c['text'] }}{% endfor %}{% endfor %}"
    with pytest.raises(ConfigError, match="generation prompt"):
        type(model.processor)(native, image_id=3, max_tokens=60)


def test_a_student_takes_the_teachers_tokenizer() -> None:
    teacher = make_vlm("gemma3")
    student = writing(build_model("tiny_vlm:small", teacher=teacher), "this test")
    assert student.vocabulary.digest == teacher.vocabulary.digest
    assert student.vocabulary.end_ids[0] == teacher.vocabulary.end_ids[0]
    assert student(chat(student)).targets.tolist() == teacher(chat(teacher)).targets.tolist()  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="it writes answers"):
        dual(student, "this test")
