"""`cmapkd models`: which models a recipe can name."""

from __future__ import annotations

from typing import Annotated

import typer


def models(
    family: Annotated[str | None, typer.Argument(help="List the names of this family: open_clip, timm, tiny.")] = None,
    word: Annotated[str | None, typer.Argument(help="Only names that hold this word, for example mobilenetv3.")] = None,
) -> None:
    """List the model families, or the names of one."""
    from importlib.metadata import entry_points

    from cmapkd.config import ConfigError, closest
    from cmapkd.settings import read_index

    index = read_index()
    offered = {point.name: point for point in entry_points(group="cmapkd.models")}
    if family is None:
        for name, about in index.families.items():
            typer.echo(f"{name}:...  {about}")
        for name, point in offered.items():
            typer.echo(f"{name}:...  of {point.dist.name if point.dist else point.value}")
        typer.echo("a folder     that a run saved, or its run folder")
        typer.echo("Names of a family: cmapkd models tiny; cmapkd models timm mobilenetv3")
        return
    if family not in index.families and family not in offered:
        known = [*index.families, *offered]
        raise ConfigError(f"there is no model family {family!r}{closest(family, known)}; known: {', '.join(known)}")
    names = index.tiny if family == "tiny" else _names(family)
    shown = [name for name in names if word is None or word.lower() in name.lower()]
    if not shown:
        raise ConfigError(f"{family} has no name with {word!r}{closest(str(word), names)}: cmapkd models {family}")
    for name in shown:
        typer.echo(f"{family}:{name}")


def _names(family: str) -> list[str]:
    """What the family itself lists, which imports its library.

    Raises:
        ConfigError: it lists nothing.
    """
    from cmapkd.config import ConfigError
    from cmapkd.models.families import family as load_family

    names = getattr(load_family(family), "names", None)
    if names is None:
        raise ConfigError(
            f"{family} cannot list its names: any repository or folder that it reads will do, see docs/models.md"
        )
    return list(names())
