"""The worlds in which selection must matter, their declared experiment, and the cosines of gradients."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from cmapkd.cache import CacheConfig, CachePlan, CacheReader, all_keys
from cmapkd.cache.files import CacheError
from cmapkd.config import ConfigError
from cmapkd.data.open import open_source
from cmapkd.data.texts import TextChoice, joined
from cmapkd.data.types import Source
from cmapkd.data.views import ViewSpec, draw_view
from cmapkd.methods import StepInfo
from cmapkd.methods.cmapkd import CMAPKD
from helpers import MemorySource, make_method, make_model, random_batch
from plugin_support import install

ROOT = Path(__file__).parents[1]
LEVELS = {"visual_levels": {"P2": 1.0, "P4": 2.0, "P5": 1.0}, "language_levels": {"L1": 1.0, "L3": 1.0, "L4": 1.0}}
VIEWS = ViewSpec(crop_scale=(1.0, 1.0), flip=0.0, num_views=1)

with pytest.MonkeyPatch.context() as patched:
    patched.syspath_prepend(ROOT / "benchmarks" / "worlds")
    patched.syspath_prepend(ROOT / "benchmarks")
    worlds = importlib.import_module("cmapkd_worlds")
    cosines = importlib.import_module("gradient_cosines")


def world(**settings: Any) -> Any:
    return worlds.WorldConfig(**settings)


def method(**settings: Any) -> Any:
    made = make_method(worlds.WorldCMAPKD, settings={"name": "world_cmapkd", **LEVELS, "world": settings})
    return made.train()


def cached(folder: Path, source: Source, made: Any, *, keys: Any = None) -> CacheReader:
    config = CacheConfig(folder=folder, store="fp32", batch_size=8)
    keys = all_keys(len(source), 1) if keys is None else keys
    plan = CachePlan.of_method(config, made, source=source, views=VIEWS, keys=keys, precision="fp32")
    plan.build(device="cpu")
    reader = plan.open()
    made.teachers["teacher"] = plan.cached_teacher(reader, make_model)
    return reader


# ------------------------------------------------------------------------------------------------ which are wrong


def test_hidden_corruption_follows_from_the_id_alone_and_has_its_share() -> None:
    hidden = world(kind="hidden", share=0.5)
    towers = [hidden.wrong_tower(f"s{i}") for i in range(4000)]
    assert towers == [hidden.wrong_tower(f"s{i}") for i in range(4000)]
    for tower in ("image", "text"):
        assert 900 < towers.count(tower) < 1100
    assert None not in {world(kind="hidden", share=1.0).wrong_tower(f"s{i}") for i in range(100)}


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_visible_corruption_follows_from_the_background(share: float) -> None:
    source: Any = open_source("scenes?length=120", split="train")
    visible = world(kind="visible", share=share)
    taken = {tower: colours[: round(4 * share)] for tower, colours in worlds.BACKGROUNDS.items()}
    seen = set()
    for index in range(len(source)):
        colour = source.scene(index).background.colour
        expected = next((tower for tower, colours in taken.items() if colour in colours), None)
        assert visible.wrong_tower(f"easy/{source[index].id}" if index < 5 else source[index].id) == expected
        seen.add(expected)
    assert seen == {"image", "text", *((None,) if share < 1 else ())}
    with pytest.raises(ConfigError, match="is no scene"):
        visible.wrong_tower("m3")


# ------------------------------------------------------------------------------------------------ wrong answers


def test_levels_of_one_tower_are_another_samples_and_embeddings_stay(tmp_path: Path) -> None:
    source, made = MemorySource(12), method(kind="hidden", share=0.7)
    reader = cached(tmp_path / "cache", source, made)
    answers = made.answers("teacher", reader)
    ids, texts = [f"m{i}" for i in range(12)], [text_of(source, i) for i in range(12)]
    true = reader.read(0, range(12), ids, texts, [])
    found = answers.read(0, range(12), ids, texts, [])
    wrong = {i: made.world.wrong_tower(ids[i]) for i in range(12)}
    assert {"image", "text", None} <= {*wrong.values()}
    for name, rows in found.arrays.items():
        for i in range(12):
            other = answers.other(i)
            assert other != i
            tower = wrong[i]
            taken = other if tower is not None and name.startswith(f"{tower}:") else i
            assert torch.equal(rows[i], true.arrays[name][taken]), (name, i)
    assert {answers.other(i) for i in range(12)} == {*range(12)}
    assert (answers.has(0, 3), answers.has(1, 3)) == (True, False)


def text_of(source: Source, index: int) -> str:
    """The text that a run shows of a sample in its first view."""
    sample = source[index]
    return joined(TextChoice().choose(sample, draw_view(sample.id, 0, VIEWS, sample.image.size), 0))


def test_a_cache_without_the_other_sample_is_named(tmp_path: Path) -> None:
    source, made = MemorySource(12), method(kind="hidden", share=1.0)
    reader = cached(tmp_path / "cache", source, made, keys=all_keys(12, 1).first(6))
    answers = made.answers("teacher", reader)
    lacking = next(i for i in range(6) if answers.other(i) >= 6)
    with pytest.raises(CacheError, match="cache build RECIPE --all"):
        answers.read(0, [lacking], [f"m{lacking}"], [text_of(source, lacking)], [])


def test_a_run_without_inner_levels_asks_for_no_other_sample(tmp_path: Path) -> None:
    tops = {"visual_levels": {"P5": 1.0}, "language_levels": {"L4": 1.0}}
    settings = {"name": "world_cmapkd", **tops, "world": {"kind": "hidden", "share": 1.0}}
    source, made = MemorySource(12), make_method(worlds.WorldCMAPKD, settings=settings)
    reader = cached(tmp_path / "cache", source, made, keys=all_keys(12, 1).first(6))
    texts = [text_of(source, i) for i in range(6)]
    found = made.answers("teacher", reader).read(0, range(6), [f"m{i}" for i in range(6)], texts, [])
    assert {*found.arrays} == {"image", "text"}


def test_the_clean_world_is_cmapkd_and_a_live_teacher_has_no_wrong_answers(tmp_path: Path) -> None:
    batch = random_batch(4)
    expected = make_method("cmapkd", settings=LEVELS).train()(batch)
    for name, term in method()(batch).items():
        torch.testing.assert_close(term.value, expected[name].value)
    with pytest.raises(ConfigError, match="set cache=auto"):
        method(kind="hidden")(batch)
    reader = cached(tmp_path / "cache", MemorySource(12), made := method())
    assert made.answers("teacher", reader) is reader


# ------------------------------------------------------------------------------------------------ what is told


def terms_of(made: Any, batch: Any) -> dict[str, float]:
    made.teachers["teacher"].from_disk = True  # the live one's answers, as if they had been stored
    return {name: float(term.value.detach()) for name, term in made(batch, StepInfo()).items()}


def test_the_oracle_leaves_out_the_wrong_levels_and_only_these() -> None:
    batch = random_batch(8)
    made = method(kind="hidden", share=0.8, oracle=True)
    towers = [made.world.wrong_tower(each) for each in batch.ids]
    assert {"image", "text", None} <= {*towers}
    found = terms_of(made, batch)
    parts = distances(batch)
    for term, tower, inner in (("visual", "image", ("P2", "P4")), ("language", "text", ("L1", "L3"))):
        right = torch.tensor([float(each != tower) for each in towers])
        expected = sum((parts[level] * (right if level in inner else 1.0)).mean() for level in LEVELS[f"{term}_levels"])
        assert found[term] == pytest.approx(float(expected), rel=1e-5)


def test_streams_count_what_they_are_told_with_a_mean_of_one() -> None:
    batch = replace(random_batch(4), streams=("train", "easy", "easy", "easy"))
    found = terms_of(method(stream_weights={"train": 5.0, "easy": 1.0}), batch)
    weights = torch.tensor([5.0, 1.0, 1.0, 1.0]) / 2
    parts = distances(batch)
    expected = sum((parts[level] * weights).mean() for level in LEVELS["visual_levels"])
    assert found["visual"] == pytest.approx(float(expected), rel=1e-5)


def distances(batch: Any) -> dict[str, torch.Tensor]:
    """Each level's distance as it counts, of every sample."""
    plain = make_method("cmapkd", settings=LEVELS).train()
    assert isinstance(plain, CMAPKD)
    kept: dict[str, torch.Tensor] = {}
    weigh = plain._weigh
    plain._weigh = lambda term, losses, *rest: (kept.update(losses), weigh(term, losses, *rest))[1]  # type: ignore[method-assign]
    plain(batch)
    return {level: value.detach() for level, value in kept.items()}


