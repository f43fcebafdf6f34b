"""`cmapkd compare`: many runs, one table."""

from __future__ import annotations

import re
import shlex
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from cmapkd.cli.command import Command, command_line, tell_start
from cmapkd.cli.report import leave_page

_FOLLOWS = {"--seeds": re.compile(r"\d+$"), "--arms": re.compile(r"[^=:]+:(\s|$)")}


class CompareCommand(Command):
    """Takes `--seeds 0 1 2` and `--arms A B` for `--seeds 0 --seeds 1 ...`, by the form of what follows."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, spread(args))


def spread(arguments: list[str]) -> list[str]:
    """Arguments with the option repeated before every value that follows it."""
    result: list[str] = []
    current: str | None = None
    for place, argument in enumerate(arguments):
        first = place > 0 and arguments[place - 1] in _FOLLOWS
        if current is not None and not first and _FOLLOWS[current].match(argument):
            result.append(current)
        elif not first:
            current = argument if argument in _FOLLOWS else None
        result.append(argument)
    return result


def compare(
    source: Annotated[
        str | None, typer.Argument(metavar="COMPARISON.yaml|RECIPE", help="A comparison file, or the arms' recipe.")
    ] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="Settings of all arms: key=value ...")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the comparison; finished runs in it are kept.")] = None,
    axis: Annotated[list[str] | None, typer.Option(help="key=value,value,...; repeatable, all combined.")] = None,
    arms: Annotated[list[str] | None, typer.Option(help='"name: key=value ..."; one or more.')] = None,
    seeds: Annotated[list[int] | None, typer.Option(help="One or more, by default 0 1 2.")] = None,
    reference: Annotated[str | None, typer.Option(help="Arm or axis value that the others are compared with.")] = None,
    ablation: Annotated[str | None, typer.Option(help="A packaged comparison; RECIPE replaces its base.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the runs and stop.")] = False,
    tune_only: Annotated[bool, typer.Option("--tune-only", help="Tune and measure seconds a step, and stop.")] = False,
    family: Annotated[list[str] | None, typer.Option(help="With --tune-only, these families alone.")] = None,
) -> None:
    """Run and compare arms x axes x seeds. Intervals are paired; the same command goes on after a stop."""
    from rich.console import Console

    from cmapkd.cli.show import show
    from cmapkd.config import ConfigError, resumed_by

    if source is not None and ablation is not None and "=" in source:
        overrides, source = [source, *(overrides or [])], None
    if out is None and not dry_run:
        raise ConfigError("name the folder of the comparison: --out DIR")
    if family and not tune_only:
        raise ConfigError("--family chooses what --tune-only tunes: add --tune-only")

    if ablation is None and not axis:
        _check_early(source, overrides or [], arms or [])
    tell_start(f"{'listing' if dry_run else 'preparing'} the comparison: starting PyTorch")

    from cmapkd.compare import compare as carry_out
    from cmapkd.compare import load_comparison, prepare, tune
    from cmapkd.compare.write import shown_tables
    from cmapkd.training import Interrupted

    comparison = load_comparison(
        source,
        packaged=ablation,
        overrides=overrides or (),
        arms=arms or (),
        axes=axis or (),
        seeds=seeds or (),
        reference=reference,
    )
    console = Console()
    if dry_run:
        _list_runs(comparison, out, console)
        return
    assert out is not None
    command = command_line("compare", str(out / "comparison.yaml"), "--out", str(out))
    command += " --tune-only" * tune_only + "".join(f" --family {shlex.quote(name)}" for name in family or ())
    try:
        with resumed_by(f"Resume it with:\n  {command}"):
            if tune_only:
                if comparison.tuning is None and comparison.equal_time is None:
                    raise ConfigError("--tune-only: there is nothing to tune or to measure: add tuning or equal_time")
                if family:
                    tune(comparison, out=out, console=console, families=family)
                else:
                    prepare(comparison, out=out, console=console)
                kept = ("tuning.csv", "tuning.json", "tuned.yaml", "seconds.json")
                files = ", ".join(name for name in kept if (out / name).is_file())
                _say(console, f"{out}: {files}")
                return
            result = carry_out(comparison, out=out, console=console)
    except (Interrupted, KeyboardInterrupt) as stopped:
        why = str(stopped) or "stopped"
        _say(console, f"{why}. What is finished is in {out}. Go on with:\n  {command}")
        raise typer.Exit(130) from None
    for part in shown_tables(result.tables):
        show(console, part)
    if comparison.tasks:
        _say(console, f"Transfer, Average and Last of the tasks: the end of {out / 'table.md'}")
    _tell_end(result, out, console)
    if result.failed:
        raise typer.Exit(1)


def _tell_end(result: Any, out: Path, console: Any) -> None:
    if result.notice is not None:
        console.print(result.notice, markup=False, highlight=False)
    if result.failed:
        failed = f"{len(result.failed)} of {len(result.outcomes)} runs failed; the same command tries them again"
        _say(console, failed)
    files = "table.md, results.csv, results.json" + ", plots/" * bool(result.plots) + ", runs/"
    _say(console, f"{out}: {files}")
    leave_page(out, console)


def _say(console: Any, line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def _check_early(recipe: str | None, overrides: list[str], arms: list[str]) -> None:
    """Answers mistakes in single keys of a recipe's arms before torch is imported; a comparison file is read later."""
    from cmapkd.config import list_recipes, load_mapping
    from cmapkd.settings import check_recipe

    if recipe is None or not (recipe in list_recipes() or _is_recipe(Path(recipe))):
        return
    for arm in arms or [""]:
        name, _, settings = arm.partition(":")
        where = f"arm {name.strip()!r}" if arm else f"recipe {recipe!r}"
        check_recipe(load_mapping(recipe, [*overrides, *shlex.split(settings)]), where=where)


