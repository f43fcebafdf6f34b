"""open_clip's tokenizers, with the mask and the spans that they do not return."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from functools import cache
from typing import Any

from jaxtyping import Bool, Int
from torch import Tensor

from cmapkd.data.types import TokenBatch
from cmapkd.models.errors import first_line
from cmapkd.models.spans import span_finder


class OpenClipTokenizer:
    """open_clip's own tokenizer, with the mask and the spans that it does not return."""

    def __init__(self, tokenizer: Any, *, context_length: int) -> None:
        self.context_length = context_length
        self.native = tokenizer
        self.vocab_size: int = len(tokenizer.tokenizer) if hasattr(tokenizer, "tokenizer") else tokenizer.vocab_size
        self._spans = span_finder(tokenizer)
        self._of_cleaned = copy(tokenizer)  # spans need the cleaned text, so it is made here, once
        self._of_cleaned.clean_fn = str

    def __call__(self, texts: Sequence[str]) -> TokenBatch:
        if self._spans is None:
            ids = self.native(list(texts), context_length=self.context_length).long()
            return TokenBatch(ids, self._real(ids))
        cleaned = [self.native.clean_fn(text) for text in texts]
        ids = self._of_cleaned(cleaned, context_length=self.context_length).long()
        return TokenBatch(ids, self._real(ids), self._spans(texts, cleaned, self.context_length))

    def __deepcopy__(self, memo: dict[int, Any]) -> OpenClipTokenizer:
        return self  # nothing in it changes, and CLIP's vocabulary is large

    def _real(self, ids: Int[Tensor, "batch length"]) -> Bool[Tensor, "batch length"]:
        """CLIP's own vocabulary pads with 0, which is also "!": there the text ends with its end token."""
        inner = getattr(self.native, "tokenizer", None)
        if inner is None:
            return (ids == int(self.native.eot_token_id)).flip(1).cumsum(1).flip(1) > 0
        if inner.pad_token_id != inner.eos_token_id:
            return ids != int(inner.pad_token_id)
        ends = (ids == int(inner.eos_token_id)).long()  # padded with the end token: its first one is the text's own
        return (ends.cumsum(1) - ends) == 0


def make_tokenizer(text_config: Mapping[str, Any], *, source: str | None = None) -> OpenClipTokenizer:
    """The tokenizer of an open_clip `text_cfg`, as `open_clip.get_tokenizer` chooses it; `source` replaces its place.

    Raises:
        ValueError: its files are not there.
    """
    from open_clip.tokenizer import HFTokenizer

    length = int(text_config.get("context_length", 77))
    settings = dict(text_config.get("tokenizer_kwargs") or {})
    if not (named := text_config.get("hf_tokenizer_name")):
        return OpenClipTokenizer(_clip_tokenizer(**settings), context_length=length)
    mode = text_config.get("tokenizer_mode")
    try:
        native = HFTokenizer(source or named, context_length=length, tokenizer_mode=mode, **settings)
        if len(native.tokenizer) <= len(set(native.tokenizer.all_special_ids)):
            raise ValueError("it knows no words")  # what transformers 5 makes up where there are no files
    except Exception as error:
        raise ValueError(
            f"there is no tokenizer in {source or named!r} ({type(error).__name__}: {first_line(error)}). Put its "
            "files (tokenizer.json and tokenizer_config.json) into a folder and name it as text_cfg.hf_tokenizer_name, "
            "or connect to the Hugging Face hub once."
        ) from None
    return OpenClipTokenizer(native, context_length=length)


@cache
def _clip_tokenizer(**settings: Any) -> Any:
    """Made once: it parses 49,000 merges. The context length is given with each call."""
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer(**settings)
