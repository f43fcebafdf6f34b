"""The engine: shards that stops and processes do not change, a manifest that refuses others, lists that are sources."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cmapkd.config import ConfigError
from cmapkd.data.open import open_source
from cmapkd.data.scenes.source import ScenesSource
from cmapkd.data.types import BadSampleError, Sample, Source
from cmapkd.engine import Engine, EngineConfig
from cmapkd.engine.candidates import Candidate
from cmapkd.models import Model
from writers import make_writer

SAMPLES = 5
MODELS: dict[str, Model] = {"large": make_writer(seed=0).float(), "small": make_writer(seed=7).float()}
RECIPE: dict[str, Any] = {
    "data": "scenes?length=5&size=32",
    "models": {"large": "tiny_vlm:scenes-teacher", "small": "tiny_vlm:small"},
    "propose": {"questions": {"by": "large", "temperature": 1.0, "max_new_tokens": 3}},
    "answers": {
        "of_large": {"by": "large", "temperature": 1.0, "max_new_tokens": 4},
        "of_small": {"by": "small", "max_new_tokens": 4},
    },
    "verify": [{"parity": {"right": "of_large", "wrong": "of_small"}}],
    "write": {"control": True},
    "shard_samples": 2,
    "batch_size": 4,
}


class Scenes(ScenesSource):
    """Small scenes, one of which may be bad or end everything."""

    def __init__(self, *, bad: int | None = None, passing: bool = False, stop: int | None = None) -> None:
        super().__init__("train", size=32, length=SAMPLES)
        self.bad, self.passing, self.stop = bad, passing, stop

    def __getitem__(self, index: int) -> Sample:
        if index == self.stop:
            raise KeyboardInterrupt
        if index == self.bad:
            raise BadSampleError(f"s{index}", "image is truncated", self.passing)
        seen = super().__getitem__(index)
        return Sample(seen.id, seen.image, questions=seen.questions[:4])


def engine(source: Source | None = None, models: dict[str, Model] | None = None, **settings: Any) -> Engine:
    config = EngineConfig.from_mapping({**RECIPE, **settings})
    return Engine(config, source=source or Scenes(), models=models or MODELS)


def files(folder: Path) -> dict[str, bytes]:
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    manifest = json.loads(found.pop("manifest.json"))
    del manifest["environments"]
    return found | {"manifest.json": json.dumps(manifest).encode()}


def lines_of(folder: Path, shard: int) -> list[dict[str, Any]]:
    text = (folder / f"shards/{shard:06d}/candidates.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="module", autouse=True)
def _keep_what_is_random() -> Iterator[None]:
    """Of random models' texts hardly any says another one, so the filter keeps two thirds of them here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cmapkd.engine.filters.parity", lambda answer, *_, **__: sum(answer.encode()) % 3 > 0)
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one process that nothing stopped."""
    out = tmp_path_factory.mktemp("engine") / "whole"
    result = engine().run(out)
    assert (result.made, result.missing) == (3, 0)
    assert result.counts is not None
    assert 0 < result.counts["kept"] < result.counts["candidates"]
    return out


def test_what_is_kept_is_a_source_with_the_pictures_of_its_source(whole: Path) -> None:
    made, scenes = open_source(f"jsonl:{whole / 'kept.jsonl'}"), Scenes()
    asked = {
        sample.id: {question.question for question in sample.questions} for sample in map(scenes.__getitem__, range(5))
    }
    shown = {sample.id: sample.image.tobytes() for sample in map(scenes.__getitem__, range(5))}
    kept = 0
    for sample in map(made.__getitem__, range(len(made))):
        assert sample.image.tobytes() == shown[sample.id]
        assert {question.question for question in sample.questions} <= asked[sample.id]
        kept += len(sample.questions)
    assert kept == json.loads((whole / "manifest.json").read_text())["counts"]["kept"]


def test_the_control_has_as_many_questions_drawn_from_all_that_were_answered(whole: Path) -> None:
    lists = [open_source(f"jsonl:{whole / name}") for name in ("kept.jsonl", "random.jsonl")]
    kept, control = ([q.id for place in range(len(each)) for q in each[place].questions] for each in lists)
    assert len(kept) == len(control) == len(set(control))
    assert set(kept) != set(control)
    lines = [line for shard in range(3) for line in lines_of(whole, shard)]
    assert set(control) <= {line["id"] for line in lines if line.get("answer")}


def test_a_stop_loses_the_shard_in_flight_and_nothing_else(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "stopped"
    with pytest.raises(KeyboardInterrupt):
        engine(Scenes(stop=3)).run(out)
    assert sorted(path.name for path in (out / "shards").iterdir()) == ["000000"]
    assert json.loads((out / "manifest.json").read_text())["counts"] is None
    dead = out / "shards" / f".000001.{socket.gethostname().replace('.', '_')}-4194305.writing"  # of a killed process
    dead.mkdir()
    before = (out / "shards/000000/record.json").stat().st_mtime_ns
    assert engine().run(out).made == 2
    assert (out / "shards/000000/record.json").stat().st_mtime_ns == before
    assert files(out) == files(whole)
    assert engine().run(out).made == 0  # once more changes nothing
    assert files(out) == files(whole)


@pytest.mark.usefixtures("one_thread")  # a forked child has no other threads
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_killed_at_random_moments_it_loses_at_most_the_shard_in_flight(whole: Path, tmp_path: Path) -> None:
    out, draws = tmp_path / "killed", random.Random(0)
    began = time.monotonic()
    engine().run(tmp_path / "timed")
    longest = 1.2 * (time.monotonic() - began)
    kills = 0
    for _ in range(12):
        before = {path.parent.name: path.stat().st_mtime_ns for path in out.glob("shards/[0-9]*/record.json")}
        child = os.fork()
        if not child:
            try:
                engine().run(out)
            finally:
                os._exit(0)
        time.sleep(draws.uniform(0.2, 1.0) * longest)
        os.kill(child, signal.SIGKILL)
        kills += os.WIFSIGNALED(os.waitpid(child, 0)[1])
        after = {path.parent.name: path.stat().st_mtime_ns for path in out.glob("shards/[0-9]*/record.json")}
        assert before.items() <= after.items()  # what was finished was not made again
    assert kills
    engine().run(out)
    assert files(out) == files(whole)


def test_a_kill_or_a_second_process_before_the_manifest_blocks_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    def second() -> dict[str, Any]:
        monkeypatch.undo()
        assert engine().run(out, rank=1, world_size=2).made == 1
        raise KeyboardInterrupt

    monkeypatch.setattr("cmapkd.engine.run.describe_environment", second)
    with pytest.raises(KeyboardInterrupt):
        engine().run(out, rank=0, world_size=2)
    assert engine().run(out, rank=0, world_size=2).missing == 0
    (tmp_path / "empty" / "shards").mkdir(parents=True)  # as older versions left it
    assert engine().run(tmp_path / "empty", rank=1, world_size=2).made == 1


def test_a_first_run_that_failed_may_be_corrected(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        engine(Scenes(stop=0), seed=1).run(out)
    assert engine().run(out).missing == 0
    assert files(out) == files(whole)


def test_another_recipe_that_took_the_folder_meanwhile_is_respected(tmp_path: Path) -> None:
    class Slow(Scenes):
        def __getitem__(self, index: int) -> Sample:
            if index == 0 and not (tmp_path / "out" / "shards" / "000000").exists():
                engine(seed=1).run(tmp_path / "out")
            return super().__getitem__(index)

    with pytest.raises(ConfigError, match="seed was 1, now 0"):
        engine(Slow()).run(tmp_path / "out")


def test_the_manifest_has_every_environment_that_wrote(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = shutil.copytree(whole, tmp_path / "copy")
    (first,) = json.loads((out / "manifest.json").read_text())["environments"]
    monkeypatch.setattr("cmapkd.engine.run.describe_environment", lambda: {**first, "packages": {"torch": "9"}})
    for _ in range(2):
        engine().run(out)
    assert [each["packages"] for each in json.loads((out / "manifest.json").read_text())["environments"]] == [
        first["packages"],
        {"torch": "9"},
    ]


def test_a_shard_that_cannot_be_renamed_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = engine(Scenes(stop=2))
    monkeypatch.setattr("cmapkd.engine.folder._digest", lambda _data: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        own.run(tmp_path / "out")
    assert [*(tmp_path / "out" / "shards").iterdir()] == []


def test_two_processes_write_what_one_does(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "two"
    first = engine().run(out, rank=0, world_size=2)
    assert (first.made, first.missing, first.counts) == (2, 1, None)
    assert not (out / "kept.jsonl").exists()
    assert engine().run(out, rank=1, world_size=2).missing == 0
    assert files(out) == files(whole)


def test_a_shard_that_another_process_finished_meanwhile_stays(whole: Path, tmp_path: Path) -> None:
    out = shutil.copytree(whole, tmp_path / "copy")
    own = engine()
    candidates, bad = own.make(0)
    from cmapkd.engine.folder import EngineFolder

    EngineFolder(out, own.config.write, own.config.seed).finish_shard(0, candidates[:1], samples=1, bad=bad)
    assert files(out) == files(whole)


OTHER = {"large": MODELS["large"], "small": make_writer(seed=8).float()}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"models": OTHER}, "models.small: it was written by other weights"),
        ({"source": ScenesSource("train", size=40, length=5)}, "the data are others"),
        ({"seed": 1}, "seed was 0, now 1"),
        (
            {"answers": {**RECIPE["answers"], "of_small": {"by": "small", "max_new_tokens": 5}}},
            "answers.of_small.max_new",
        ),
        ({"models": {**MODELS, "small": make_writer(seed=7, image_size=24).float()}}, "it reads pictures or texts"),
    ],
    ids=["weights", "data", "seed", "decoding", "processor"],
)
def test_what_another_engine_wrote_is_refused(whole: Path, change: dict[str, Any], told: str) -> None:
    before = files(whole)
    with pytest.raises(ConfigError, match="holds what another engine wrote") as refused:
        engine(**change).run(whole)
    assert told in str(refused.value)
    assert files(whole) == before


def test_where_it_computes_may_change_and_newer_settings_have_their_defaults(whole: Path, tmp_path: Path) -> None:
    out = shutil.copytree(whole, tmp_path / "copy")
    manifest = json.loads((out / "manifest.json").read_text())
    del manifest["recipe"]["write"]["note"]
    (out / "manifest.json").write_text(json.dumps(manifest))
    assert engine(on_cpu=True).run(out).made == 0


def test_damage_and_strangers_files_are_refused(whole: Path, tmp_path: Path) -> None:
    for name, text, told in (
        ("manifest.json", "{", "manifest.json is damaged"),
        ("manifest.json", "[]", "manifest.json is damaged"),
        ("shards/000001/candidates.jsonl", "{}", "candidates.jsonl is damaged: remove the folder .*shards/000001"),
        ("shards/000001/record.json", '{"digest": 3}', "record.json is damaged: remove the folder .*shards/000001"),
    ):
        out = shutil.copytree(whole, tmp_path / f"copy {name} {text}".replace("/", " "))
        (out / name).write_text(text)
        with pytest.raises(ConfigError, match=told):
            engine().run(out)
    out = shutil.copytree(whole, tmp_path / "from elsewhere")
    lines, record = out / "shards/000000/candidates.jsonl", out / "shards/000000/record.json"
    before = lines.read_bytes()
    for wrong in (
        b'"image": "/etc/passwd.png"',
        b'"image": "shards/000000/pictures/../../000000000.png"',
        b'"image": 3',
    ):
        forged = re.sub(rb'"image": "[^"]*"', wrong, before)
        lines.write_bytes(forged)
        digest = hashlib.blake2b(forged, digest_size=16).hexdigest()
        record.write_text(json.dumps({**json.loads(record.read_text()), "digest": digest}))
        with pytest.raises(ConfigError, match=r"candidates\.jsonl is damaged"):
            engine().run(out)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "photo.png").write_text("")
    with pytest.raises(ConfigError, match="is not empty and has no manifest"):
        engine().run(tmp_path / "mine")


def test_bad_samples_are_counted_and_a_store_that_is_away_ends_it(tmp_path: Path) -> None:
    result = engine(Scenes(bad=3), shard_samples=8).run(tmp_path / "bad")
    assert result.counts is not None
    assert (result.counts["samples"], result.counts["bad"]) == (4, 1)
    record = json.loads((tmp_path / "bad/shards/000000/record.json").read_text())
    assert record["bad"] == [["s3", "image is truncated"]]
    with pytest.raises(ConfigError, match="when the store answers"):
        engine(Scenes(bad=3, passing=True)).run(tmp_path / "passing")


def test_draws_belong_to_the_candidate_alone() -> None:
    own = engine()
    samples = [(index, own.source[index]) for index in range(2)]
    candidates = [Candidate(sample, index, 0, "Is there a red circle?") for index, sample in samples]
    how = own.config.answers["of_large"].model_copy(update={"drafts": 3, "temperature": 2.0})
    together = own.panel.drafts(candidates, how, name="x", number=3)
    alone = [own.panel.drafts([each], how, name="x", number=3)[0] for each in candidates]
    assert together == alone
    assert len(set(together[0])) > 1  # drafts differ
    assert together != own.panel.drafts(candidates, how, name="y", number=3)


def test_what_a_model_cannot_read_is_dropped_and_not_written(tmp_path: Path) -> None:
    own = engine()
    sample = own.source[0]
    candidates = [Candidate(sample, 0, 0, "What <image> is it?", "a"), Candidate(sample, 0, 1, "Is it?", "yes")]
    own.panel.answer(candidates, own.config.answers["of_small"], name="of_small")
    assert [each.dropped for each in candidates] == ["readable", None]
    too_small = {"of_small": {"by": "small", "suffix": "word " * 200}, "of_large": RECIPE["answers"]["of_large"]}
    result = engine(answers=too_small).run(tmp_path / "out")
    assert result.counts is not None
    assert result.counts["kept"] == 0
    assert (tmp_path / "out" / "kept.jsonl").read_bytes() == b""


def _merged(changes: dict[str, Any]) -> dict[str, Any]:
    return {**RECIPE, **changes}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"propose": {}}, "exactly one of"),
        ({"propose": {"questions": {"by": "lage"}}}, "did you mean 'large'"),
        ({"verify": [{"parity": {"right": "of_large", "wrong": "of_smal"}}]}, "did you mean 'of_small'"),
        ({"verify": []}, "no filter reads the answers of_large, of_small"),
        ({"models": {**RECIPE["models"], "third": "tiny_vlm:small"}}, "nothing asks the models third"),
        ({"models": {"a b": "tiny_vlm:small"}}, "letters, digits and _"),
        ({"answers": {**RECIPE["answers"], "of_small": {"by": "small", "drafts": 2}}}, "set a temperature above 0"),
        ({"propose": {"written": {"by": "large", "instruction": "Ask.", "number": 2}}}, "set a temperature above 0"),
        ({"write": {"picture": "boxed"}}, "regions"),
        ({"write": {"place": "random"}}, "set picture: boxed"),
        ({"shard": 3}, "did you mean 'shard_samples'"),
    ],
)
def test_recipes_that_cannot_work_are_refused(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        EngineConfig.from_mapping(_merged(changes))


def test_a_model_that_does_not_write_is_refused() -> None:
    from cmapkd.models import build_model

    with torch.no_grad(), pytest.raises(ConfigError, match=r"models\.small is tiny:scenes-teacher, which embeds"):
        engine(models={**MODELS, "small": build_model("tiny:scenes-teacher")})
