"""`cmapkd settings`: every key of a recipe, its default and its meaning."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from cmapkd.settings import Index, Setting


def settings(
    section: Annotated[
        str | None, typer.Argument(help="A section (training, method.clip_kd), or a key wherever it stands (ema).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """List the settings, or the keys of one section. Each with its default and meaning."""
    from dataclasses import asdict

    from cmapkd.settings import read_index

    index = read_index()
    sections = index.sections
    if section is None:
        chosen = {"recipe": index.settings(index.run)} if as_json else {}
        if not as_json:
            _list(index)
            return
    else:
        chosen = _find(section, index)
    if as_json:
        values = {name: [asdict(each) for each in found] for name, found in chosen.items()}
        typer.echo(json.dumps(values, indent=2, ensure_ascii=False))
        return
    for name, found in chosen.items():
        typer.echo(f"{name}: {index.about(sections[name])}" if name in sections else f"{name}:")
        for each in found:
            mark = "; may change at a resume" if each.resumable else ""
            typer.echo(f"  {each.key} = {each.default}  ({each.kind}{mark})")
            typer.echo(f"      {each.about}")


def _list(index: Index) -> None:
    """The sections, each with what it is about; those of one registry in a line."""
    groups = {"method.": index.methods, "weighting.": index.weightings, "options.": index.options}
    typer.echo("Keys of a recipe, with what they default to:")
    for each in index.settings(index.run):
        typer.echo(f"  {each.key} = {each.default}: {each.about}")
    typer.echo("Sections (cmapkd settings SECTION):")
    for name, kind in index.sections.items():
        if name and "*" not in name and not name.startswith(tuple(groups)):
            typer.echo(f"  {name}: {index.about(kind)}")
    for start, names in groups.items():
        typer.echo(f"  {', '.join(start + name for name in names)}")


def _find(name: str, index: Index) -> dict[str, list[Setting]]:
    """The settings of a section, or all of one key, by section.

    Raises:
        ConfigError: there is neither.
    """
    from cmapkd.config import ConfigError, closest

    sections = index.sections
    short = {each.partition(".")[2]: each for each in sections if each.startswith(("method.", "weighting."))}
    section = name if name in sections else short.get(name)
    if section:
        return {section: index.settings(sections[section])}
    above, _, key = name.rpartition(".")
    found = {
        each or "recipe": [setting for setting in index.settings(kind) if setting.key == key]
        for each, kind in sections.items()
        if not above or each == above
    }
    found = {each: settings for each, settings in found.items() if settings}
    if not found:
        keys = {setting.key for kind in sections.values() for setting in index.settings(kind)}
        known = [each for each in sections if each]
        raise ConfigError(
            f"there is no section or key {name!r}{closest(name, [*known, *sorted(keys)])}: cmapkd settings lists them"
        )
    return found
