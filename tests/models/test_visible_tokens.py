"""Image towers that compute the kept cells alone: fewer tokens, the same answers as by hand, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from model_support import images
from test_joined import a_model, hooks
from test_open_clip_family import small

from cmapkd.models.visible_tokens import TokenGrid, only_visible, token_grid, visible_pixels
from helpers import make_model


@pytest.mark.parametrize("kind", ["tiny", "vit", "siglip", "hf"])
def test_every_plain_vit_computes_fewer_tokens(kind: str, tmp_path: Path) -> None:
    """All cells give the model's own answer; some of them other tokens than all, and really fewer."""
    model = a_model(kind, tmp_path / "model").eval()
    tokens = token_grid(model)
    before = hooks(model)  # with those that a library sets when it is first asked for levels
    pixels, last = images(model, 2), len(model.image_blocks) - 1
    level = model.image_levels[-1].name
    with torch.no_grad():
        whole = model.encode_image(pixels, (level,))
        with only_visible(model, tokens, torch.arange(tokens.cells).expand(2, -1)) as seen:
            torch.testing.assert_close(model.encode_image(pixels).embedding, whole.embedding)
        if kind != "siglip":  # whose library notes it behind a norm
            torch.testing.assert_close(seen[last], whole.levels[level].values)
        keep = torch.tensor([[0, 2], [1, 3]])
        with only_visible(model, tokens, keep) as seen:
            some = model.encode_image(pixels).embedding
    assert set(seen) == set(range(last + 1))
    assert all(x.shape[1] == tokens.num_prefix + 2 for x in seen.values())
    assert some.shape == whole.embedding.shape
    assert not torch.allclose(some, whole.embedding)
    assert hooks(model) == before


@torch.no_grad()
def test_kept_cells_pass_through_the_blocks_by_themselves() -> None:
    model = make_model(depth=2)
    pixels, keep = images(model, 2), torch.tensor([[0, 3], [1, 2]])
    tower = model.vision
    patches = tower.to_width(tower.stem(pixels)).flatten(2).transpose(1, 2) + tower.positions[:, 1:]
    kept = torch.stack([patches[i, keep[i]] for i in range(2)])
    x = torch.cat([(tower.class_token + tower.positions[:, :1]).expand(2, -1, -1), kept], dim=1)
    for block in tower.blocks:
        x = block(x)
    with only_visible(model, token_grid(model), keep) as seen:
        embedding = model.encode_image(pixels).embedding
    torch.testing.assert_close(seen[1], x)
    torch.testing.assert_close(embedding, tower.project(tower.norm(x[:, 0])))


def test_hidden_pixels_reach_no_visible_token() -> None:
    """The stem of `tiny` is convolutions, which look over the borders of a cell."""
    model, grid = make_model(), (2, 2)
    first, second = images(model, 1).double(), images(model, 1).double() + 1
    model.double()
    second[..., :8, :8] = first[..., :8, :8]
    keep = torch.tensor([[0]])
    found = []
    for pixels in (first, second):
        shown = visible_pixels(pixels, keep, grid)
        assert torch.equal(shown[..., :8, :8], pixels[..., :8, :8])
        assert not shown[..., 8:, :].any()
        assert not shown[..., :, 8:].any()
        with only_visible(model, token_grid(model), keep):
            found.append(model.encode_image(shown).embedding)
    torch.testing.assert_close(found[0], found[1])
    odd = visible_pixels(torch.ones(1, 3, 11, 7), torch.tensor([[5]]), (3, 2))  # cells of 3 x 3, a margin of 2 and 1
    assert odd[0, 0].nonzero().tolist() == [[row, column] for row in (6, 7, 8) for column in (3, 4, 5)]


def test_other_towers_are_refused(tmp_path: Path) -> None:
    tmp_path.joinpath("rn").mkdir()
    with pytest.raises(ValueError, match=r"cannot leave tokens out: it is no plain ViT .*Choose a ViT"):
        token_grid(small("resnet", tmp_path / "rn"))
    model = make_model()
    other, keep = TokenGrid(1, (3, 3), 32), torch.zeros(2, 1, dtype=torch.int64)
    told = pytest.raises(ValueError, match=r"has 5 tokens where 1 and 9 cells were expected")
    with told, only_visible(model, other, keep):
        model.encode_image(images(model, 2))
