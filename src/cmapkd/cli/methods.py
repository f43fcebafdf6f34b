"""`cmapkd methods`: the methods and their cards."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from cmapkd.settings import Index

_COLUMNS = ("method", "title", "paper", "package")


def methods(
    name: Annotated[str | None, typer.Argument(help="Show this method's card with its equations.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """List the methods, or show one method's card."""
    from importlib.metadata import entry_points

    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from cmapkd.cli.show import show
    from cmapkd.config import ConfigError, closest, printable
    from cmapkd.settings import read_index

    console = Console()
    index = read_index()
    offered = {each.name for each in entry_points(group="cmapkd.methods")}
    names = [*index.methods, *sorted(offered - {*index.methods})]
    if name is not None and name not in names:
        raise ConfigError(f"there is no method {name!r}{closest(name, names)}; known: {', '.join(names)}")
    cards = {key: _own(key, index) for key in index.methods if name in (None, key)}
    if len(names) > len(index.methods) and name not in index.methods:
        cards |= _of_packages(name)
    if as_json:
        typer.echo(json.dumps(cards if name is None else cards[name], indent=2, ensure_ascii=False))
        return
    if name is None:
        table = Table()
        for column in _COLUMNS:
            table.add_column(column, overflow="fold", no_wrap=column == "method")
        for key, card in cards.items():
            table.add_row(*(Text(printable(each)) for each in (key, card["title"], card["paper"], card["package"])))
        show(console, table)
        return
    console.print("\n".join(_lines(cards[name])), markup=False, highlight=False, soft_wrap=True)


def _lines(card: dict[str, Any]) -> list[str]:
    """A card as text."""
    lines = [card["title"], f"paper: {card['paper']}", f"package: {card['package']}", "equations:"]
    lines += [f"  {equation}" for equation in card["equations"]]
    lines += [
        f"needs: {card['needs']}",
        f"trainable: {card['trainable']}",
        f"checked against: {card['checked_against']}",
    ]
    lines += ["departures:" if card["departures"] else "departures: none"]
    lines += [f"  - {departure}" for departure in card["departures"]]
    lines += ["settings:"]
    return lines + [
        f"  {key} = {setting['default']!r}: {setting['description']}" for key, setting in card["settings"].items()
    ]


def _own(key: str, index: Index) -> dict[str, Any]:
    fields = index.classes[index.methods[key]]["fields"]
    settings = {
        name: {"default": "required" if field["required"] else field["default"], "description": field["about"]}
        for name, field in fields.items()
        if name != "name"
    }
    return {**index.cards[key], "package": "cmapkd", "settings": settings}


def _of_packages(name: str | None) -> dict[str, dict[str, Any]]:
    """The cards of other packages' methods, which importing torch and them brings."""
    from cmapkd.config import ConfigError
    from cmapkd.methods import METHODS

    cards: dict[str, dict[str, Any]] = {}
    for key in [each for each in METHODS if each not in METHODS.own] if name is None else [name]:
        try:
            cards[key] = _card(key)
        except ConfigError as error:  # a package that cannot be imported hides no other method
            if name is not None:
                raise
            cards[key] = {"title": str(error), "paper": "", "package": METHODS.origin(key), "problem": str(error)}
    return cards


def _card(key: str) -> dict[str, Any]:
    from dataclasses import asdict

    from cmapkd.methods import METHODS

    method = METHODS[key]
    try:
        defaults = method.Config().model_dump(mode="json")
    except ValueError:  # a setting without default
        defaults = method.Config.model_construct().model_dump(mode="json", warnings=False)
    settings = {
        name: {"default": "required" if field.is_required() else defaults.get(name), "description": field.description}
        for name, field in method.Config.model_fields.items()
        if name != "name"
    }
    return {**asdict(method.card), "package": METHODS.origin(key), "settings": settings}
