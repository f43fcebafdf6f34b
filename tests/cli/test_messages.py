"""What the command line says: help with examples, narrow terminals, plain encodings, and advice that works here."""

from __future__ import annotations

import errno
import io
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import typer.main
from rich.console import Console
from rich.table import Table
from rich.text import Text
from test_cli import call

import cmapkd.cli
from cmapkd.cache import CacheError, CacheFolder
from cmapkd.cli.command import command_line, resume_line
from cmapkd.cli.demo import lesson_of
from cmapkd.cli.examples import EXAMPLES, examples
from cmapkd.cli.show import show
from cmapkd.config import install_advice, resumed_by, writing
from cmapkd.config.disk import DiskError, check_writable
from cmapkd.data.check import TooManyBadSamples
from cmapkd.results import RunResult


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    return lambda *arguments: call(*arguments, monkeypatch=monkeypatch, capsys=capsys)


def commands(group: Any, above: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, command in group.commands.items():
        found |= commands(command, f"{above}{name} ") if hasattr(command, "commands") else {f"{above}{name}": command}
    return found


COMMANDS = commands(typer.main.get_command(cmapkd.cli.app))


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_two_examples_that_the_command_understands(name: str) -> None:
    command = COMMANDS[name]
    last = name.split()[-1]
    assert command.epilog == examples(last)
    for line in EXAMPLES[last]:
        words = shlex.split(line)
        assert words[: 1 + len(name.split())] == ["cmapkd", *name.split()]
        command.make_context(name, words[1 + len(name.split()) :], resilient_parsing=False)


def test_a_folder_with_a_run_is_refused_with_the_command_that_resumes(cli: Any, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("{}")
    (tmp_path / "metrics.jsonl").write_text("")
    given = ("training.steps=2", "--out", str(tmp_path))
    for command, recipe in (("demo", "demo"), ("distill demo", "demo"), ("demo generative", "demo_generative")):
        code, _, errors = cli(*command.split(), *given)
        assert code == 2
        assert f"{tmp_path} is not empty: resume the run in it, or name another folder\n" in errors
        resume = f"Resume it with:\n  cmapkd distill {recipe} training.steps=2 --out {tmp_path} --resume\n"
        assert errors.endswith(resume)
    (tmp_path / "config.yaml").unlink()  # then there is nothing to resume
    code, _, errors = cli("demo", *given)
    assert code == 2
    assert errors == f"error: {tmp_path} is not empty: name another folder\n"


def test_a_full_disk_under_finalize_names_finalize(cli: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(*_: Any, **__: Any) -> None:
        with writing(tmp_path):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("cmapkd.run.finalize", full)
    code, _, errors = cli("finalize", str(tmp_path), "evaluation.batch_size=8", "--step", "best")
    assert code == 2
    command = f"cmapkd finalize {tmp_path} evaluation.batch_size=8 --step best"
    assert errors.endswith(f"Here that is, with the settings that change added:\n  {command}\n")


def test_a_full_disk_under_a_comparison_names_the_comparison(
    cli: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(*_: Any, **__: Any) -> None:
        with writing(tmp_path):
            raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr("cmapkd.compare.compare", full)
    code, _, errors = cli("compare", "demo", "--arms", "a:", "b: seed=1", "--out", str(tmp_path))
    assert code == 2
    assert "is full: free some space and resume the run" in errors
    assert errors.endswith(f"Resume it with:\n  cmapkd compare {tmp_path}/comparison.yaml --out {tmp_path}\n")


def test_the_demo_says_what_it_does_before_torch_is_imported(cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def late(*_: Any) -> None:
        raise ValueError("torch would be imported here")

    monkeypatch.setattr("cmapkd.cli.recipe.config_of", late)
    code, printed, errors = cli("demo")
    assert (code, errors) == (2, "error: torch would be imported here\n")
    assert printed.startswith("A small model (the student) learns to match pictures and captions from a large one")


def test_the_demo_ends_in_one_sentence() -> None:
    def scores(recall: float, params: int) -> dict[str, Any]:
        return {"retrieval": {"mean_r@1": recall}, "params": params}

    metrics = {"teacher": scores(68.8, 27), "student": scores(36.6, 5), "baseline": scores(4.6, 5), "steps": 400}
    lesson = lesson_of(metrics)
    assert lesson is not None
    assert "5.4 times smaller than its teacher, the student is right in 36.6 % of its searches" in lesson
    assert "4.6 % where it learned alone" in lesson
    assert "right in 68.8 %" in lesson
    early = lesson_of(metrics | {"student": scores(4.7, 5), "steps": 20})
    assert early is not None
    assert early.startswith("After 20 steps the student is right in 4.7 % of its searches, and 4.6 %")
    assert "made the difference" not in early
    assert lesson_of(metrics | {"baseline": None}) is None
    assert lesson_of(metrics | {"student": {"params": 5}}) is None


def test_settings_written_as_options_are_put_right(cli: Any) -> None:
    code, _, errors = cli("distill", "demo", "--optim.learning_rate", "1", "--out", "x")
    assert code == 2
    assert "settings are written without dashes: optim.learning_rate=VALUE" in errors


def test_commands_are_told_as_they_were_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("UV_RUN_RECURSION_DEPTH", raising=False)
    assert command_line("doctor", "my recipe.yaml") == "cmapkd doctor 'my recipe.yaml'"
    monkeypatch.setenv("UV_RUN_RECURSION_DEPTH", "1")
    assert command_line("doctor", "r.yaml") == "uv run cmapkd doctor r.yaml"


def result() -> RunResult:
    scores = {"params": 64_500_000, "retrieval": {"i2t": {"r@1": 31.2, "r@5": 60.0}, "t2i": {"r@1": 30.1, "r@5": 59.0}}}
    return RunResult(Path("run"), {"teacher": scores, "student": scores, "method": "clip_kd", "evaluated_on": "scenes"})


@pytest.mark.parametrize("width", [20, 40, 80, 200])
def test_a_table_of_scores_keeps_its_names_and_numbers_at_any_width(width: int) -> None:
    console = Console(width=width, file=io.StringIO(), record=True)
    show(console, result().table())
    text = console.export_text()
    for expected in ("teacher", "clip_kd", "31.2", "30.1", "64,500,000"):
        assert expected in text
    assert all(len(line) <= width for line in text.splitlines())


def test_remarks_are_not_wrapped_to_the_width_of_a_narrow_table() -> None:
    table = Table("name", "value", caption=Text("a remark that is longer than the table above it is wide"))
    table.add_row("a", "1")
    console = Console(width=80, file=io.StringIO(), record=True)
    show(console, table)
    assert "a remark that is longer than the table above it is wide" in console.export_text().splitlines()
    assert table.caption is not None


def test_every_line_of_a_listed_cell_stands_below_its_name() -> None:
    table = Table("arm", "R@1")
    table.add_row("clip_kd", "43.0 ± 1.4\ndifference +12.0\nseeds [+10.0, +14.0]")
    for column in table.columns:
        column.no_wrap = True
    console = Console(width=25, file=io.StringIO(), record=True)
    show(console, table)
    assert [line.rstrip() for line in console.export_text().splitlines()] == [
        "clip_kd", "  R@1: 43.0 ± 1.4", "    difference +12.0", "    seeds [+10.0, +14.0]",
    ]  # fmt: skip


def test_a_command_speaks_before_torch_is_imported(cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def late(*_: Any) -> None:
        raise ValueError("torch would be imported here")

    for module in ("distill", "doctor"):
        monkeypatch.setattr("cmapkd.cli.recipe.config_of", late)
        code, printed, errors = cli(module, "demo", *(("--out", "x") if module == "distill" else ()))
        assert (code, printed) == (2, "")
        assert errors.splitlines()[0].endswith(": starting PyTorch ...")
        assert errors.splitlines()[1] == "error: torch would be imported here"


def test_a_resume_names_the_settings_that_it_needs() -> None:
    line = resume_line("distill", "r.yaml", "--out", "x", "--resume")
    assert line(("data.max_bad_share=0.02",)).endswith("cmapkd distill r.yaml --out x --resume data.max_bad_share=0.02")
    with pytest.raises(TooManyBadSamples) as stopped, resumed_by(line):
        raise TooManyBadSamples("repair, and resume the run", settings=["data.max_bad_share=0.02"])
    assert "data.max_bad_share=0.02" in stopped.value.__notes__[0]


def test_a_table_that_fits_stays_a_table() -> None:
    table = Table("name", "value")
    table.add_row("a", "1")
    console = Console(width=20, file=io.StringIO(), record=True)
    show(console, table)
    assert "│" in console.export_text()


def test_no_colours_where_none_are_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    file = io.StringIO()
    show(Console(file=file, force_terminal=True, width=80), result().table())
    assert "\x1b[3" not in file.getvalue().replace("\x1b[3m", "")  # italics are no colour


def test_greek_in_a_card_ends_no_command_of_an_ascii_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding="ascii"))
    monkeypatch.setattr(sys, "argv", ["cmapkd", "methods", "clip_kd"])
    with pytest.raises(SystemExit) as ended:
        cmapkd.cli.main()
    sys.stdout.flush()
    assert not ended.value.code
    assert b"CLIP-KD" in shown.getvalue()


def test_advice_is_for_this_clone_and_never_names_a_stranger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert install_advice("plots") == "uv sync --inexact --extra plots"
    stated = ["torch>=2.6", "matplotlib>=3.9; extra == 'plots'", "onnx>=1.17; extra == 'onnx'"]
    monkeypatch.setattr("cmapkd.config.extras.requires", lambda _: stated)
    assert install_advice("plots", tmp_path) == "pip install 'matplotlib>=3.9'"
    assert "pyproject.toml" in install_advice("nothing", tmp_path)


def test_no_message_sends_anyone_to_the_index() -> None:
    root = Path(cmapkd.__file__).parent
    found = [
        str(path)
        for path in root.rglob("*.py")
        if "pip install 'cmapkd" in (text := path.read_text(encoding="utf-8")) or "pip install cmapkd" in text
    ]
    assert [path for path in found if "export" not in path] == []


def test_a_file_is_no_cache(tmp_path: Path) -> None:
    recipe = tmp_path / "t.yaml"
    recipe.write_text("a: 1")
    with pytest.raises(CacheError, match=r"t\.yaml is a file, so it is no cache: name the folder"):
        CacheFolder.open(recipe)
    with pytest.raises(CacheError, match=r"holds no cache\.json, so it is no cache"):
        CacheFolder.open(tmp_path)


def test_a_file_of_scores_is_tried_before_the_work(tmp_path: Path) -> None:
    check_writable(tmp_path / "new" / "scores.json")
    assert [*(tmp_path / "new").iterdir()] == []
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match="name another file"):
        check_writable(tmp_path / "file" / "scores.json")
    with pytest.raises(DiskError, match="is a folder"):
        check_writable(tmp_path)


def test_a_name_that_is_too_long_is_said_in_words(cli: Any) -> None:
    code, _, errors = cli("evaluate", "tiny:scenes-teacher", "--data", "scenes", "--json", "x" * 300)
    assert code == 2
    assert "File name too long" in errors


def test_a_misspelt_run_folder_gets_the_nearest(cli: Any, tmp_path: Path) -> None:
    (tmp_path / "first").mkdir()
    code, _, errors = cli("report", str(tmp_path / "firts"))
    assert code == 2
    assert f"there is no {tmp_path / 'firts'} (did you mean '{tmp_path / 'first'}'?)" in errors


def test_a_gap_that_is_nearly_none_has_no_minus() -> None:
    metrics = {**result().metrics, "baseline": result().metrics["student"], "gap_closed": -0.003}
    caption = RunResult(Path("run"), metrics).table().caption
    assert "gap closed: 0 %" in str(caption)
