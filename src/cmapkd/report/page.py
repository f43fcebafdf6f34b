"""From what was read to one HTML file that needs no other and asks for none."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from cmapkd.report.blocks import Block, Paragraph, Remarks, Section
from cmapkd.report.plain import visible

_SCRIPT = "script.js"


@dataclass(frozen=True, slots=True)
class Page:
    """What a page says.

    Attributes:
        verdicts: of each arm or comparison its name, empty where there is one alone, and its sentences.
        about: what was trained, a line each.
    """

    title: str
    about: Sequence[str]
    verdicts: Sequence[tuple[str, Sequence[Paragraph]]]
    notes: Sequence[str]
    sections: Sequence[Section]
    version: str


def section(id: str, title: str, build: Callable[[], Sequence[Block]]) -> Section:
    """A section; where its part of the files is so damaged that it cannot be made, one that says so."""
    try:
        return Section(id, title, list(build()))
    except Exception as error:  # a page with a hole is worth more than none
        text = f"This part could not be made ({type(error).__name__}: {str(error)[:200]})."
        return Section(id, title, [Paragraph(text, "bad")])


def missing(texts: Sequence[str]) -> Section:
    """What is not on the page, and what to run to have it."""
    return Section("missing", "Not on this page", [Remarks(list(texts))] if texts else [])


def render(page: Page) -> str:
    """The page as HTML. Every text is escaped by the template; scripts run only if their hash is the page's own."""
    environment = _environment()
    script = environment.loader.get_source(environment, _SCRIPT)[0] if environment.loader else ""
    digest = hashlib.sha256(script.removesuffix("\n").encode()).digest()
    kept = [each for each in page.sections if each.blocks]
    return environment.get_template("page.html").render(
        page=page, sections=kept, script_hash=base64.b64encode(digest).decode("ascii")
    )


def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("cmapkd.report", "template"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _shown(value: Any) -> Any:
    """Texts without characters that hide or reverse others; drawings as they are."""
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value