# ------------------------------------------------------------------------------------------------ experiment


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The package of worlds on Python's path, and the registry without what it found before."""
    from cmapkd.methods import METHODS

    install(tmp_path / "site", package=ROOT / "benchmarks" / "worlds")
    monkeypatch.syspath_prepend(tmp_path / "site")
    METHODS.__dict__.pop("_offered", None)
    yield
    METHODS.__dict__.pop("_offered", None)
    METHODS._loaded.pop("world_cmapkd", None)


@pytest.mark.usefixtures("installed")
def test_the_declared_experiment_plans(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from cmapkd.cli import main

    declared = str(ROOT / "examples" / "selection_ceiling.yaml")
    monkeypatch.setattr(sys, "argv", ["cmapkd", "compare", declared, "--dry-run"])
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code
    said = capsys.readouterr().out
    assert "4 rows x 8 seeds in 2 tables" in said
    assert "tuning H3, oracle: 12 of 200 steps, 3 of 400 steps" in said


# ------------------------------------------------------------------------------------------------ cosines


def test_cosines_are_those_of_the_gradients() -> None:
    made = make_method("cmapkd", settings=LEVELS).train()
    assert isinstance(made, CMAPKD)
    watched = cosines.Cosines(made, every=2)
    for step in range(3):
        made(random_batch(4, seed=step), StepInfo(step=step))
    assert [each["step"] for each in watched.measured] == [0, 2]
    last = watched.measured[-1]
    assert {"P2", "P5", "L1", "L4", "contrastive", "interactive", "relational", "bank"} == {*last["names"]} - {
        "P4",
        "L3",
    }
    at = {name: number for number, name in enumerate(last["names"])}
    made.eval()
    made.step = StepInfo(step=2)
    batch = random_batch(4, seed=2)
    parts = {"P2": distance_of(made, batch, "P2"), "interactive": made(batch)["interactive"].value}
    vectors = {}
    for name, value in parts.items():
        found = torch.autograd.grad(value, [*made.student.parameters()], retain_graph=True, allow_unused=True)
        pairs = zip(found, made.student.parameters(), strict=True)
        vectors[name] = torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs])
    expected = float(F.cosine_similarity(vectors["P2"], vectors["interactive"], dim=0))
    assert last["cosines"][at["P2"]][at["interactive"]] == pytest.approx(expected, abs=1e-4)
    assert last["norms"][at["P2"]] == pytest.approx(float(vectors["P2"].norm()), rel=1e-3)
    assert last["cosines"][at["P2"]][at["L1"]] == 0.0  # towers share nothing
    shown = cosines.table(watched.measured)
    assert f"| {expected:.2f} |" in shown
    json.dumps(watched.measured)


def distance_of(made: CMAPKD, batch: Any, level: str) -> torch.Tensor:
    kept: dict[str, torch.Tensor] = {}
    weigh = made._weigh
    made._weigh = lambda term, losses, *rest: (kept.update(losses), weigh(term, losses, *rest))[1]  # type: ignore[method-assign]
    made(batch)
    made._weigh = weigh  # type: ignore[method-assign]
    return kept[level].mean()
