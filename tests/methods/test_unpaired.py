"""Pictures without captions beside pairs: their term, what it leaves alone, whole runs, and what is refused."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from cmapkd.config import ConfigError
from cmapkd.data.chosen import chosen_rows
from cmapkd.data.config import DataConfig
from cmapkd.data.open import open_streams
from cmapkd.data.plans import PlanSampler
from cmapkd.data.streams import Stream
from cmapkd.data.tokens import TokenBatch
from cmapkd.data.types import Batch, ModelInput, StoredRows
from cmapkd.methods import Method
from cmapkd.methods.dual import DualEncoderMethod
from cmapkd.methods.unpaired import UnpairedPictures
from cmapkd.run import RunConfig
from cmapkd.run import run as execute
from helpers import make_method, make_model, random_batch

ALONE = UnpairedPictures(("reference",), 2.0)  # every second row of a random batch


def method_of(name: str = "clip_kd", unpaired: UnpairedPictures | None = ALONE, **settings: Any) -> DualEncoderMethod:
    method = make_method(name, settings=settings, unpaired=unpaired).double().train()
    assert isinstance(method, DualEncoderMethod)
    for teacher in method.teachers.values():
        teacher.model.double()
    return method


def a_batch(size: int = 8) -> Batch:
    return random_batch(size, dtype=torch.float64)


def summed(method: Method, batch: Batch) -> Tensor:
    return torch.stack([term.weight * term.value for term in method(batch).values()]).sum()


# ------------------------------------------------------------------------------------------------ the term


@pytest.mark.parametrize("name", ["clip_kd", "clip_rd", "cmapkd", "hinton", "fitnet", "mobileclip"])
def test_pairs_count_as_if_they_were_alone_and_pictures_by_their_distance(name: str) -> None:
    method, batch = method_of(name), a_batch()
    terms = method(batch)
    pairs, alone = chosen_rows(batch, [0, 2, 4, 6]), chosen_rows(batch, [1, 3, 5, 7])
    unpaired = method.unpaired
    assert unpaired is not None
    for term, value in method_of(name, unpaired=None)(pairs).items():
        torch.testing.assert_close(terms[term].value, value.value, rtol=1e-9, atol=1e-12)
    assert {*terms} - {"unpaired"} == {*method.term_names}
    project = getattr(method, "project", None) if unpaired.own is None else unpaired.own
    student = method.student(alone.inputs["student"]).image.embedding
    teacher = method.teachers["teacher"].model(alone.inputs["teacher"]).image.embedding
    mapped = project.of_images(student)
    written_out = (F.normalize(mapped, dim=-1) - F.normalize(teacher, dim=-1)).square().sum(-1).mean()
    torch.testing.assert_close(terms["unpaired"].value, written_out, rtol=1e-9, atol=1e-12)
    assert terms["unpaired"].weight == 2.0


def test_the_term_reads_no_text_and_moves_the_image_tower_alone() -> None:
    method, batch = method_of(), a_batch()
    value = method(batch)["unpaired"].value
    value.backward()
    moved = {name for name, p in method.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved
    assert all(name.startswith(("student.vision", "project.image")) for name in moved), moved
    texts = {role: each.texts for role, each in ((role, batch.pairs(role)) for role in batch.inputs)}
    ids = {role: text.ids.clone() for role, text in texts.items()}
    for each in ids.values():
        each[1::2] = 5
    inputs = {role: replace(batch.pairs(role), texts=replace(texts[role], ids=ids[role])) for role in batch.inputs}
    again = method(replace(batch, inputs=inputs))
    torch.testing.assert_close(again["unpaired"].value, value, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["clip_kd", "cmapkd"])
def test_micro_batches_give_the_same_loss_and_gradients(name: str) -> None:
    found = []
    for size in (None, 3):
        method, batch = method_of(name), a_batch(10)
        method.micro_batch = size
        total = summed(method, batch)
        total.backward()
        found.append([total.detach(), *(p.grad for p in method.parameters() if p.grad is not None)])
    for whole, parts in zip(*found, strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-9, atol=1e-12)


def test_a_weighting_of_the_terms_weighs_it_too() -> None:
    method = method_of(term_weighting="uncertainty")
    assert "unpaired" in method.all_term_names
    assert "unpaired" in method(a_batch())


# ------------------------------------------------------------------------------------------------ rows of a batch


def test_rows_are_those_of_parts_in_another_order() -> None:
    batch = random_batch(6, views={"local": 2})
    batch.extra.update({"names": list("abcdef"), "in": {"deeper": torch.arange(6)}})
    chosen = chosen_rows(batch, [4, 1])
    parts = [batch.part(place, place + 1) for place in (4, 1)]
    assert chosen.ids == ("m4", "m1")
    assert chosen.streams == ("train", "reference")
    assert chosen.extra["names"] == ["e", "b"]
    assert chosen.extra["in"]["deeper"].tolist() == [4, 1]
    for role in batch.inputs:
        own, of_parts = chosen.pairs(role), [part.pairs(role) for part in parts]
        assert torch.equal(own.images, torch.cat([each.images for each in of_parts]))
        assert torch.equal(own["local"], torch.cat([each["local"] for each in of_parts]))
        for row, each in enumerate(of_parts):
            length = each.texts.ids.shape[1]
            assert torch.equal(own.texts.ids[row, :length], each.texts.ids[0])


def test_rows_find_the_pictures_of_samples_without_an_answer() -> None:
    ids = torch.arange(12).reshape(6, 2)
    texts = TokenBatch(ids, torch.ones_like(ids, dtype=torch.bool))
    missing = torch.tensor([1, 4])  # only these two have pictures
    pictures = torch.stack([torch.full((3, 2, 2), float(place)) for place in missing])
    stored = StoredRows({"image": torch.arange(6.0)[:, None]}, missing, torch.arange(6) + 100)
    batch = Batch(tuple("abcdef"), {"teacher": ModelInput(pictures, texts)}, ("",) * 6, stored={"teacher": stored})
    chosen = chosen_rows(batch, [4, 0, 1])
    rows = chosen.stored["teacher"]
    assert rows.missing.tolist() == [0, 2]
    assert rows.samples.tolist() == [104, 100, 101]
    assert rows.arrays["image"].flatten().tolist() == [4, 0, 1]
    assert chosen.pairs("teacher").images[:, 0, 0, 0].tolist() == [4, 1]


def test_an_extra_without_rows_is_refused() -> None:
    class Whole:
        def part(self, start: int, stop: int) -> Whole:
            return self

    batch = random_batch(4)
    batch.extra["odd"] = Whole()
    with pytest.raises(TypeError, match=r"batch.extra\['odd'\] is of type Whole, of which single samples cannot be"):
        chosen_rows(batch, [0])
    batch.extra["odd"] = torch.arange(3)
    with pytest.raises(ValueError, match="has 3 rows for a batch of 4"):
        chosen_rows(batch, [0])


# ------------------------------------------------------------------------------------------------ the data


def streams(source: str = "scenes?length=20&start=50") -> dict[str, Any]:
    return {"pictures": {"source": source, "share": 0.25, "captions": "none"}}


def test_a_stream_without_captions_says_nothing() -> None:
    more = DataConfig.from_mapping({"train": "scenes?length=30", "more": streams()}, where="data").more
    source = open_streams("scenes?length=30", more, require_captions=True)
    assert source[0].captions[0]
    assert source.captions(0)[0]
    assert source[30].captions == source.captions(30) == ("",)
    assert source[30].id == "pictures/scenes/standard/train/000000050"
    read = {"pictures": {**streams()["pictures"], "captions": "read"}}
    with_captions = open_streams(
        "scenes?length=30", DataConfig.from_mapping({"train": "a", "more": read}, where="data").more
    )
    assert source.fingerprint() != with_captions.fingerprint()


def test_pictures_that_have_no_captions_will_do(tmp_path: Path) -> None:
    from PIL import Image

    for number in range(6):
        Image.new("RGB", (32, 32), (40 * number, 9, 9)).save(tmp_path / f"{number}.png")
    more = DataConfig.from_mapping({"train": "a", "more": streams(f"folder:{tmp_path}")}, where="data").more
    source = open_streams("scenes?length=30", more, require_captions=True)
    assert [source[index].captions for index in (30, 35)] == [("",)] * 2


# ------------------------------------------------------------------------------------------------ whole runs


def config_of(tmp_path: Path, **changes: Any) -> RunConfig:
    teacher = tmp_path / "teacher"
    if not teacher.exists():
        make_model(seed=7).save(teacher)
    given = {
        "teacher": str(teacher),
        "student": "tiny:debug",
        "data": {
            "train": "scenes?length=24&size=32",
            "more": streams("scenes?length=16&start=50&size=32"),
            "views": {"num_views": 2},
        },
        "method": "clip_kd",
        "training": {"steps": 6, "batch_size": 8, "device": "cpu", "precision": "fp32", "checkpoint_every": 3},
        "baseline": "none",
    }
    return RunConfig.from_mapping(given | changes)


def weights_of(folder: Path) -> dict[str, Tensor]:
    return load_file(next((folder / "student").glob("*.safetensors")))


def test_a_run_goes_on_where_it_was_stopped_and_reads_a_cache(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    execute(config_of(tmp_path), out=whole)
    again = tmp_path / "again"
    shutil.copytree(whole, again)
    for name in ("metrics.json", "report.html"):
        (again / name).unlink(missing_ok=True)
    shutil.rmtree(again / "student")
    shutil.rmtree(max((again / "checkpoints").iterdir(), key=lambda folder: folder.name))
    execute(config_of(tmp_path), out=again, resume=True)
    cache = {"mode": "auto", "store": "fp32", "folder": str(tmp_path / "cache")}
    execute(config_of(tmp_path, cache=cache), out=tmp_path / "cached")
    for name, value in weights_of(whole).items():
        assert torch.equal(value, weights_of(again)[name]), name
        torch.testing.assert_close(value, weights_of(tmp_path / "cached")[name], rtol=1e-4, atol=1e-5)
    assert '"terms/unpaired"' in (whole / "metrics.jsonl").read_text()


def test_the_student_alone_sees_the_pairs(tmp_path: Path) -> None:
    assert config_of(tmp_path, baseline="scratch").scratch().data.more == {}


def test_recipes_without_it_are_written_as_before(tmp_path: Path) -> None:
    plain = config_of(tmp_path).plain()
    assert plain["data"]["more"]["pictures"]["captions"] == "none"
    assert RunConfig.from_mapping(plain).plain() == plain
    assert "unpaired_weight" not in plain["data"]
    data = {**plain["data"], "more": {"a": {"source": "scenes", "share": 0.5}}}
    assert RunConfig.from_mapping({**plain, "data": data}).plain()["data"]["more"]["a"] == data["more"]["a"]
    heavier = RunConfig.from_mapping({**plain, "data": {**plain["data"], "unpaired_weight": 1.0}})
    assert heavier.plain()["data"]["unpaired_weight"] == 1.0


# ------------------------------------------------------------------------------------------------ what is refused


def test_a_recipe_must_have_a_teacher_and_pairs(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="stream 'pictures' has captions: none, and method contrastive has no teach"):
        config_of(tmp_path, method="contrastive", teacher=None)
    stages = [{"name": "first", "steps": 3, "data": "pictures"}, {"name": "then", "steps": 3}]
    with pytest.raises(ConfigError, match="stage 'first' reads one stream alone: leave data out of the stage"):
        config_of(tmp_path, training={"stages": stages})


def test_something_behind_the_embeddings_of_pictures_must_learn() -> None:
    for parts in (("image",), ("projections",)):
        method = make_method("clip_kd", unpaired=ALONE)
        method.train_only(parts)
        method.check_learning()
    method = make_method("clip_kd", unpaired=ALONE)
    method.train_only(("text", "scale"))
    with pytest.raises(ConfigError, match=r"pictures of data\.more\.reference .* nothing of that learns"):
        method.check_learning()


def test_methods_that_read_other_things_say_so() -> None:
    with pytest.raises(ConfigError, match="this method has no teacher to learn from them"):
        make_method("contrastive", unpaired=ALONE)
    with pytest.raises(ConfigError, match="embeds no pictures, so it learns nothing from those without captions"):
        make_method("vl2lite", unpaired=ALONE)
    with pytest.raises(ConfigError, match=r"reads further texts of every picture \(\w+\)"):
        make_method("degla", unpaired=ALONE)


def test_a_batch_of_one_stream_is_refused() -> None:
    batch = replace(a_batch(4), streams=("train",) * 4)
    with pytest.raises(ConfigError, match="this batch has 0 such pictures and 4 pairs"):
        method_of()(batch)


def test_processes_must_have_equal_parts() -> None:
    def sampler(world_size: int) -> PlanSampler:
        parts = (Stream("train", 0, 40, 0.75), Stream("pictures", 40, 20, 0.25))
        return PlanSampler(60, batch_size=12, seed=0, start=0, stop=4, rank=0, world_size=world_size, streams=parts)

    assert method_of().equal_streams
    assert not make_method("clip_kd").equal_streams
    sampler(3).check_shared_out()
    with pytest.raises(ConfigError, match="a batch has 9 samples of stream 'train', which do not divide among 2"):
        sampler(2).check_shared_out()
