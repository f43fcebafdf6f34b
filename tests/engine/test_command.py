"""What `cmapkd engine` says when it is stopped."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer

from cmapkd.cli.engine import engine


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
