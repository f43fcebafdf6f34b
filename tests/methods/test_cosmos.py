"""COSMOS: its terms against the published classes, what its teacher reads, and its texts and views."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cmapkd.config import ConfigError
from cmapkd.data.types import Batch, TokenBatch
from cmapkd.methods.cosmos import Cosmos
from cmapkd.models import Features, Level, TowerFeatures
from cmapkd.objectives import contrast_of_views, contrastive_loss
from cmapkd.run.config import RunConfig
from helpers import make_builder, make_method, make_model, random_batch

# Numbers of `CLIP.forward` and `COSMOSLoss` of the authors' repository; the file names commit and conditions.
PUBLISHED = json.loads((Path(__file__).parent / "fixtures" / "cosmos.json").read_text())
CASE = PUBLISHED["case"]


def tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def cosmos(**settings: Any) -> Cosmos:
    method = make_method("cosmos", settings=settings)
    assert isinstance(method, Cosmos)
    return method.train()


def batch_for(method: Cosmos, size: int = 4) -> Batch:
    return random_batch(size, pools=method.text_pools, views=method.more_views)


def tower(views: Tensor, more: tuple[tuple[str, int], ...], **levels: Level) -> tuple[TowerFeatures, dict[str, Any]]:
    """The first view as a tower's features, and the others under their names."""
    found, start = {}, 1
    for name, count in more:
        found[name] = TowerFeatures(views[:, start : start + count].flatten(0, 1))
        start += count
    return TowerFeatures(views[:, 0], dict(levels)), found


def test_terms_and_gradients_equal_the_published_code(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"heads": 2, "local_views": 1, "local_texts": 2}
    method = make_method("cosmos", student=make_model(dim=8), settings=settings)
    assert isinstance(method, Cosmos)
    method.image_tokens, method.text_tokens = nn.Linear(6, 8), nn.Linear(5, 8)
    method.double().load_state_dict({name: tensor(value) for name, value in CASE["state"].items()}, strict=False)
    given = {name: tensor(CASE[name]) for name in ("image", "text", "patches", "words", "log_scale")}
    learned = {name: value.requires_grad_() for name, value in given.items()}
    with torch.no_grad():
        method.distill_scale.fill_(CASE["log_distill_scale"])
    learned["log_distill_scale"] = method.distill_scale
    learned |= {name: parameter for name, parameter in method.named_parameters() if name in CASE["state"]}
    patches = Level(torch.cat([torch.zeros(3, 1, 6).double(), given["patches"]], 1), "tokens", num_prefix=1)
    words = Level(given["words"], "tokens", mask=torch.ones(3, 3, dtype=torch.bool))
    image, views = tower(given["image"], (("global", 1), ("local", 1)), **{method.levels[0]: patches})
    text, pools = tower(given["text"], (("passages", 1), ("sentences", 2)), **{method.levels[1]: words})
    student = Features(image, text, given["log_scale"].exp(), more_texts=pools, more_images=views)
    of_teacher, large = tower(tensor(CASE["teacher_image"]), (("global", 1),))
    said, long = tower(tensor(CASE["teacher_text"]), (("passages", 1),))
    teacher = Features(of_teacher, said, tensor(1.0), more_texts=long, more_images=large)
    read = method._read(batch_for(method, 3), student, teacher)
    monkeypatch.setattr(method, "encode_both", lambda *_: (student, teacher, read))
    for name, term in method.terms(batch_for(method)).items():
        expected = CASE["expected"][name]
        assert term.value.item() == pytest.approx(expected["value"], rel=1e-9)
        found = torch.autograd.grad(term.value, list(learned.values()), retain_graph=True, allow_unused=True)
        gradients = {key: each for key, each in zip(learned, found, strict=True) if each is not None}
        assert gradients.keys() == expected["gradients"].keys()
        for key, gradient in gradients.items():
            torch.testing.assert_close(gradient, tensor(expected["gradients"][key]), rtol=1e-8, atol=1e-10, msg=key)


