"""Keys and tokens of the user's environment, which belong in nothing that a run writes."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cmapkd.config.base import ConfigError
from cmapkd.config.leaves import leaves

_OF_ENVIRONMENT = re.compile(r"(^|_)(key|token|secret|password|passwd|pass|credentials?)(_|$)", re.IGNORECASE)
_OF_SETTINGS = (
    "token",
    "api_key",
    "apikey",
    "password",
    "passwd",
    "secret",
    "access_token",
    "auth_token",
    "access_key",
)
_SHORTEST = 12  # characters; what is shorter would be found in ordinary words
_KNOWN_FORMS = re.compile(
    r"\b(hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|AKIA[A-Z0-9]{16})\b"
)


def redact(text: str) -> str:
    """`text` with every secret of the environment, and what has a secret's form, replaced by its name."""
    for name, value in _secrets().items():
        text = text.replace(value, f"<{name}>")
    key, equals, value = text.partition("=")
    if equals and value and key.rpartition(".")[2].lower().lstrip("-") in _OF_SETTINGS:
        text = f"{key}=<removed>"
    return _KNOWN_FORMS.sub("<removed>", text)


def refuse_secrets(values: Mapping[str, Any], *, where: str) -> None:
    """Refuses settings that hold a secret: they are written into the run folder.

    Raises:
        ConfigError: names the key, never the value.
    """
    known = _secrets()
    for path, value in leaves(values):
        if isinstance(value, str) and value:
            name = next((name for name, secret in known.items() if secret in value), None)
            if name or path.rpartition(".")[2].lower() in _OF_SETTINGS or _KNOWN_FORMS.search(value):
                what = f"the value of the environment variable {name}" if name else "a key or token"
                raise ConfigError(
                    f"{where}: {path} holds {what}, and settings are written into the run folder: take it out; "
                    "libraries read HF_TOKEN and WANDB_API_KEY from the environment themselves"
                )


def _secrets() -> dict[str, str]:
    found = {name: value for name, value in os.environ.items() if _OF_ENVIRONMENT.search(name)}
    return {name: value for name, value in found.items() if len(value) >= _SHORTEST and not Path(value).is_absolute()}
