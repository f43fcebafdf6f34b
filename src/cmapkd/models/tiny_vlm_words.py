"""A byte-level tokenizer learned from training texts, and the chat template of tiny image-text models that write."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

PAD, START, END = "<pad>", "<|im_start|>", "<|im_end|>"
_SPEAKERS = ("user", "assistant")


def template_of(
    picture: str, *, start: str = START, end: str = END, assistant: str = "assistant", lead: str = ""
) -> str:
    """A chat template in the form of ChatML, with a generation prompt.

    Args:
        picture: what stands for a picture.
        start, end: the tokens around each turn.
        assistant: the name of who answers.
        lead: whitespace before each answer, which a generation prompt leaves to the model.
    """
    role = "message['role']"
    if assistant != "assistant":
        role = f"{assistant!r} if {role} == 'assistant' else {role}"
    before = f"{{% if message['role'] == 'assistant' %}}{{{{ {lead!r} }}}}{{% endif %}}" if lead else ""
    newline = "{{ '\\n' }}"  # an expression, because Jinja drops a newline that follows a block
    return (
        "{% for message in messages %}"
        f"{start}{{{{ {role} }}}}{newline}"
        f"{before}"
        "{% for part in message['content'] %}"
        f"{{% if part['type'] == 'image' %}}{picture}{{% else %}}{{{{ part['text'] }}}}{{% endif %}}"
        "{% endfor %}"
        f"{end}{newline}"
        "{% endfor %}"
        f"{{% if add_generation_prompt %}}{start}{assistant}{newline}{{% endif %}}"
    )


def byte_tokenizer(texts: Iterable[str], *, size: int, special: Sequence[str] = (), **named: str) -> Any:
    """Byte-pair encoding over bytes, so that every text survives it; a transformers tokenizer.

    Args:
        texts: what pieces are learned from; the same ones in the same order give the same pieces. The names of who
            speaks are learned beside each text, since a dialogue has them there: else they would take a dozen pieces.
        size: most pieces, the 256 bytes and the special ones among them.
        special: further special tokens.
        named: roles of special tokens for a processor, as `image_token="<image>"`.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=2,
        show_progress=False,
        special_tokens=[PAD, START, END, *special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator((piece for text in texts for piece in (text, *_SPEAKERS)), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, extra_special_tokens=named)