def test_the_contrast_of_views_is_the_mean_over_their_pairs() -> None:
    a, b = torch.randn(4, 3, 5, dtype=torch.float64), torch.randn(4, 2, 5, dtype=torch.float64)
    pictures = torch.tensor([1, 2, 1, 3])
    found = contrast_of_views(a, b, logit_scale=3.0, pictures=pictures)
    pairs = [contrastive_loss(a[:, i], b[:, j], logit_scale=3.0, pictures=pictures) for i in range(3) for j in range(2)]
    torch.testing.assert_close(found, sum(pairs) / 6)
    torch.testing.assert_close(contrast_of_views(a, b, logit_scale=3.0, pictures=pictures, chunk=2), found)
    assert contrast_of_views(a * 0 + 1, b * 0 + 1, logit_scale=3.0).item() == pytest.approx(1.3862943611)  # log 4


def test_captions_and_padding_are_not_read() -> None:
    """Two passages stand in the caption's place; what fills up a text is no word."""
    method, batch = cosmos(), batch_for(cosmos())
    expected = method.terms(batch)
    inputs = batch.pairs("student")
    passages = inputs.more_texts["passages"]
    padded = replace(
        passages, ids=nn.functional.pad(passages.ids, (0, 2)), mask=nn.functional.pad(passages.mask, (0, 2))
    )
    other = replace(inputs, texts=inputs.texts.rows(torch.arange(3, -1, -1)))
    other = replace(other, more_texts={**inputs.more_texts, "passages": padded})
    found = method.terms(replace(batch, inputs={"student": other}))
    for name, term in expected.items():
        torch.testing.assert_close(found[name].value, term.value)


def test_the_teacher_reads_large_crops_and_long_texts_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    method = cosmos(local_views=3, local_texts=2)
    assert method.momentum is not None
    sizes: dict[str, list[int]] = {"image": [], "text": []}
    model = method.momentum.model
    encode_image, encode_text = model.encode_image, model.encode_text

    def pixels(images: Tensor, levels: Any = ()) -> TowerFeatures:
        sizes["image"].append(len(images))
        return encode_image(images, levels)

    def tokens(texts: TokenBatch, levels: Any = ()) -> TowerFeatures:
        sizes["text"].append(len(texts.ids))
        return encode_text(texts, levels)

    monkeypatch.setattr(model, "encode_image", pixels)
    monkeypatch.setattr(model, "encode_text", tokens)
    method.terms(batch_for(method))
    assert sizes == {"image": [4, 4], "text": [4, 4]}


def test_what_is_switched_off_is_not_read() -> None:
    plain = cosmos(distill_weight=0)
    assert plain.more_views == {"global": 1}
    assert not plain.teachers
    assert plain.terms(batch_for(plain)).keys() == {"contrastive"}
    assert cosmos(local_texts=0).text_pools == {"passages": 2}
    without = cosmos(cross_attention=False)
    assert not without.student_needs.image_levels
    student, teacher, read = without.encode_both(batch_for(without), without._read)
    torch.testing.assert_close(read["image"][:, 0], student.image.embedding)
    assert (read["image"].shape[1], read["text"].shape[1]) == (3, 4)
    assert teacher.more_images.keys() == {"global"}


def test_all_but_the_teacher_learns_and_its_scale_stays_in_range() -> None:
    method = cosmos()
    terms = method.terms(batch_for(method))
    torch.stack([term.value for term in terms.values()]).sum().backward()
    assert all(
        (parameter.grad is None) == name.startswith("momentum.") for name, parameter in method.named_parameters()
    )
    with torch.no_grad():
        method.distill_scale.fill_(9.0)
    method.after_step()
    assert method.distill_scale.exp().item() == pytest.approx(100)


def test_wrong_settings_are_refused() -> None:
    run = {"student": "tiny:small", "training": {"steps": 2}, "data": {"train": "scenes", "mix_synthetic": 0.5}}
    with pytest.raises(ConfigError, match=r"data\.mix_synthetic is 0\.5, and with method cosmos that changes nothing"):
        RunConfig.from_mapping({**run, "method": "cosmos"}, where="recipe")
    RunConfig.from_mapping({**run, "method": "contrastive"}, where="recipe")
    with pytest.raises(ConfigError, match=r"method\.heads is 3, and 3 heads cannot share 16 channels"):
        cosmos(heads=3)
    with pytest.raises(ConfigError, match=r"task_weight and distill_weight are both zero"):
        cosmos(task_weight=0, distill_weight=0)
    with pytest.raises(ConfigError, match=r"1 further views 'global' .*data\.more_views: \{global:"):
        make_builder(cosmos(), view_specs={})
