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

    from cmapkd.config import ConfigError, closest
    from cmapkd.methods import METHODS

    console = Console()
    if name is not None and name not in METHODS:
        raise ConfigError(f"there is no method {name!r}{closest(name, METHODS)}; known: {', '.join(METHODS)}")
    chosen = METHODS if name is None else {name: METHODS[name]}
    cards: dict[str, dict[str, Any]] = {
        key: {**asdict(method.card), "settings": _settings(method.Config)} for key, method in chosen.items()
    }
    if as_json:
        typer.echo(json.dumps(cards if name is None else cards[name], indent=2, ensure_ascii=False))
        return
    if name is None:
        table = Table()
        for column in ("method", "title", "paper"):
            table.add_column(column)
        for key, card in cards.items():
            table.add_row(key, card["title"], card["paper"])
        console.print(table)
        return
    card = cards[name]
    lines = [card["title"], f"paper: {card['paper']}", "equations:"]
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
    defaults = config().model_dump(mode="json")
    return {
        key: {"default": defaults.get(key), "description": field.description}
        for key, field in config.model_fields.items()
        if key != "name"
    }
