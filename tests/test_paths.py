"""Whatever a caller names a file or a folder with, text or `Path`, it is one."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import cmapkd
from cmapkd.evaluation.picture_ranks import PictureRanks
from cmapkd.models import Model
from cmapkd.results import RunResult
from helpers import make_model

ROOT = Path(cmapkd.__file__).parent
DOCUMENTED = ("export.write.export_onnx", "export.library.export_library", "export.runtimes.export_runtime")
OF_THE_INSIDE = (  # offered to other rooms, and named in no page
    "cmapkd.cache.CacheFolder.",
    "cmapkd.compare.Plan.",
    "cmapkd.config.install_advice",
    "cmapkd.config.writing",
    "cmapkd.models.Classifier.write",
    "cmapkd.training.Trainer.",
)


def offered() -> Iterator[tuple[str, Any]]:
    """Everything that a package offers in `__all__`, and what pages import from modules."""
    for init in sorted(ROOT.rglob("__init__.py")):
        package = importlib.import_module(".".join(init.parent.relative_to(ROOT.parent).parts))
        for name in getattr(package, "__all__", ()):
            yield f"{package.__name__}.{name}", getattr(package, name)
    for name in DOCUMENTED:
        module, _, function = name.rpartition(".")
        yield f"cmapkd.{name}", getattr(importlib.import_module(f"cmapkd.{module}"), function)
    yield "RunResult", RunResult
    yield "PictureRanks", PictureRanks


def functions(name: str, thing: Any) -> Iterator[tuple[str, Callable[..., Any]]]:
    if inspect.isfunction(thing):
        yield name, thing
    elif inspect.isclass(thing):
        for key, value in vars(thing).items():
            function = getattr(value, "__func__", value)
            if inspect.isfunction(function) and not key.startswith("_"):
                yield f"{name}.{key}", function


def only_paths(function: Callable[..., Any]) -> list[str]:
    """The parameters whose annotation has a `Path` and no text beside it."""
    notes = {name: str(each.annotation) for name, each in inspect.signature(function).parameters.items()}
    return [name for name, note in notes.items() if re.search(r"\bPath\b", note.replace("str | Path", ""))]


def test_the_search_finds_a_path_alone() -> None:
    def some(a: str | Path, b: Path, c: list[Path], d: Path | None, e: str | Path | None) -> None: ...

    assert only_paths(some) == ["b", "c", "d"]


def test_what_a_package_offers_takes_text_as_well_as_a_path() -> None:
    found = {name: only_paths(each) for offer in offered() for name, each in functions(*offer)}
    assert "cmapkd.run.run" in found
    wrong = {name: which for name, which in found.items() if which and not name.startswith(OF_THE_INSIDE)}
    assert {name for name in wrong if not name.endswith("Model.write")} == set()


def test_every_family_writes_where_a_text_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def below(cls: type) -> Iterator[type]:
        for each in cls.__subclasses__():
            yield each
            yield from below(each)

    for family in ("hf_model", "hf_vlm", "joined", "masked", "onnx_family", "open_clip_model", "parts_model",
                   "pictures_family", "tiny", "tiny_vlm_family", "timm_family", "vlm_model"):  # fmt: skip
        importlib.import_module(f"cmapkd.models.{family}")
    classes = [each for each in below(Model) if each.__module__.startswith("cmapkd.")]
    assert len(classes) >= 10
    assert [each.__name__ for each in classes if "save" in vars(each)] == []  # `save` turns the text into a path

    monkeypatch.chdir(tmp_path)
    model: nn.Module = make_model()
    model.save("one/student")  # type: ignore[operator]
    model.load_checkpoint("one/student/model.safetensors")  # type: ignore[operator]
    loaded = cmapkd.load("one/student")
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())
