"""Under which terms an exported model stands, as far as its teachers' own files tell."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

OURS = "apache-2.0"  # of the packaged models
_FREE = ("apache-2.0", "mit", "bsd-3-clause", "bsd-2-clause", "cc-by-4.0", "cc0-1.0", "isc", "unlicense", "openrail")


@dataclass(frozen=True, slots=True)
class Licence:
    """What a card says of the terms.

    Attributes:
        front_matter: the hub's name of the licence; `other` where it forbids a use, `unknown` where nobody knows.
        sentence: for the card's reader.
        warning: for the one who exports; None where nothing is to be said.
    """

    front_matter: str
    sentence: str
    warning: str | None


def licence_of(teachers: Sequence[str], given: str | None) -> Licence:
    """The licence that was given, else the teachers' own.

    Whether a teacher's terms bind its student is a question of law that nobody here answers; the card states them.

    Args:
        teachers: as the run names them, with their folders; of a model without a run, itself.
        given: by `--license`.
    """
    known = {teacher: teacher_licence(teacher) for teacher in teachers}
    restricted = {name: terms for name, terms in known.items() if terms is not None and not is_free(terms)}
    unknown = [name for name, terms in known.items() if terms is None]
    told = "; ".join(f"{_shown(name)}: {terms}" for name, terms in restricted.items())
    warning = None
    if restricted:
        warning = f"the weights that it was made from stand under terms that may forbid a use ({told})"
    elif unknown:
        warning = f"the licence of the weights that it was made from is not known ({', '.join(map(_shown, unknown))})"
    elif not teachers and given is None:
        warning = "no licence is stated: give one with --license"
    if given is not None:
        sentence = f"Licence: {given}." + (f" **Note: {warning}.**" if warning and teachers else "")
        return Licence(given, sentence, warning if restricted else None)
    if restricted:
        return Licence("other", f"**Warning: {warning}. Read them before you use this model.**", warning)
    if warning is not None:
        return Licence("unknown", f"**Warning: {warning}.**", warning)
    first = next(iter(known.values()))
    return Licence(str(first), f"Licence: {first}, as of {', '.join(map(_shown, teachers))}.", None)


def is_free(terms: str) -> bool:
    """Whether a licence allows every use, with attribution at most."""
    return terms.lower().replace(" ", "-") in _FREE


def teacher_licence(name: str) -> str | None:
    """The licence that a model's own files state; None where they state none. Asks no network."""
    family, colon, rest = name.partition(":")
    if not colon:
        family, rest = "", name
    if family == "tiny":
        return OURS
    if family == "timm":
        from timm.models import get_pretrained_cfg

        config = get_pretrained_cfg(rest.removesuffix("/pretrained"), allow_unregistered=True)
        return str(config.license) if config is not None and config.license else None
    return _of_card(Path(rest).expanduser() / "README.md")


def _of_card(path: Path) -> str | None:
    """The `license` of a model card's front matter."""
    try:
        found = re.match(r"---\n(.*?)\n---", path.read_text(encoding="utf-8"), re.DOTALL)
        front = yaml.safe_load(found[1]) if found else None
    except (OSError, ValueError, yaml.YAMLError):
        return None
    terms = front.get("license") if isinstance(front, dict) else None
    return str(terms) if terms else None


def _shown(name: str) -> str:
    family, colon, rest = name.partition(":")
    return f"{family}{colon}{Path(rest).name if rest.startswith(('/', '~', '.')) else rest}"
