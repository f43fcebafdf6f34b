"""open_clip's tokenizers, with the mask and the spans that they do not return."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from functools import cache
from pathlib import Path
from typing import Any

from jaxtyping import Bool, Int
from torch import Tensor

from cmapkd.data.types import TokenBatch
from cmapkd.models.cut_words import cut_clip
from cmapkd.models.errors import first_line
from cmapkd.models.hf_tokenizer import as_siglip_was_trained
from cmapkd.models.hub import cached_folder, hub_answers
from cmapkd.models.spans import span_finder
from cmapkd.models.types import text_list

# What transformers' tokenizers are read from.
_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
)


KEPT_TOKENS = "kept_tokens.json"
"""In a model folder: the ids that were left of the tokenizer, in the order of their new numbers."""


class OpenClipTokenizer:
    """open_clip's own tokenizer, with the mask and the spans that it does not return.

    Args:
        whole_because: why texts are padded to `context_length`, as open_clip pads them; None: to the longest of the
            batch, see `DualEncoder.whole_texts`.
    """

    def __init__(self, tokenizer: Any, *, context_length: int, whole_because: str | None = "open_clip does so") -> None:
        self.context_length, self.whole_because = context_length, whole_because
        self.native = tokenizer
        self.vocab_size: int = len(tokenizer.tokenizer) if hasattr(tokenizer, "tokenizer") else tokenizer.vocab_size
        self._spans = span_finder(tokenizer)
        self._of_cleaned = copy(tokenizer)  # spans need the cleaned text, so it is made here, once
        self._of_cleaned.clean_fn = str

    def __call__(self, texts: str | Sequence[str], *, spans: bool = False) -> TokenBatch:
        texts = text_list(texts)
        if self._spans is None or not spans:
            ids = self.native(texts, context_length=self.context_length).long()
            return self._shortened(TokenBatch(ids, self._real(ids), pad_id=self._pad_id))
        cleaned = [self.native.clean_fn(text) for text in texts]
        ids = self._of_cleaned(cleaned, context_length=self.context_length).long()
        places = self._spans(texts, cleaned, self.context_length)
        return self._shortened(TokenBatch(ids, self._real(ids), places, pad_id=self._pad_id))

    def padded(self, whole_because: str | None) -> OpenClipTokenizer:
        """The same, which pads texts to full length for this reason, or for None does not."""
        other = copy(self)
        other.whole_because = whole_because
        return other

    def of_length(self, context_length: int) -> OpenClipTokenizer:
        """The same, which cuts and pads texts to another length."""
        other = copy(self)
        other.context_length = context_length
        return other

    def _shortened(self, tokens: TokenBatch) -> TokenBatch:
        return tokens.measured().cut() if self.whole_because is None else tokens

    @property
    def end_id(self) -> int | None:
        """The token that ends each text; None where a transformers tokenizer has none."""
        inner = getattr(self.native, "tokenizer", None)
        if inner is None:
            return int(self.native.eot_token_id)
        end: int | None = inner.eos_token_id if inner.sep_token_id is None else inner.sep_token_id
        return end

    @property
    def _pad_id(self) -> int:
        inner = getattr(self.native, "tokenizer", None)
        return 0 if inner is None else int(inner.pad_token_id or 0)

    def __eq__(self, other: object) -> bool:
        """Whether both read every text alike: data workers then tokenise for both models at once."""
        return isinstance(other, OpenClipTokenizer) and self._reads() == other._reads()

    def __hash__(self) -> int:
        return hash(self._reads())

    def _reads(self) -> tuple[Any, ...]:
        return id(self.native), self.context_length, self.whole_because

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


def make_tokenizer(
    text_config: Mapping[str, Any], *, folder: Path | None = None, kept: Sequence[int] | None = None
) -> OpenClipTokenizer:
    """The tokenizer of an open_clip `text_cfg`, as `open_clip.get_tokenizer` chooses it.

    A SigLIP model's pads on the right, and ends texts with the end token, whatever its files leave out.

    Args:
        folder: of a model. Tokenizer files in it stand in place of those that `hf_tokenizer_name` names.
        kept: the ids that are left of open_clip's own tokenizer; None: all.
    Raises:
        ValueError: its files are not there.
    """
    length = int(text_config.get("context_length", 77))
    settings = dict(text_config.get("tokenizer_kwargs") or {})
    if not (named := text_config.get("hf_tokenizer_name")):
        native = _clip_tokenizer(**settings)
        if kept is not None:
            native = cut_clip(native, kept)
        return OpenClipTokenizer(native, context_length=length)
    settings |= {"context_length": length, "tokenizer_mode": text_config.get("tokenizer_mode")}
    if folder is not None and any((folder / file).is_file() for file in _FILES):
        native = _transformers_tokenizer(str(folder), settings)
    else:
        native = _named_tokenizer(str(named), settings, folder)
    if is_siglip(text_config):
        as_siglip_was_trained(native.tokenizer, name=str(folder or named))
    return OpenClipTokenizer(native, context_length=length)


def is_siglip(text_config: Mapping[str, Any]) -> bool:
    """Whether a `text_cfg` is of the kind of SigLIP 1 and 2: it pools the last place of a text that is padded."""
    pooled = text_config.get("pool_type") == "last" and bool(text_config.get("no_causal_mask"))
    return pooled and bool(text_config.get("hf_tokenizer_name"))


def _named_tokenizer(named: str, settings: dict[str, Any], folder: Path | None) -> Any:
    """From a local folder, else from the hub's cache, else from the hub."""
    if (found := Path(named) if Path(named).is_dir() else cached_folder(named, _FILES)) is not None:
        return _transformers_tokenizer(str(found), settings)
    if hub_answers():
        return _transformers_tokenizer(named, settings)
    lacking = f"{folder} has no tokenizer files, and " if folder is not None else ""
    raise ValueError(
        f"{lacking}the tokenizer {named!r} that text_cfg.hf_tokenizer_name names is no local folder, is not in the "
        "Hugging Face cache of this machine, and the hub cannot be reached. Put its files (tokenizer.json and "
        f"tokenizer_config.json) into {folder or 'a folder, and name that as text_cfg.hf_tokenizer_name'}, or connect "
        "once."
    )


def _transformers_tokenizer(source: str, settings: dict[str, Any]) -> Any:
    """open_clip's wrapper of a transformers tokenizer.

    Raises:
        ValueError: there is none at `source`.
    """
    from open_clip.tokenizer import HFTokenizer

    try:
        native = HFTokenizer(source, **settings)
        if len(native.tokenizer) <= len(set(native.tokenizer.all_special_ids)):
            raise ValueError("it knows no words")  # what transformers 5 makes up where there are no files
    except Exception as error:
        raise ValueError(
            f"there is no tokenizer in {source!r} ({type(error).__name__}: {first_line(error)}). Put its files "
            "(tokenizer.json and tokenizer_config.json) into a folder and name it as text_cfg.hf_tokenizer_name."
        ) from None
    return native


@cache
def _clip_tokenizer(**settings: Any) -> Any:
    """Made once: it parses 49,000 merges. The context length is given with each call."""
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer(**settings)
