"""`cmapkd methods`: the methods and their cards."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer


def methods(
    name: Annotated[str | None, typer.Argument(help="Show this method's card with its equations.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """List the distillation methods, or show one method's card."""
    from dataclasses import asdict

    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from cmapkd.config import ConfigError, closest, printable
    from cmapkd.methods import METHODS

    console = Console()
    if name is not None and name not in METHODS:
        raise ConfigError(f"there is no method {name!r}{closest(name, METHODS)}; known: {', '.join(METHODS)}")

    def card_of(key: str) -> dict[str, Any]:
        method = METHODS[key]
        return {**asdict(method.card), "package": METHODS.origin(key), "settings": _settings(method.Config)}

    cards: dict[str, dict[str, Any]] = {}
    for key in METHODS if name is None else (name,):
        try:
            cards[key] = card_of(key)
        except ConfigError as error:  # a package that cannot be imported hides no other method
            if name is not None:
                raise
            cards[key] = {"title": str(error), "paper": "", "package": METHODS.origin(key), "problem": str(error)}
    if as_json:
        typer.echo(json.dumps(cards if name is None else cards[name], indent=2, ensure_ascii=False))
        return
    if name is None:
        table = Table()
        for column in ("method", "title", "paper", "package"):
            table.add_column(column)
        for key, card in cards.items():
            table.add_row(*(Text(printable(each)) for each in (key, card["title"], card["paper"], card["package"])))
        console.print(table)
        return
    card = cards[name]
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
    lines += [
        f"  {key} = {setting['default']!r}: {setting['description']}" for key, setting in card["settings"].items()
    ]
    console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)


def _settings(config: Any) -> dict[str, dict[str, Any]]:
    try:
        defaults = config().model_dump(mode="json")
    except ValueError:  # a setting without default
        defaults = config.model_construct().model_dump(mode="json", warnings=False)
    return {
        key: {"default": "required" if field.is_required() else defaults.get(key), "description": field.description}
        for key, field in config.model_fields.items()
        if key != "name"
    }
