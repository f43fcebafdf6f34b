"""transformers' tokenizers as the models were trained with them, whatever their folders say or leave out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from typing import Any

from cmapkd.config import ConfigError, install_advice
from cmapkd.data.types import TokenBatch
from cmapkd.models.errors import first_line
from cmapkd.models.spans import moved_spans
from cmapkd.models.types import text_list


class HfTokenizer:
    """A transformers tokenizer; pads to the longest of the batch.

    Only the library's fast tokenizers know where their tokens stand in the text.

    Args:
        whole_because: why texts are padded to `context_length` instead, see `DualEncoder.whole_texts`; None: they are
            not.
        canonical: cleans texts first as SigLIP's were: lower case, without ASCII punctuation, single spaces.
    """

    def __init__(
        self, tokenizer: Any, *, context_length: int, whole_because: str | None = None, canonical: bool = False
    ) -> None:
        self.native, self.context_length, self.whole_because = tokenizer, context_length, whole_because
        self.vocab_size: int = len(tokenizer)
        self.clean = canonicalizer() if canonical else None

    def over(self, native: Any) -> HfTokenizer:
        """Another tokenizer of transformers, read as this one is."""
        other = copy(self)
        other.native, other.vocab_size = native, len(native)
        return other

    def __call__(self, texts: str | Sequence[str], *, spans: bool = False) -> TokenBatch:
        texts = text_list(texts)
        cleaned = texts if self.clean is None else [self.clean(text) for text in texts]
        encoded = self.native(
            cleaned,
            padding="longest" if self.whole_because is None else "max_length",
            truncation=True,
            max_length=self.context_length,
            return_attention_mask=True,
            return_offsets_mapping=spans and bool(self.native.is_fast),
            return_tensors="pt",
        )
        places = encoded.get("offset_mapping")
        if places is not None and self.clean is not None:
            places = moved_spans(places.tolist(), texts, cleaned, canonical=True)
        pad_id = getattr(self.native, "pad_token_id", None) or 0
        tokens = TokenBatch(encoded["input_ids"].long(), encoded["attention_mask"].bool(), places, pad_id=pad_id)
        return tokens.measured() if self.whole_because is None else tokens

    def of_length(self, context_length: int) -> HfTokenizer:
        """The same, which cuts and pads texts to another length."""
        other = copy(self)
        other.context_length = context_length
        return other


def load_tokenizer(source: str, fetching: dict[str, Any], name: str) -> Any:
    """The transformers tokenizer of a folder or hub id.

    Raises:
        ValueError: there is none at `source`, or one that knows no words.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, **fetching)
        if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
            raise ValueError("it knows no words")  # what transformers 5 makes up where there are no files
        return tokenizer
    except Exception as error:
        raise ValueError(
            f"there is no usable tokenizer for {name} in {source!r} ({type(error).__name__}: {first_line(error)}). "
            "Copy tokenizer.json and tokenizer_config.json there, or name another place with the option `tokenizer`. A "
            "tokenizer that is only a sentencepiece model needs the extra siglip: " + install_advice("siglip")
        ) from None


def canonicalizer() -> Callable[[str], str]:
    """open_clip's cleaning of texts for SigLIP models, which is big_vision's; a function that can be pickled."""
    from open_clip.tokenizer import get_clean_fn

    clean: Callable[[str], str] = get_clean_fn("canonicalize")
    return clean


def pad_on_the_right(tokenizer: Any) -> None:
    """Makes a transformers tokenizer pad and cut texts at their end, here and where it is saved.

    Gemma's tokenizer pads on the left where its folder says nothing. CLIP and SigLIP models were trained on texts that
    begin at the first position, and SigLIP pools the last one.
    """
    for side in ("padding_side", "truncation_side"):
        setattr(tokenizer, side, "right")
        tokenizer.init_kwargs[side] = "right"


def as_siglip_was_trained(tokenizer: Any, *, name: str) -> None:
    """Makes a tokenizer frame texts as SigLIP 1 and 2 were trained: no start token, an end token, padding behind it.

    Raises:
        ConfigError: its texts cannot be made to end with its end token.
    """
    pad_on_the_right(tokenizer)
    if not _ends_texts(tokenizer) and hasattr(tokenizer, "add_eos_token"):
        tokenizer.add_bos_token, tokenizer.add_eos_token = False, True
        tokenizer.init_kwargs.update(add_bos_token=False, add_eos_token=True)
    if not _ends_texts(tokenizer):
        raise ConfigError(
            f"the tokenizer of {name} puts no end token behind a text, or a start token in front, which SigLIP models "
            "were not trained with: give its own with the option `tokenizer`"
        )


def check_end_token(tokenizer: Any, *, name: str) -> int:
    """The id of the token that ends each text, at which a CLIP model pools.

    Raises:
        ConfigError: texts do not end with one.
    """
    end: int | None = tokenizer.eos_token_id
    if end is None or end not in tokenizer("a")["input_ids"]:
        raise ConfigError(
            f"the tokenizer of {name} puts no end token behind a text, but a CLIP model pools there: give the "
            "tokenizer that it was trained with, by the option `tokenizer`"
        )
    return end


def _ends_texts(tokenizer: Any) -> bool:
    ids: list[int] = tokenizer("a")["input_ids"]
    start = tokenizer.bos_token_id
    started = start is not None and start != tokenizer.eos_token_id and ids[0] == start
    return ids[-1] == tokenizer.eos_token_id and not started
