"""The reference of all settings as a Markdown page."""

from __future__ import annotations

from collections.abc import Iterator
from textwrap import fill

from cmapkd.settings.index import Index, Setting

_HEAD = """# Settings

Every key of a recipe: what it may be, its default, its meaning. On the command line: `cmapkd settings training`.

```bash
uv run cmapkd settings                # the sections
uv run cmapkd settings optim          # the keys of one
uv run cmapkd settings learning_rate  # a key, wherever it stands
```

A key is set in a recipe, or after it: `cmapkd distill recipe.yaml optim.learning_rate=0.001 --out runs/a`. `none` is
written `null`. A setting marked **r** may change when a run is [resumed](reliability.md#what-may-change-at-a-resume).
This page is generated from the classes that read the settings: `python -m cmapkd.settings.make`.
"""
_TITLES = {
    "": "A recipe",
    "method.": "Methods",
    "weighting.": "Weightings",
    "options.": "Options of models",
    "evaluate": "`cmapkd evaluate --set`",
    "compare": "A comparison file",
    "engine": "A recipe of `cmapkd engine`",
}


def page(index: Index) -> str:
    """docs/settings.md."""
    lines = [_HEAD]
    shown = ""
    for section, kind in index.sections.items():
        title = next((words for start, words in _TITLES.items() if start and section.startswith(start)), _TITLES[""])
        if title != shown:
            lines.append(f"## {title}\n")
            shown = title
        if section and f"`{section}`" != title and section not in ("evaluate", "compare", "engine"):
            lines.append(f"### `{section}`\n")
        lines.append(fill(index.about(kind), width=118, break_on_hyphens=False) + "\n")
        settings = index.settings(kind)
        if settings:
            lines += [*_table(settings), ""]
    return "\n".join(lines).rstrip("\n") + "\n"


def _table(settings: list[Setting]) -> Iterator[str]:
    yield "<!-- facts -->"
    yield "| key | may be | default | meaning |"
    yield "| --- | --- | --- | --- |"
    for each in settings:
        mark = " **r**" if each.resumable else ""
        default = each.default if each.default in ("required", "none", "its defaults") else f"`{each.default}`"
        cells = (f"`{each.key}`{mark}", each.kind, default, each.about)
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
