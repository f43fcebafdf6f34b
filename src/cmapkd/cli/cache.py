"""`cmapkd cache`: the teacher's answers on disk."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from cmapkd.cli.examples import examples

app = typer.Typer(help="The teacher's answers on disk: build, look at, check.", no_args_is_help=True)


@app.command(epilog=examples("build"))
def build(
    recipe: Annotated[str, typer.Argument(help="A packaged recipe or a YAML file.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Settings to change: key=value ...")] = None,
    whole: Annotated[
        bool, typer.Option("--all", help="Every sample in every view, not only what this run reads.")
    ] = False,
    rank: Annotated[int | None, typer.Option(help="This process of --world; by default torchrun says.")] = None,
    world: Annotated[int | None, typer.Option(help="Processes that build, each with its own number.")] = None,
) -> None:
    """Build what a recipe's cache lacks. Stopped at any moment, the same command goes on."""
    from rich.console import Console

    from cmapkd.cli.recipe import read_recipe
    from cmapkd.config import ConfigError

    rank = int(os.environ.get("RANK", "0")) if rank is None else rank
    world = int(os.environ.get("WORLD_SIZE", "1")) if world is None else world
    if not 0 <= rank < world:
        raise ConfigError(f"process {rank} of {world}: numbers run from 0 to {world - 1}")
    config = read_recipe(recipe, overrides)

    from cmapkd.cache import CacheConfig, CacheError
    from cmapkd.config import counted, in_bytes
    from cmapkd.run import RunConfig

    if config.cache is None:  # validated again: the views of a run with a cache cycle
        config = RunConfig.from_mapping({**config.plain(), "cache": CacheConfig().model_dump(mode="json")})

    import torch

    from cmapkd.cache.progress import BuildDisplay
    from cmapkd.run import build_student, classes_of, load_teachers, method_of, open_training, plan_cache, texts_of
    from cmapkd.run.build import check_training
    from cmapkd.run.cached import plan_student_cache, reads_stored_student

    source = open_training(config)
    teachers = load_teachers(config)
    student = build_student(config, source, teachers)
    method = method_of(config, student, teachers, classes=classes_of(config, source))
    check_training(config, method, source)  # freezes what does not learn
    texts_of(config, method, source)
    plans = [plan_cache(config, method, source, whole=whole, role=r) for r in config.teachers if r in method.teachers]
    if reads_stored_student(method):
        plans.append(plan_student_cache(config, method, source, whole=whole))
    if not plans:
        raise CacheError(
            f"method {config.method.name} asks no teacher of the recipe, and the student has no frozen image tower "
            "whose answers could be stored"
        )
    console = Console()
    cuda = torch.cuda.is_available() and not config.training.on_cpu
    device = f"cuda:{int(os.environ.get('LOCAL_RANK', '0'))}" if cuda else "cpu"
    for plan in plans:
        rows, missing = counted(len(plan.keys), "row"), in_bytes(plan.bytes_missing())
        size = f"{rows} of {plan.layout.row_bytes:,} bytes, {missing} missing; data {plan.source.fingerprint()[:12]}"
        console.print(f"{plan.folder}: {size}; {plan.layout.describe()}", highlight=False, soft_wrap=True)
        built = plan.build(
            device=device,
            workers=config.data.workers,
            rank=rank,
            world_size=world,
            skip_bad=config.data.on_bad_sample == "skip",
            progress=BuildDisplay(console),
            timeout=config.data.timeout,
        )
        bad = f"; {counted(len(built.bad), 'sample')} could not be read, the first {built.bad[0]}" if built.bad else ""
        console.print(f"built {counted(built.rows, 'row')}{bad}", highlight=False, soft_wrap=True)


@app.command(epilog=examples("info"))
def info(
    folder: Annotated[Path, typer.Argument(help="A cache's folder.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Say what a cache holds, how faithful it is, and what is missing."""
    from cmapkd.cache.folder import CacheFolder
    from cmapkd.cache.verify import describe
    from cmapkd.config import counted, in_bytes

    found = describe(CacheFolder.open(folder))
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    typer.echo(f"{found['teacher']} on {found['data']}: {found['layout']}")
    typer.echo(
        f"{found['rows_done']:,} of {found['rows']:,} rows ({found['rows_without_answer']:,} without answer) of "
        f"{found['bytes_per_row']:,} bytes, {in_bytes(found['bytes'])}; {found['shards_missing']} of "
        f"{counted(found['shards'], 'shard')} missing"
    )
    for line in _of_tokens(found["fidelity"]) if "tokens" in found["fidelity"] else _of_towers(found["fidelity"]):
        typer.echo(f"  {line}")
    for line in found["damaged"]:
        typer.echo(f"  damaged: {line}")


def _of_towers(fidelity: dict[str, Any]) -> Iterator[str]:
    for name, mean in fidelity["cosine_mean"].items():
        yield f"{name}: cosine with the live teacher {mean:.6f} on average, {fidelity['cosine_min'][name]:.6f} least"
    if fidelity["same_nearest"] is not None:
        yield f"nearest neighbour in a batch unchanged: {100 * fidelity['same_nearest']:.2f} %"


def _of_tokens(fidelity: dict[str, Any]) -> Iterator[str]:
    if fidelity["tokens"]:
        yield (
            f"{fidelity['tokens']:,} tokens of answers; {100 * fidelity['tail_mean']:.2f} % of the probability is "
            "outside the likeliest tokens"
        )
        yield f"KL(live, stored) {fidelity['kl_mean']:.2g} nats on average, {fidelity['kl_max']:.2g} at most"
        yield f"likeliest token unchanged: {100 * fidelity['same_likeliest']:.2f} %"


@app.command(epilog=examples("verify"))
def verify(
    folder: Annotated[Path, typer.Argument(help="A cache's folder.")],
    remove_damaged: Annotated[
        bool, typer.Option("--remove-damaged", help="Remove damaged shards; the next build makes them again.")
    ] = False,
) -> None:
    """Read every byte of a cache and compare it with its checksum; ends with 1 if anything is wrong."""
    from cmapkd.cache.folder import CacheFolder
    from cmapkd.cache.verify import verify as check

    wrong = total = 0
    for name, problem in check(CacheFolder.open(folder), remove_damaged=remove_damaged):
        total += 1
        if problem is not None:
            wrong += 1
            typer.echo(problem if name in problem else f"{name}: {problem}")
    typer.echo(f"{total - wrong} of {total} shards are as they were written")
    if wrong:
        raise typer.Exit(1)
