"""Embeddings of fewer numbers and bytes: rotation, int8, sign bits, and graphs that give them cut."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from export_support import scenes, write

from cmapkd.config import ConfigError
from cmapkd.evaluation.embed import Embedded
from cmapkd.evaluation.retrieval import retrieval
from cmapkd.export import stored
from cmapkd.export.narrow import Narrowed, rotation_of
from cmapkd.export.stored import signs, stored_rows, to_bits, to_int8
from helpers import make_model

pytestmark = pytest.mark.usefixtures("one_thread")


def embedded(images: int = 40, dim: int = 16, rank: int = 2) -> Embedded:
    """Pictures and two noisy captions each, which lie in few directions of a space that hides them."""
    draws = torch.Generator().manual_seed(0)
    hidden = torch.linalg.qr(torch.randn(dim, dim, generator=draws)).Q[:rank]
    inner = torch.randn(images, rank, generator=draws)
    noise = torch.randn(images, 2, rank, generator=draws) * 0.05
    rows = [inner @ hidden, ((inner[:, None] + noise) @ hidden).flatten(0, 1)]
    pictures, texts = (F.normalize(each, dim=-1) for each in rows)
    return Embedded(
        pictures,
        texts,
        torch.arange(images).repeat_interleave(2),
        tuple(map(str, range(images))),
        torch.full((images,), -1),
        tuple(map(str, range(2 * images))),
    )


def rotation(found: Embedded) -> torch.Tensor:
    rows = torch.cat([found.images, found.texts])
    return torch.linalg.svd(rows).Vh.T


def test_int8_is_clipped_and_bits_are_packed_along_each_vector() -> None:
    assert to_int8(torch.tensor([[1.0, -1.0, 0.5, 1.7, -3.0]])).tolist() == [[127, -127, 64, 127, -127]]
    rows = torch.tensor([[1.0, -1, -1, -1, -1, -1, -1, -1, 1], [-1.0, -1, -1, -1, -1, -1, -1, 1, -1]])
    bits = to_bits(rows)
    assert bits.tolist() == [[128, 128], [1, 0]]
    assert signs(bits, 9).tolist() == rows.tolist()


def test_rows_of_storing() -> None:
    found = embedded()
    rows = {(row["width"], row["rotated"]): row["forms"] for row in stored_rows(found, rotation(found))}
    assert list(rows) == [(16, False), (8, False), (4, False), (2, False), (8, True), (4, True), (2, True)]
    whole = retrieval(found.images, found.texts, found.image_of_text)["mean_r@1"]
    assert rows[16, False]["float32"]["recall@1"] == pytest.approx(whole)
    assert rows[2, True]["float32"]["recall@1"] == pytest.approx(whole)  # all of it lies in two directions
    assert rows[2, False]["float32"]["recall@1"] < whole
    assert rows[16, False]["bits"]["bytes"] == 2
    assert rows[4, False]["bits"]["bytes"] == 1


def test_rescoring_all_candidates_is_the_floats_own_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "RESCORED", 1000)
    found = embedded()
    [first, *_] = stored_rows(found, None)
    assert first["forms"]["bits, rescored"]["recall@1"] == pytest.approx(first["forms"]["float32"]["recall@1"])
    assert first["forms"]["bits"]["recall@1"] < first["forms"]["float32"]["recall@1"]


def test_a_rotation_is_orthogonal_and_sorted() -> None:
    model, source = make_model(), scenes("train", 40)
    found = rotation_of(model, source)
    dim = model.embed_dim
    torch.testing.assert_close(found.T @ found, torch.eye(dim), rtol=0, atol=1e-5)
    pictures = [source[index].image for index in range(40)]
    texts = [caption for index in range(40) for caption in source[index].captions]
    images, words = model.embed(images=pictures, texts=texts)
    assert images is not None
    assert words is not None
    energy = (torch.cat([images, words]) @ found).square().sum(0)
    assert (energy.diff() < 1e-4).all()
    with pytest.raises(ConfigError, match=r"a rotation of \d+ dimensions is measured on as many at least"):
        rotation_of(model, scenes("train", 1))


def test_cut_graphs_give_rotated_embeddings(tmp_path: Path) -> None:
    model, train = make_model(), scenes("train", 40)
    parity = write(model, tmp_path / "out", dims=5, calibration=train)
    assert min(row["cosine_min"] for row in parity["files"]) > 1 - 1e-6
    manifest = json.loads((tmp_path / "out" / "export.json").read_text())
    assert manifest["narrowed"] == {"from": model.embed_dim, "rotated_on": train.name}
    assert manifest["embed_dim"] == 5
    assert json.loads((tmp_path / "out" / "config.json").read_text())["projection_dim"] == 5
    session = onnxruntime.InferenceSession(tmp_path / "out" / "onnx" / "vision_model.onnx")
    pixels = model.image_spec(scenes()[0].image.convert("RGB"))[None]
    [found] = session.run(None, {"pixel_values": pixels.numpy()})
    with torch.no_grad():
        wanted = model.encode_image(pixels).embedding @ rotation_of(model, train)[:, :5]
    np.testing.assert_allclose(found, wanted.numpy(), atol=1e-5)
    with torch.no_grad():
        plain = Narrowed(model, 5, None).encode_image(pixels).embedding
        torch.testing.assert_close(plain, model.encode_image(pixels).embedding[:, :5])
