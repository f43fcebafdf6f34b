"""No code from data, no file outside, no secret written, nothing of strangers that a terminal or page would obey."""

from __future__ import annotations

import ast
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console

import cmapkd
from cmapkd.cache.prepare import CachePlan
from cmapkd.cli import main
from cmapkd.compare import ComparisonConfig, make_plan
from cmapkd.compare.tables import Cell, RowSummary, TableSummary
from cmapkd.compare.write import markdown, rich_table
from cmapkd.config import ConfigError, redact, refuse_secrets
from cmapkd.data.check import SampleLedger, TooManyBadSamples
from cmapkd.evaluation.table import score_table as evaluation_table
from cmapkd.models import build_model
from cmapkd.results import RunResult
from cmapkd.run import RunConfig, run

ROOT = Path(cmapkd.__file__).parent
EVIL = "\x1b[2J\x1b]0;owned\x07\u202e<script>alert(1)</script>|[/red][link=file:///etc/passwd]x\n# head"

FILES = sorted(path for path in (*ROOT.rglob("*.py"), *(ROOT.parents[1] / "benchmarks").glob("*.py")))


BETWEEN_OWN_PROCESSES = {Path("data/crew.py"), Path("data/ring.py"), Path("data/workers.py")}
"""Data workers and the process that started them pickle what they tell each other; nothing of it is ever on a disk."""


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


# ------------------------------------------------------------------------------------------------ the source itself


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_nothing_unpickles_or_runs_what_it_reads(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    if path.is_relative_to(ROOT) and path.relative_to(ROOT) in BETWEEN_OWN_PROCESSES:
        imported -= {"pickle"}
    assert not imported & {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "runpy", "code"}
    for name, call in calls(path):
        options = {option.arg: ast.unparse(option.value) for option in call.keywords}
        last = name.rpartition(".")[2]
        if name == "torch.load" or (last == "load_checkpoint" and name.startswith("open_clip")):
            assert options.get("weights_only") == "True", ast.unparse(call)
        assert options.get("weights_only", "True") == "True", ast.unparse(call)
        assert options.get("trust_remote_code", "False") == "False", ast.unparse(call)
        assert options.get("allow_pickle", "False") == "False", ast.unparse(call)
        assert options.get("shell", "False") == "False", ast.unparse(call)
        assert name not in ("eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.hub.load"), name
        if re.fullmatch(r"yaml\.\w+", name):
            assert last in ("safe_load", "safe_dump"), ast.unparse(call)
        assert last not in ("extractall", "unpack_archive"), ast.unparse(call)
        if last == "from_pretrained" and name.startswith("Auto"):
            assert "trust_remote_code" in options, ast.unparse(call)


def test_this_would_be_noticed(tmp_path: Path) -> None:
    for line in ("import pickle", "torch.load(f)", "yaml.load(f)", "eval('1')", "AutoConfig.from_pretrained(x)",
                 "f(x, trust_remote_code=True)", "tar.extractall()", "run(c, shell=True)"):  # fmt: skip
        (tmp_path / "bad.py").write_text(line)
        with pytest.raises(AssertionError):
            test_nothing_unpickles_or_runs_what_it_reads(tmp_path / "bad.py")


def test_a_folder_with_code_of_its_own_is_not_run(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModel": "own.Model"}})
    )
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Config: pass\n")
    with pytest.raises(ValueError, match="cannot read its config"):
        build_model(f"hf:{tmp_path}")
    assert not (tmp_path / "ran").exists()


# ------------------------------------------------------------------------------------------------ names of files


@pytest.mark.parametrize("name", ["../../x", "/etc/x", "a/b", "..", "a\0b", "x" * 500, EVIL, "con", " "])
def test_arms_of_any_name_stay_in_the_folder(name: str) -> None:
    base = {"base": "contrastive_scenes", "arms": {name: ["training.steps=3"]}, "seeds": [0]}
    (planned,) = (plan := make_plan(ComparisonConfig.from_mapping(base))).runs
    folder = plan.folder(planned, Path("/out"))
    assert folder.resolve().parent == Path("/out/runs")
    assert re.fullmatch(r"[\w.-]{1,200}", folder.name)


@pytest.mark.parametrize("name", ["../../x", "/etc/x", "..", "a\0b", "x" * 500, EVIL])
def test_caches_of_any_name_stay_in_the_folder(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    from cmapkd.cache import CacheConfig

    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    named: Any = SimpleNamespace(name=name)
    plan = CachePlan(CacheConfig(), named, None, named, None, None, "fp32")  # type: ignore[arg-type]
    plan.__dict__["identity"], plan.__dict__["_outline"] = {}, SimpleNamespace(plain=dict)
    assert plan.folder.resolve().is_relative_to("/caches/cmapkd")
    assert re.fullmatch(r"[\w.-]{1,200}", plan.folder.name)


# ------------------------------------------------------------------------------------------------ what is shown

SCORES = {"retrieval": {side: {"r@1": 1.0, "r@5": 2.0} for side in ("i2t", "t2i")} | {"mean_r@1": 1.0}, "params": 5}


def shown(*things: Any) -> str:
    text = io.StringIO()
    Console(file=text, width=300, force_terminal=True, color_system=None).print(*things)
    return text.getvalue()


def assert_harmless(text: str) -> None:
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f\u202e]", text.replace("\x1b]8;;\x1b\\", "")), text
    assert "owned" in text  # shown, as an escape


