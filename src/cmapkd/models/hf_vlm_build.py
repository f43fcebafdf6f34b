"""From a folder or hub id of transformers' format to an `HfVlm`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from cmapkd.config import Config, ConfigError
from cmapkd.models.chat import HfChatProcessor
from cmapkd.models.cut_vocabulary import ABOUT_VOCABULARY, VocabularyChoice, cut_to_texts
from cmapkd.models.hf_vlm import HfVlm
from cmapkd.models.hf_vlm_read import read_processor
from cmapkd.models.kept_tokens import texts_given
from cmapkd.models.lora import LoraConfig
from cmapkd.models.vlm_folders import check_not_merged
from cmapkd.models.vlm_layouts import LAYOUTS

OLDEST = 5
"""Major version of transformers, below which these models have other parts and processors."""


class HfVlmOptions(Config):
    """What can be chosen about an image-text model of transformers that writes."""

    takers: ClassVar[str] = "models that write"

    max_tokens: int | None = Field(
        None, ge=8, description="Longest dialogue with its picture, in tokens. None: as long as the model takes."
    )
    lora: LoraConfig | None = Field(None, description="Low-rank adapters of a student that learns little else.")
    vocabulary: VocabularyChoice = Field("whole", description=ABOUT_VOCABULARY)
    revision: str | None = Field(None, description="Commit or branch of the hub repository. None: its main branch.")


def assemble(
    source: str,
    model: Any,
    options: HfVlmOptions,
    fetching: dict[str, Any],
    name: str,
    *,
    scratch: bool,
    texts: Iterable[str] | None = None,
) -> HfVlm:
    """The model with the processor that stands at `source`.

    Args:
        scratch: whether its weights are random.
        texts: whose tokens stay, where the options say so.
    Raises:
        ConfigError: there are no such texts, or the processor cannot serve a model that writes.
        ValueError: there is none that can be read.
    """
    native = read_processor(source, fetching, name)
    if options.vocabulary == "texts":
        lead = processor_of(native, model.config, name=name).lead
        model, native = cut_to_texts(model, native, texts_given(texts, name), name=name, lead=lead)
    processor = processor_of(native, model.config, name=name, max_tokens=options.max_tokens)
    made = HfVlm(model, processor=processor, name=name)
    if scratch:
        made.random_parts = tuple(part for part, names in made.parts.items() if names)
    if options.lora is not None:
        if options.lora.folder is not None:
            check_not_merged(options.lora.folder, Path(source))
        made.adapt(options.lora)
    return made


def check_library(name: str) -> None:
    """Refuses a transformers whose models that write have other parts than `LAYOUTS` says.

    Raises:
        ConfigError: it is older than 5.
    """
    import transformers

    found = str(transformers.__version__)
    if int(found.partition(".")[0]) < OLDEST:
        raise ConfigError(
            f"{name} writes, and models that write need transformers {OLDEST} or newer. Installed is {found}: "
            "pip install --upgrade transformers"
        )


def processor_of(native: Any, config: Any, *, name: str, max_tokens: int | None = None) -> HfChatProcessor:
    """transformers' processor as the model of that config needs it.

    Raises:
        ConfigError: more tokens are allowed than the model takes, the processor does not fit, or transformers is too
            old.
    """
    check_library(name)
    longest = int(config.text_config.max_position_embeddings)
    if max_tokens is not None and max_tokens > longest:
        raise ConfigError(f"max_tokens {max_tokens} is more than {name} takes: {longest} tokens")
    layout = LAYOUTS[config.model_type]
    image_id = getattr(config, "image_token_id", None)
    return HfChatProcessor(
        native,
        image_id=int(config.image_token_index if image_id is None else image_id),
        max_tokens=max_tokens or longest,
        picture_options=layout.picture_options,
        nested=layout.nested,
        name=name,
    )
