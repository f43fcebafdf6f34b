"""Chat templates as published models have them, and what tells two processors of a family apart."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
from model_support import randomise
from vlm_support import MAKERS, TEXTS, asked, make_vlm, picture

from cmapkd.config import ConfigError
from cmapkd.data.dialogues import Turn
from cmapkd.models import build_model
from cmapkd.models.chat import HfChatProcessor
from cmapkd.models.config import ModelConfig
from cmapkd.models.generative import GenerativeModel
from cmapkd.models.hf_vlm import HfVlm
from cmapkd.models.hf_vlm_build import processor_of
from cmapkd.models.shared_vocabulary import check_same_vocabulary
from cmapkd.models.tiny_vlm_words import PAD

TWICE = (*asked(TEXTS[0], "yes"), *asked(TEXTS[3], "a red circle", pictures=0))


def smolvlm() -> HfVlm:
    """With the template of transformers, whose answers begin with a space that its generation prompt leaves out."""
    model, native = MAKERS["smolvlm"]()
    native.chat_template = importlib.import_module(
        "transformers.models.smolvlm.processing_smolvlm"
    ).DEFAULT_CHAT_TEMPLATE
    randomise(model)
    return HfVlm(model, processor=processor_of(native, model.config, name="smolvlm"), name="smolvlm").eval()


def answers(processor: HfChatProcessor, dialogue: tuple[Turn, ...]) -> list[str]:
    """What is learned of each answer, with special tokens."""
    item = processor.read(dialogue, [picture(0)] if any(turn.pictures for turn in dialogue) else [])
    told = processor.native.tokenizer.decode(item.ids[item.answer].tolist())
    return [each for each in str(told).split("<end_of_utterance>") if each]


def test_the_space_before_an_answer_is_learned_and_is_no_part_of_its_text() -> None:
    model = smolvlm()
    processor = model.processor
    assert (processor.lead, model.vocabulary.lead) == (" ", " ")
    assert answers(processor, TWICE) == [" yes", " a red circle"]
    told = processor.encode_answer("a red circle")
    assert processor.decode(told) == "a red circle"
    text = (Turn("user", TEXTS[3]), Turn("assistant", "2"))
    whole = processor.native.apply_chat_template(
        [{"role": turn.role, "content": [{"type": "text", "text": turn.text}]} for turn in text], tokenize=False
    )
    assert whole.endswith("Assistant: 2<end_of_utterance>\n")
    ids = processor.native.tokenizer(whole.rstrip("\n"))["input_ids"]
    assert processor.read(text, []).ids.tolist() == ids


def test_a_student_with_the_teachers_tokens_writes_the_same_before_an_answer() -> None:
    teacher = smolvlm()
    student = build_model(ModelConfig(name="tiny_vlm:small"), teacher=teacher)
    assert isinstance(student, GenerativeModel)
    check_same_vocabulary(teacher.vocabulary, student.vocabulary)
    assert student.processor.encode_answer("yes") == teacher.processor.encode_answer("yes")
    item = student.processor.read(TWICE, [picture(0)])
    assert student.processor.decode(item.ids[item.answer].tolist()[:2]) == "yes"
    with pytest.raises(ConfigError, match="the teacher writes ' ' before an answer and the student ''"):
        check_same_vocabulary(teacher.vocabulary, make_vlm("smolvlm").vocabulary)


def test_a_tokenizer_with_spaces_of_its_own_needs_none() -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    template = (
        "{% for message in messages %}{{ message['role'] }}: {% for part in message['content'] %}"
        "{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}</s>{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    bare = Tokenizer(models.BPE())
    bare.pre_tokenizer, bare.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    alphabet = [chr(number) for number in range(33, 127)]
    bare.train_from_iterator(
        TEXTS, trainers.BpeTrainer(special_tokens=[PAD, "</s>", "<image>"], initial_alphabet=[*alphabet, "▁"])
    )
    tokens = PreTrainedTokenizerFast(
        tokenizer_object=bare, pad_token=PAD, eos_token="</s>", extra_special_tokens={"image_token": "<image>"}
    )
    native = MAKERS["llava"]()[1]
    native.tokenizer, native.chat_template = tokens, template
    native.image_token_id = tokens.image_token_id
    processor = HfChatProcessor(native, image_id=tokens.image_token_id, max_tokens=99)
    assert processor.lead == ""
    assert tokens.convert_ids_to_tokens(processor.encode_answer("yes"))[-2:] == ["▁yes", "</s>"]


def limited(kind: str, **size: int) -> HfChatProcessor:
    """A processor of that family with another limit of its pictures' size."""
    model, native = MAKERS[kind]()
    pixels: Any = native.image_processor
    pixels.size = type(pixels.size)(**size) if not isinstance(pixels.size, dict) else size
    return processor_of(native, model.config, name=kind)


def test_limits_that_only_large_pictures_reach_count() -> None:
    small = limited("qwen2_5_vl", shortest_edge=32**2, longest_edge=96**2)
    large = limited("qwen2_5_vl", shortest_edge=32**2, longest_edge=960**2)
    again = limited("qwen2_5_vl", shortest_edge=32**2, longest_edge=96**2)
    assert small == again
    assert small != large
    shapes = [
        each.read(asked("Red?", "yes"), [picture(0, 400, 300)]).pictures["pixel_values"].shape
        for each in (small, large)
    ]
    assert shapes[0] != shapes[1]
    model, native = MAKERS["internvl"]()
    whole, tiles = (
        HfChatProcessor(native, image_id=model.config.image_token_id, max_tokens=99, picture_options=options)
        for options in ({"crop_to_patches": False}, {"crop_to_patches": True})
    )
    assert whole != tiles