def _is_recipe(path: Path) -> bool:
    """Whether a file is a recipe, and no comparison; of what cannot be read, no."""
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return False
    return isinstance(values, dict) and not {"arms", "axes", "tables", "tuning", "seeds"} & values.keys()


def _list_runs(comparison: Any, out: Path | None, console: Any) -> None:
    """Prints every run and what is there of it; of a tuning, its budgets and the runs that are known by now."""
    from cmapkd.compare import make_plan
    from cmapkd.compare.search import read_tuning
    from cmapkd.compare.seconds import read_seconds
    from cmapkd.compare.tune import budget_in_words
    from cmapkd.config import counted

    say = partial(_say, console)
    races, tuned = read_tuning(comparison, out)
    for each in races:
        say(f"tuning {each.family.name}: {budget_in_words(each.family)}")
        for place, scores in enumerate(each.rounds):
            for score in scores:
                for run in score.trial.runs[place].values():
                    settings = " ".join(f"{key}={value}" for key, value in score.trial.settings.items())
                    say(f"{score.status:8}  {run.name}  {settings or 'as declared'}")
    plan = make_plan(comparison, tuned)
    missing: dict[str, Any] = {}
    if comparison.equal_time is not None:
        seconds, missing = read_seconds(plan, comparison.equal_time, out)
        if not missing:
            plan = make_plan(comparison, tuned, seconds)
    for run in plan.runs:
        state = plan.state(run, out) if out is not None else "new"
        say(f"{state:8}  {run.name}")
    todo = sum(plan.state(run, out) != "finished" for run in plan.runs) if out is not None else len(plan.runs)
    rows = sum(len(table.rows) for table in plan.tables)
    say(
        f"{counted(rows, 'row')} x {counted(len(comparison.seeds), 'seed')} in {counted(len(plan.tables), 'table')}: "
        f"{counted(len(plan.runs), 'different run')}, {todo} to do"
    )
    if races and tuned is None:
        arms = "; ".join(arm for each in races for arm in each.family.arms)
        say(f"{arms}: runs as declared are listed, with the winners' settings they are others")
    if missing:
        say(f"{'; '.join(missing)}: to be measured; runs at equal time are listed with equal steps until then")
    for remark in plan.remarks() if not missing else ():
        say(remark)