def test_tables_on_a_terminal(tmp_path: Path) -> None:
    roles = {"teacher": SCORES, "student": SCORES, "baseline": SCORES, "baseline_name": EVIL, "gap_closed": 0.5}
    (tmp_path / "metrics.json").write_text(json.dumps(roles | {"method": EVIL, "evaluated_on": EVIL}))
    assert_harmless(shown(RunResult.read(tmp_path).table()))
    assert_harmless(shown(evaluation_table({EVIL: SCORES}, title=EVIL)))


def comparison_table() -> TableSummary:
    cell = Cell({0: 1.0}, None, None, {})
    row = RowSummary(EVIL, None, False, False, {"retrieval.mean_r@1": cell}, {}, {})
    return TableSummary(EVIL, ("retrieval.mean_r@1",), EVIL, None, (), (row,), (EVIL,))


def test_a_comparison_on_a_terminal_and_in_markdown() -> None:
    assert_harmless(shown(rich_table(comparison_table())))
    text = markdown(comparison_table())
    assert_harmless(text)
    assert "<" not in text.replace("&lt;", "")
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len({row.count("|") for row in rows}) == 1
    assert not [line for line in text.splitlines() if line.startswith("# ")]


def test_errors_and_summaries(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    ledger = SampleLedger()
    ledger.add(1, [(EVIL, f"{EVIL}: odd")] * 200)
    with pytest.raises(TooManyBadSamples) as stopped:
        ledger.check_share(0.01)

    def fail() -> None:
        raise stopped.value

    monkeypatch.setattr("cmapkd.cli.app", fail)
    with pytest.raises(SystemExit):
        main()
    assert_harmless(capsys.readouterr().err)


# ------------------------------------------------------------------------------------------------ secrets

SECRET = "fake-0123456789abcdef0123456789"


def test_secrets_never_reach_the_run_folder(tmp_path: Path) -> None:
    recipe = {
        "student": {"name": "tiny:debug", "options": {"embed_dim": 16}},
        "data": {"train": "scenes?length=40&size=32", "val": "scenes@val?length=10&size=32"},
        "method": "contrastive",
        "training": {"steps": 2, "batch_size": 8, "device": "cpu", "log_every": 1, "evaluate_every": 1},
    }
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    names = ("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "MY_PASSWORD")
    environment = {**os.environ, **{name: f"{SECRET}{name}" for name in names}, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "cmapkd", "distill", "r.yaml", "--out", "run"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = [path for path in (tmp_path / "run").rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]
    assert not found
    assert SECRET not in done.stdout + done.stderr


def test_a_recipe_with_a_secret_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    base = {"student": "tiny:debug", "data": {"train": "scenes"}, "method": "contrastive", "training": {"steps": 2}}
    for change, key in (
        ({"student": {"name": "tiny:debug", "options": {"token": "short"}}}, "student.options.token"),
        ({"data": {"train": f"folder:/x?classes={SECRET}"}}, "data.train"),
        ({"student": {"name": "hf:a/b", "options": {"revision": "hf_" + "a" * 30}}}, "student.options.revision"),
    ):
        config = RunConfig.from_mapping(base | change)
        with pytest.raises(ConfigError, match=rf"{re.escape(key)} holds .*take it out") as refused:
            run(config, out=tmp_path / "run")
        assert SECRET not in str(refused.value)
        assert not (tmp_path / "run").exists()


def test_commands_are_noted_without_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setenv("XAUTH_KEY", "/home/user/.Xauthority")  # a path is no secret
    assert redact(f"--x={SECRET}") == "--x=<HF_TOKEN>"
    assert redact("teacher.options.token=abc") == "teacher.options.token=<removed>"
    assert redact("hf_" + "b" * 30) == "<removed>"
    assert redact("method.key_tokens=4") == "method.key_tokens=4"
    assert redact("/home/user/.Xauthority") == "/home/user/.Xauthority"
    refuse_secrets({"method": {"key_tokens": 4, "tokenizer": "a/b"}, "data": ["scenes"]}, where="recipe")


def test_a_checkpoint_holds_no_code(tmp_path: Path) -> None:
    from cmapkd.training.checkpoint import Progress, write_checkpoint

    write_checkpoint(tmp_path / "step-000000001", {"method": {"a": torch.ones(2)}}, Progress())
    assert {path.suffix for path in (tmp_path / "step-000000001").iterdir()} == {".safetensors", ".json"}
