"""Adapted models: how they answer for classes with and without pictures, and that they are models as others."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from model_support import check_contract, check_round_trip

from cmapkd.config import ConfigError
from cmapkd.export.layout import write_tokenizer
from cmapkd.models.adapted import AdaptedEncoder
from cmapkd.models.texts import class_vectors
from helpers import CLASSES, make_method, make_model

DIM = 16


def adapted(names: tuple[str, ...] = CLASSES.names, *, share: float = 0.3) -> AdaptedEncoder:
    model = AdaptedEncoder(make_model().eval(), names, shots=2, hidden=8, share=share).eval()
    torch.manual_seed(1)
    model.support.copy_(F.normalize(torch.randn(len(names), 2, DIM), dim=-1))
    model.in_support[:, 0] = True
    return model


def test_cosines_are_the_mixed_scores(tmp_path: Path) -> None:
    model, inner = adapted(), make_model().eval()
    pixels, words = torch.randn(4, 3, 16, 16), inner.tokenizer(["red cat", "round tree"])
    with torch.no_grad():
        joint, texts = model.encode_image(pixels).embedding, model.encode_text(words).embedding
        v = F.normalize(inner.encode_image(pixels).embedding, dim=-1)
        a, t = model.adapter(v), F.normalize(inner.encode_text(words).embedding, dim=-1)
        torch.testing.assert_close(joint @ texts.T, 0.3 * a @ t.T + 0.7 * v @ t.T)
        known = class_vectors(model, CLASSES.names, CLASSES.templates, device="cpu")
        w = class_vectors(inner, CLASSES.names, CLASSES.templates, device="cpu")
        p = model.adapter(model.support[:, 0])
        torch.testing.assert_close(joint @ known.T, 0.3 * a @ p.T + 0.7 * v @ w.T)
        for rows in (joint, texts, known):
            torch.testing.assert_close(rows.norm(dim=-1), torch.ones(len(rows)))
        some = class_vectors(model, (*CLASSES.names, "blue cat"), ("{}",), device="cpu")  # which has no pictures
        own = class_vectors(inner, (*CLASSES.names, "blue cat"), ("{}",), device="cpu")
        torch.testing.assert_close(joint @ some.T, 0.3 * a @ own.T + 0.7 * v @ own.T)
    check_contract(model)
    loaded = check_round_trip(model, tmp_path / "saved")
    assert isinstance(loaded, AdaptedEncoder)
    assert torch.equal(class_vectors(loaded, CLASSES.names, CLASSES.templates, device="cpu"), known)
    assert loaded.num_parameters() == inner.num_parameters() + 2 * 8 * DIM + 1
    assert model.parts["adapter"] == {"adapter.inner.weight", "adapter.outer.weight", "adapter.alpha"}


def test_a_class_without_pictures_has_no_prototype() -> None:
    model = adapted()
    model.in_support[1] = False
    model.support[1] = torch.nan
    assert model.prototypes()[1].abs().max() == 0
    texts = torch.randn(2, 2 * DIM + 1)
    assert model.class_rows(CLASSES.names[:2], texts) is texts
    assert not torch.equal(model.class_rows((CLASSES.names[0], CLASSES.names[2]), texts), texts)


def test_pictures_do_not_follow_a_tower_that_learns() -> None:
    """What is stored of them would be of another tower: every method refuses it before its first step."""
    with pytest.raises(ConfigError, match=r"has an adapter, and pictures .* name the model without it, .*`model`"):
        make_method("contrastive", student=adapted()).check_learning()
    for still in (["adapter"], ["adapter", "text", "scale"]):
        method = make_method("contrastive", student=adapted())
        method.train_only(still)
        method.check_learning()
    make_method("sgva_clip").check_learning()
    with pytest.raises(ConfigError, match="has an adapter already: name the model without it"):
        make_method("mulki", student=adapted())


def test_pictures_have_no_place_in_an_export(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"by pictures that it has seen, .* export the model that was adapted"):
        write_tokenizer(adapted(), tmp_path)
