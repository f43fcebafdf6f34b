"""`cmapkd engine`: data that models write and filters keep."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer


def engine(
    recipe: Annotated[str, typer.Argument(help="A packaged recipe of the engine, or a YAML file.")],
    out: Annotated[Path, typer.Option(help="Folder of the data. Finished shards in it are kept.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Settings to change: key=value ...")] = None,
    rank: Annotated[int | None, typer.Option(help="This process of --world; by default torchrun says.")] = None,
    world: Annotated[int | None, typer.Option(help="Processes that write, each with its own number.")] = None,
) -> None:
    """Have models ask and answer questions about pictures, and keep what filters let pass.

    Stopped at any moment, the same command goes on.
    """
    from rich.console import Console

    from cmapkd.cli.command import command_line, tell_start
    from cmapkd.config import ConfigError, counted

    processes = [*([] if rank is None else ["--rank", str(rank)]), *([] if world is None else ["--world", str(world)])]
    rank = int(os.environ.get("RANK", "0")) if rank is None else rank
    world = int(os.environ.get("WORLD_SIZE", "1")) if world is None else world
    if not 0 <= rank < world:
        raise ConfigError(f"process {rank} of {world}: numbers run from 0 to {world - 1}")
    tell_start(f"engine {recipe}: starting PyTorch")

    from cmapkd.cache.progress import BuildDisplay
    from cmapkd.engine import Engine, check_recipe, load_engine, told
    from cmapkd.engine.folder import KEPT, MANIFEST, RANDOM

    console = Console()
    try:
        config = load_engine(recipe, overrides or [])
        check_recipe(config, out)  # models may take minutes
        made = Engine(config)
        result = made.run(out, rank=rank, world_size=world, progress=BuildDisplay(console, what=("engine", "samples")))
    except KeyboardInterrupt:
        command = command_line("engine", recipe, *(overrides or []), "--out", str(out), *processes)
        typer.echo(f"stopped. Finished shards are in {out}. Go on with:\n  {command}")
        raise typer.Exit(130) from None
    if result.counts is None:
        typer.echo(f"{out}: {counted(result.made, 'shard')} made, {result.missing} left to the other processes")
        return
    typer.echo(f"{out}: {told(result.counts)}")
    if not result.counts["kept"]:
        typer.echo(f"{out}: nothing was kept, so there is nothing to learn from. {_fewest(result.counts['dropped'])}")
        return
    lists = f"{KEPT}, {RANDOM}" if config.write.control else KEPT
    typer.echo(
        f"{out}: {lists}, {MANIFEST}. Learn from all of it with data.train=jsonl:{out / KEPT} data.prompts.share=1"
    )


def _fewest(dropped: Mapping[str, int]) -> str:
    """What to look at where filters let nothing pass."""
    if not dropped:
        return "No candidate was written: look at the data, and at propose in the recipe."
    name = max(dropped, key=lambda each: dropped[each])
    return f"Most were dropped as {name}: shards/*/candidates.jsonl has their scores; loosen this filter in the recipe."
