"""The bank: what is drawn from it, whom it excludes, and a fixed one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cmapkd.features import BankStore, EmbeddingBank


def pairs(count: int) -> tuple[Tensor, Tensor, Tensor]:
    draws = torch.Generator().manual_seed(0)
    image, text = (torch.randn(count, 4, generator=draws) for _ in range(2))
    return image, text, torch.arange(count)


def filled(size: int, count: int, *, fixed: bool = False, store: BankStore = "fp16") -> EmbeddingBank:
    bank = EmbeddingBank(size, 4, fixed=fixed, store=store)
    if fixed:
        bank.fill([pairs(count)])
    else:
        bank.push(*pairs(count))
    return bank


@pytest.mark.parametrize("fixed", [False, True])
def test_what_is_stored(fixed: bool) -> None:
    exact = F.normalize(pairs(200)[0], dim=-1)
    assert torch.equal(filled(200, 200, fixed=fixed, store="fp32").image, exact)
    half = filled(200, 200, fixed=fixed).image
    assert torch.equal(half, exact.half())  # rounded once
    assert bool(((half.float() - exact).abs() <= 2**-11 * exact.abs() + 2**-25).all())
    assert half.nbytes * 2 == exact.nbytes


def test_what_fp16_could_not_hold_is_normalised_first() -> None:
    bank, huge = EmbeddingBank(4, 4), 1e6 * torch.ones(2, 4)
    bank.push(huge, huge, torch.arange(2))
    assert bool((bank.image[:2] == 0.5).all())
    bank.push(huge.double(), huge.bfloat16(), torch.arange(2))
    assert bank.image.dtype == bank.text.dtype == torch.float16


def test_filled_in_parts_as_at_once_and_never_held_twice() -> None:
    whole, bank = filled(30, 25, fixed=True), EmbeddingBank(30, 4, fixed=True)
    image, text, keys = pairs(25)

    def parts() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for start in (0, 10, 20):
            assert bank.filled == start  # what came before is stored
            here = slice(start, start + 10)
            yield image[here], text[here], keys[here]

    bank.fill(parts())
    assert bank.filled == whole.filled == 25
    for mine, theirs in zip(bank.buffers(), whole.buffers(), strict=True):
        assert torch.equal(mine[:25] if mine.ndim else mine, theirs[:25] if theirs.ndim else theirs)
    found = bank.references(torch.tensor([3, 99]))
    assert len(found.image) == 25
    assert found.exclude.sum(1).tolist() == [1, 0]


def test_duplicates_are_told_apart_under_autocast() -> None:
    bank, near = filled(20, 20), filled(20, 20).image[:3].float()
    near[:, 0] += 0.02  # cosines that bf16 cannot tell from 1
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = bank.references(torch.tensor([97, 98, 99]), images=near, duplicates_above=0.9999)
    outside = bank.references(torch.tensor([97, 98, 99]), images=near, duplicates_above=0.9999)
    assert torch.equal(inside.exclude, outside.exclude)
    assert torch.equal(outside.exclude, F.normalize(near, dim=-1) @ bank.image.float().T > 0.9999)


def test_a_draw_takes_each_pair_equally_often_and_none_twice() -> None:
    bank = filled(50, 30)
    counts = torch.zeros(30)
    draws = torch.Generator().manual_seed(0)
    for _ in range(2000):
        found = bank.references(torch.tensor([99]), num=6, generator=draws)
        entries = (found.image[:, None] == bank.image[None, :30]).all(-1).float().argmax(1)
        assert len({*entries.tolist()}) == 6
        assert torch.equal(found.text, bank.text[entries])  # pairs stay pairs
        counts[entries] += 1
    assert float((counts / 400 - 1).abs().max()) < 0.2  # each is expected 400 times, give or take 18


def test_a_draw_follows_its_generator_alone_and_excludes_the_sample_itself() -> None:
    bank, keys = filled(20, 20), torch.tensor([3, 50, 7])
    one, other = (bank.references(keys, num=12, generator=torch.Generator().manual_seed(4)) for _ in range(2))
    assert torch.equal(one.image, other.image)
    with pytest.raises(ValueError, match="12 entries are to be drawn, but from what"):
        bank.references(keys, num=12)
    whole = bank.references(keys)
    assert whole.exclude.sum(1).tolist() == [1, 0, 1]
    assert whole.exclude[0, 3]
    assert whole.exclude[2, 7]
    for row, key in ((0, 3), (2, 7)):
        own = (one.image == bank.image[key]).all(-1)
        assert torch.equal(one.exclude[row], own)
    assert not one.exclude[1].any()


def test_what_is_empty_is_not_drawn() -> None:
    bank = filled(100, 5)
    for num in (None, 5, 50):
        found = bank.references(torch.tensor([99]), num=num, generator=torch.Generator())
        assert torch.equal(found.image, bank.image[:5])
        assert not found.exclude.any()
    empty = EmbeddingBank(8, 4).references(torch.tensor([1, 2]), num=4, generator=torch.Generator())
    assert empty.exclude.tolist() == [[True], [True]]


def test_it_knows_how_full_it_is_after_loading() -> None:
    bank, other = filled(10, 7), EmbeddingBank(10, 4)
    other.load_state_dict(bank.state_dict())
    assert other.filled == bank.filled == 7
    assert torch.equal(other.image, bank.image)
    other.push(torch.ones(6, 4), torch.ones(6, 4), torch.arange(6))
    assert other.filled == 10


def test_the_same_image_under_another_name_is_excluded() -> None:
    bank, images = filled(20, 20), torch.randn(3, 4, generator=torch.Generator().manual_seed(5))
    images[1] = bank.image[8] * 3.0
    cosines = F.normalize(images, dim=-1) @ bank.image.float().T
    for limit in (0.999, 0.5):
        for num in (None, 10):
            draws, names = torch.Generator().manual_seed(0), torch.tensor([97, 98, 99])
            found = bank.references(names, num=num, generator=draws, images=images, duplicates_above=limit)
            near = F.normalize(images, dim=-1) @ found.image.float().T > limit
            assert torch.equal(found.exclude, near)
    assert bool((cosines[1] > 0.999).any())


def test_refilling_does_not_reach_what_was_returned() -> None:
    bank = filled(4, 4)
    found = bank.references(torch.tensor([9]))
    before = found.image.clone()
    bank.push(torch.ones(4, 4), torch.ones(4, 4), torch.arange(4))
    assert torch.equal(found.image, before)


def test_a_fixed_bank_is_no_part_of_a_checkpoint() -> None:
    bank = filled(6, 6, fixed=True)
    assert not bank.state_dict()
    assert torch.equal(bank.image, filled(6, 6).image)
    assert bank.references(torch.tensor([9])).image.data_ptr() == bank.image.data_ptr()  # and is not copied


def test_levels_stand_beside_the_pairs_they_belong_to() -> None:
    bank = EmbeddingBank(6, 4, levels={"P2": 3})
    assert bank.references(torch.tensor([0])).of_level("P2")[1].all()  # nothing yet
    image, text, keys = pairs(6)
    vectors = torch.arange(12.0).reshape(4, 3) + 1
    bank.push(image[:4], text[:4], keys[:4], {"P2": vectors})
    bank.push(image[4:5], text[4:5], keys[4:5])  # a stage that does not read the level
    bank.push(image[5:], text[5:], keys[5:], {"P2": torch.tensor([[1e6, -1e6, float(0)]])})
    entries, exclude = bank.references(torch.tensor([99])).of_level("P2")
    assert torch.equal(entries[:4], vectors)
    assert exclude[0].tolist() == [False] * 4 + [True, False]
    assert bool(entries.isfinite().all())  # beyond the range of half precision, and kept within it
    one = bank.references(torch.tensor([int(keys[1])]), num=3, generator=torch.Generator())
    row = {tuple(image.tolist()): level for image, level in zip(bank.image.float(), bank.level_P2, strict=True)}
    for place, image in enumerate(one.image.float()):
        assert torch.equal(one.levels["P2"][place], row[tuple(image.tolist())])
    again = EmbeddingBank(6, 4, levels={"P2": 3})
    again.load_state_dict(bank.state_dict())
    assert torch.equal(again.references(torch.tensor([99])).of_level("P2")[0], entries)
