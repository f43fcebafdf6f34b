"""What `cmapkd engine` says when it is stopped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer

from cmapkd.cli.engine import engine
from cmapkd.config import ConfigError
from cmapkd.engine import EngineResult, load_engine


@pytest.mark.parametrize("where", ["Engine", "Engine.run"], ids=["while models load", "while it makes"])
def test_a_stop_says_how_to_go_on_as_the_same_process(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    if where == "Engine":
        monkeypatch.setattr("cmapkd.engine.Engine", stop)
    else:
        monkeypatch.setattr("cmapkd.engine.Engine.__init__", lambda *_: None)
        monkeypatch.setattr("cmapkd.engine.Engine.run", stop)
    with pytest.raises(typer.Exit):
        engine("mpa_scenes", tmp_path / "out", ["seed=3"], rank=1, world=2)
    assert f"mpa_scenes seed=3 --out {tmp_path / 'out'} --rank 1 --world 2" in capsys.readouterr().out


def test_another_recipe_is_refused_before_models_are_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_engine("mpa_scenes").model_dump(mode="json")
    (tmp_path / "shards" / "000000").mkdir(parents=True)
    (tmp_path / "shards" / "000000" / "record.json").write_text("{}")
    (tmp_path / "manifest.json").write_text(json.dumps({"recipe": recipe}))
    monkeypatch.setattr("cmapkd.engine.Engine", lambda *_: pytest.fail("models were loaded"))
    with pytest.raises(ConfigError, match=r"holds what another engine wrote:\n  seed"):
        engine("mpa_scenes", tmp_path, ["seed=3"])


@pytest.mark.parametrize(
    ("kept", "dropped", "said"),
    [
        (2, {"parity": 1}, "data.prompts.share=1"),
        (0, {"parity": 1, "hard": 4}, "Most were dropped as hard"),
        (0, {}, "No candidate was written"),
    ],
)
def test_the_end_says_what_to_do_next(
    kept: int,
    dropped: dict[str, int],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    counts = {"samples": 3, "bad": 0, "candidates": kept + sum(dropped.values()), "dropped": dropped, "kept": kept}
    monkeypatch.setattr("cmapkd.engine.Engine.__init__", lambda *_: None)
    monkeypatch.setattr("cmapkd.engine.Engine.run", lambda *_, **__: EngineResult(3, 0, counts))
    engine("mpa_scenes", tmp_path / "out")
    shown = capsys.readouterr().out
    assert said in shown
    assert ("Learn from" in shown) == bool(kept)
