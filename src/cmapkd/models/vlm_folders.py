"""What a saved model that writes says of itself, before its weights are read into another one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cmapkd.config import ConfigError
from cmapkd.models.hf_vlm_read import read_processor
from cmapkd.models.storage import DESCRIPTION


def check_same_tokens(model: Any, folder: Path) -> None:
    """Refuses weights of a saved model whose tokens are others: as many rows of words fit, and mean other words.

    Raises:
        ConfigError: names the folder and the first token that differs.
    """
    if not (folder / DESCRIPTION).is_file():  # a weight file alone does not say what its rows mean
        return
    own, name = model.processor.native.tokenizer.get_vocab(), f"the model in {folder}"
    home = next((each for each in (folder / "processor", folder) if (each / "tokenizer.json").is_file()), None)
    if home is None:
        return
    theirs = read_processor(str(home), {}, name).tokenizer.get_vocab()
    differing = [(number, token) for token, number in own.items() if theirs.get(token) != number]
    if not differing:  # where theirs are more, the shapes do not fit
        return
    number, token = min(differing)
    raise ConfigError(
        f"{name} has other tokens than {model.name}: token {number} is {token!r} here, and {token!r} is "
        f"{'token ' + str(theirs[token]) if token in theirs else 'no token'} there. Its weights stand for its own "
        "tokens: train on the texts that it was trained with, or name the folder as the student"
    )


def check_not_merged(adapters: Path, folder: Path) -> None:
    """Refuses adapters beside weights that have them already.

    Raises:
        ConfigError: they are those of the model in this folder.
    """
    if adapters.resolve().parent == folder.resolve():
        raise ConfigError(
            f"lora.folder {adapters} has the adapters of the model in {folder}, whose weights have them already: leave "
            "lora.folder out, and new adapters learn on these weights"
        )
