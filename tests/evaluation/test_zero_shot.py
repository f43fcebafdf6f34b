"""Zero-shot classification against its definition in loops."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from cmapkd.data.templates import get_templates
from cmapkd.data.types import TokenBatch
from cmapkd.evaluation.zero_shot import zero_shot
from cmapkd.models.texts import class_vectors, embed_texts
from cmapkd.models.tiny import TinyDualEncoder


def test_accuracy_is_the_definition_written_out() -> None:
    generator = torch.Generator().manual_seed(0)
    images = F.normalize(torch.randn(60, 6, generator=generator), dim=-1)
    weights = F.normalize(torch.randn(9, 6, generator=generator), dim=-1)
    labels = torch.randint(-1, 8, (60,), generator=generator)  # class 8 has no image
    hits: dict[int, list[tuple[bool, bool]]] = {}
    for image, label in zip(images, labels.tolist(), strict=True):
        if label >= 0:
            order = sorted(range(9), key=lambda c: -float(image @ weights[c]))
            hits.setdefault(label, []).append((label == order[0], label in order[:5]))
    every = [hit for of_class in hits.values() for hit in of_class]
    scores = zero_shot(images, labels, weights)
    assert scores["top1"] == pytest.approx(100 * sum(h[0] for h in every) / len(every))
    assert scores["top5"] == pytest.approx(100 * sum(h[1] for h in every) / len(every))
    per_class = [sum(h[0] for h in of_class) / len(of_class) for of_class in hits.values()]
    assert scores["mean_per_class"] == pytest.approx(100 * sum(per_class) / len(per_class))
    assert (scores["num_classes"], scores["num_images"]) == (9, len(every))


def test_mean_per_class_weighs_classes_not_images() -> None:
    scores = zero_shot(torch.eye(2)[[0, 0, 0, 0]], torch.tensor([0, 0, 0, 1]), torch.eye(2))
    assert (scores["top1"], scores["mean_per_class"]) == (75, 50)


def test_equal_classes_score_chance() -> None:
    scores = zero_shot(torch.randn(30, 64), torch.arange(30) % 10, torch.ones(10, 64))
    assert (scores["top1"], scores["top5"], scores["mean_per_class"]) == pytest.approx((10, 50, 10))


@pytest.mark.parametrize("num_classes", [2, 5])
def test_top5_of_so_few_classes_is_not_reported(num_classes: int) -> None:
    assert zero_shot(torch.eye(num_classes), torch.arange(num_classes), torch.eye(num_classes))["top5"] is None


def test_a_class_vector_is_the_normalised_mean_of_its_unit_prompts(model: TinyDualEncoder) -> None:
    names, templates = ["red boat", "large dog", "tree"], ["{}", "a small {} near house", "blue {}"]
    weights = class_vectors(model, names, templates, batch_size=4, device="cpu")
    for name, weight in zip(names, weights, strict=True):
        units = [embed_texts(model, [t.replace("{}", name)], batch_size=1, device="cpu")[0] for t in templates]
        mean = torch.stack(units).mean(0)
        torch.testing.assert_close(weight, mean / mean.norm(), rtol=0, atol=1e-6)


def test_class_vectors_are_those_of_open_clip(model: TinyDualEncoder) -> None:
    import open_clip

    class AsOpenClip:
        def encode_text(self, texts: TokenBatch, normalize: bool) -> torch.Tensor:
            return F.normalize(model.encode_text(texts).embedding, dim=-1)

    names, templates = ["red boat", "large dog", "tree"], get_templates("simple")
    theirs = open_clip.build_zero_shot_classifier(AsOpenClip(), model.tokenizer, names, templates, device="cpu").T
    ours = class_vectors(model, names, templates, batch_size=4, device="cpu")
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_many_prompts_are_averaged_in_parts(model: TinyDualEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    names, templates = ["boat", "dog", "tree", "cat", "house"], ["{}", "red {}"]
    whole = class_vectors(model, names, templates, batch_size=8, device="cpu")
    monkeypatch.setattr("cmapkd.models.texts._TEXTS_AT_ONCE", 4)
    parts = class_vectors(model, names, templates, batch_size=8, device="cpu")
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-6)


def test_what_cannot_be_scored_is_refused(model: TinyDualEncoder) -> None:
    with pytest.raises(ValueError, match="none of the 2 images has a label"):
        zero_shot(torch.eye(2), torch.tensor([-1, -1]), torch.eye(2))
    with pytest.raises(ValueError, match="labels up to 7, but only 2 class names"):
        zero_shot(torch.eye(2), torch.tensor([0, 7]), torch.eye(2))
    with pytest.raises(ValueError, match="class weights are not finite"):
        zero_shot(torch.eye(2), torch.tensor([0, 1]), torch.eye(2) * torch.nan)
    with pytest.raises(ValueError, match="needs class names and templates, got 0 and 1"):
        class_vectors(model, [], ["{}"], batch_size=1, device="cpu")
