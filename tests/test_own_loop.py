"""A method in a loop of one's own, against the trainer; and embeddings of pictures and texts."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cmapkd
from cmapkd.config import ConfigError
from cmapkd.data.plans import PlanSampler
from cmapkd.data.types import BadSampleError
from cmapkd.evaluation.embed import embed as embed_source
from cmapkd.methods import StepInfo
from cmapkd.models import DualEncoder
from cmapkd.own_loop import Distiller
from helpers import MemorySource, make_builder, make_method, make_model, make_teacher, make_trainer

pytestmark = pytest.mark.usefixtures("one_thread")


def distiller(name: str, **settings: Any) -> Distiller:
    torch.manual_seed(3)
    teacher = None if name == "contrastive" else make_teacher()
    return cmapkd.method(name, student=make_model(), teacher=teacher, **settings)


def pairs(size: int) -> tuple[list[Any], list[str]]:
    source = MemorySource(size)
    samples = [source[index] for index in range(size)]
    return [sample.image for sample in samples], [sample.captions[0] for sample in samples]


# ------------------------------------------------------------------------------------------------ a loop of one's own


@pytest.mark.parametrize("name", ["contrastive", "clip_kd", "hinton", "fitnet", "cmapkd"])
def test_the_loss_is_the_trainers(name: str, tmp_path: Path) -> None:
    settings = {"form": "one_stage"} if name == "fitnet" else {}
    method = make_method(name, settings=settings)
    source = MemorySource(24)
    batch = make_builder(method, source)[PlanSampler(24, batch_size=8, seed=5, start=0, stop=1).plan(0)]
    pixels = {role: each.images for role, each in batch.inputs.items()}
    trainer = make_trainer(tmp_path, method, source=source, steps=1, batch_size=8)
    before = {key: value.clone() for key, value in method.state_dict().items()}
    logged: list[float] = []
    step = trainer._step

    def watched(given: Any) -> Any:
        assert given.ids == batch.ids  # the trainer's own batch is the one made above
        values = step(given)
        logged.append(float(values["loss"]))
        return values

    trainer._step = watched  # type: ignore[method-assign]
    trainer.run()
    own = distiller(name, **settings)
    own.method.load_state_dict(before)
    loss = own(pixels, batch.captions, ids=batch.ids)
    assert loss.item() == pytest.approx(logged[0], rel=1e-6)


def test_a_student_learns_in_ten_lines() -> None:
    pictures, texts = pairs(8)
    kd = distiller("clip_kd", feature_weight=16.0)
    optimizer = torch.optim.AdamW(kd.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        loss = kd(pictures, texts)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        kd.after_step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert kd.terms["feature"].weight == 16
    assert not any(name.startswith("teacher") for name, _ in kd.named_parameters())


def test_an_untrained_tiny_student_learns_its_words_from_texts() -> None:
    pictures, texts = pairs(8)
    with pytest.raises(ConfigError, match="learns its vocabulary from captions: give it texts"):
        cmapkd.method("contrastive", student="tiny:debug")
    kd = cmapkd.method("contrastive", student="tiny:debug", texts=texts)
    first, other = kd.student.tokenizer([texts[0], "unknown words"]).ids
    assert not torch.equal(first, other)
    assert kd(pictures, texts).isfinite()
    with pytest.raises(ConfigError, match="texts is one text"):
        cmapkd.method("contrastive", student="tiny:debug", texts="a dog")


def test_pictures_go_through_each_models_own_preprocessing() -> None:
    pictures, texts = pairs(3)
    batch = distiller("clip_kd").batch(pictures, texts)
    for role, side in (("student", 16), ("teacher", 24)):
        assert batch.inputs[role].images.shape == (3, 3, side, side)
    spec = make_model().image_spec
    assert torch.equal(spec.to_model(batch.inputs["student"].images)[1], spec(pictures[1]))


def test_pixels_in_bytes_and_normalised_ones_give_the_same_loss() -> None:
    pictures, texts = pairs(4)
    models = {"student": make_model(), "teacher": make_teacher().model}
    raw = {role: torch.stack([each.image_spec.raw(picture) for picture in pictures]) for role, each in models.items()}
    made = {role: torch.stack([each.image_spec(picture) for picture in pictures]) for role, each in models.items()}
    losses = [distiller("clip_kd")(images, texts).item() for images in (pictures, raw, made)]
    assert losses[0] == losses[1] == losses[2]


def test_each_step_draws_anew_and_a_bank_never_compares_a_sample_with_itself() -> None:
    pictures, texts = pairs(6)
    kd = distiller("cmapkd", bank={"size": 64, "sample": 4})
    names = [f"picture {number}" for number in range(6)]
    draws = []
    for _ in range(3):
        kd(pictures, texts, ids=names)
        draws.append(kd.method.step.generator("bank").initial_seed())
        kd.after_step()
    assert len(set(draws)) == 3
    assert isinstance(kd.method.step, StepInfo)
    assert kd.method.step.step == 2
    unnamed = kd.batch(pictures, texts).ids + kd.batch(pictures, texts).ids
    assert len(set(unnamed)) == 12


def test_labels_and_further_texts_reach_the_methods_that_read_them() -> None:
    pictures, texts = pairs(4)
    kd = distiller("mobileclip", synthetic=True)
    pool, count = next(iter(kd.method.text_pools.items()))
    with pytest.raises(ValueError, match=rf"reads {count} {pool} texts of each picture: give more_texts"):
        kd(pictures, texts)
    with pytest.raises(ValueError, match=rf"picture 0 has 0 {pool} texts"):
        kd(pictures, texts, more_texts={pool: [[]] * 4})
    assert kd(pictures, texts, more_texts={pool: [["a boat"] * count] * 4}).isfinite()
    kd = distiller("c2kd", classes=["red cat", "green dog", "blue boat"])
    with pytest.raises(ValueError, match="the method reads labels: give labels="):
        kd(pictures, texts)
    with pytest.raises(ValueError, match="there are 2 labels and 4 texts"):
        kd(pictures, texts, labels=torch.tensor([0, 1]))
    assert kd(pictures, texts, labels=torch.tensor([0, 2, -1, 1])).isfinite()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"texts": "a dog"}, "texts is one text: give a list"),
        ({"texts": ["a dog"]}, r"there are 4 images of the student and 1 texts"),
        ({"ids": ["a"]}, r"there are 1 ids and 4 texts"),
        (
            {"images": torch.zeros(4, 3, 16, 16)},
            r"the teacher reads pixels \[batch 3 24 24\], and images has \[4, 3, 16",
        ),
        ({"images": {"student": torch.zeros(4, 3, 16, 16)}}, "images has no pixels for the teacher"),
        ({"images": ["nowhere.png"] * 4}, "image 0: there is no file 'nowhere.png'"),
    ],
)
def test_what_does_not_fit_is_refused_in_words(arguments: dict[str, Any], words: str) -> None:
    pictures, texts = pairs(4)
    given = {"images": pictures, "texts": texts, **arguments}
    images = given.pop("images")
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        distiller("clip_kd")(images, given.pop("texts"), **given)


def test_wrong_methods_and_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"clip_kdd.*clip_kd"):
        distiller("clip_kdd")
    with pytest.raises(ConfigError, match="feature_wight"):
        distiller("clip_kd", feature_wight=1)
    with pytest.raises(ValueError, match="distils from a teacher"):
        cmapkd.method("clip_kd", student=make_model())
    with pytest.raises(ConfigError, match="total is 0"):
        distiller("clip_kd", total=0)
    with pytest.raises(ConfigError, match=r"reads the names of classes: give classes="):
        distiller("hinton", form="classes")


# ------------------------------------------------------------------------------------------------ embeddings


def test_embeddings_are_those_of_the_evaluation() -> None:
    model, source = make_model(), MemorySource(7)
    embedded = embed_source(model, source, batch_size=3, device="cpu")
    got = model.embed([source[i].image for i in range(7)], embedded.captions, batch_size=2)
    assert got.images is not None
    assert got.texts is not None
    torch.testing.assert_close(got.images, nn.functional.normalize(embedded.images.float(), dim=-1))
    torch.testing.assert_close(got.texts, nn.functional.normalize(embedded.texts.float(), dim=-1))
    assert got.similarity.shape == (7, len(embedded.captions))
    assert not got.images.requires_grad


def test_a_picture_can_be_a_path_bytes_or_open(tmp_path: Path) -> None:
    model, picture = make_model().train(), MemorySource(1)[0].image
    picture.save(tmp_path / "one.png")
    encoded = io.BytesIO()
    picture.save(encoded, "PNG")
    ways: list[Any] = [tmp_path / "one.png", str(tmp_path / "one.png"), encoded.getvalue(), picture]
    together, single = model.embed(ways).images, model.embed(tmp_path / "one.png")
    assert together is not None
    assert single.images is not None
    assert single.images.shape == (1, 16)
    assert single.texts is None
    assert torch.allclose(together, single.images.expand(4, -1), atol=1e-6)
    assert model.training
    assert model.embed(iter(ways[:0])).images is not None  # none at all is an empty table


def test_one_text_is_one_text() -> None:
    model = make_model()
    assert len(model.tokenizer("a dog").ids) == 1
    texts = model.embed(texts="a dog").texts
    assert texts is not None
    assert texts.shape == (1, 16)
    torch.testing.assert_close(texts, model.embed(texts=["a dog"]).texts)


def test_what_cannot_be_embedded_is_named(tmp_path: Path) -> None:
    model: DualEncoder = make_model()
    (tmp_path / "no.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="neither images nor texts"):
        model.embed()
    with pytest.raises(ValueError, match="batch_size is 0"):
        model.embed(texts="a", batch_size=0)
    with pytest.raises(FileNotFoundError, match=r"image 0: there is no file 'gone.png'"):
        model.embed("gone.png")
    with pytest.raises(BadSampleError, match=r"no.png.*not an image in a known format"):
        model.embed(tmp_path / "no.png")
    with pytest.raises(TypeError, match=r"text 1 is of type int: give texts as str"):
        model.embed(texts=["a", 3])  # type: ignore[list-item]
    pixels: Any = torch.zeros(3, 16, 16)
    with pytest.raises(TypeError, match=r"image 0 is of type Tensor: give a path"):
        model.embed([pixels])
    with pytest.raises(ValueError, match="similarity needs both"):
        assert isinstance(model.embed(texts="a").similarity, Tensor)
