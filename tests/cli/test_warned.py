"""Warnings of the command line: one sentence each, told once."""

from __future__ import annotations

import sys
import warnings

import pytest

from cmapkd.cli import warned
from cmapkd.cli.warned import plain_warnings
from cmapkd.data.open import SourceWarning


def warn_twice() -> None:
    warnings.simplefilter("always")
    for message in ("columns are separated by ';'", "columns are separated by ';'", "another"):
        warnings.warn(message, SourceWarning, stacklevel=2)


def test_a_warning_is_one_sentence_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    before = warnings.showwarning
    with plain_warnings():
        warn_twice()
    assert capsys.readouterr().err == "warning: columns are separated by ';'\nwarning: another\n"
    assert warnings.showwarning is before


def test_commands_warn_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from cmapkd import cli

    monkeypatch.setattr(sys, "argv", ["cmapkd"])
    monkeypatch.setattr(cli, "app", warn_twice)
    cli.main()
    told = capsys.readouterr().err
    assert told.count("warning: columns are separated") == 1
    assert warned.__file__ not in told
    assert ".py" not in told
