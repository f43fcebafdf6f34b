"""The bank: what is drawn from it, whom it excludes, and a fixed one."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from cmapkd.features import EmbeddingBank


def filled(size: int, count: int, *, fixed: bool = False) -> EmbeddingBank:
    bank = EmbeddingBank(size, 4, fixed=fixed)
    draws = torch.Generator().manual_seed(0)
    put = bank.fill if fixed else bank.push
    put(torch.randn(count, 4, generator=draws), torch.randn(count, 4, generator=draws), torch.arange(count))
    return bank


def test_a_draw_takes_each_pair_equally_often_and_none_twice() -> None:
    bank = filled(50, 30)
    counts = torch.zeros(30)
    torch.manual_seed(0)
    for _ in range(2000):
        found = bank.references(torch.tensor([99]), num=6)
        entries = (found.image[:, None] == bank.image[None, :30]).all(-1).float().argmax(1)
        assert len({*entries.tolist()}) == 6
        assert torch.equal(found.text, bank.text[entries])  # pairs stay pairs
        counts[entries] += 1
    assert float((counts / 400 - 1).abs().max()) < 0.2  # each is expected 400 times, give or take 18


def test_a_draw_follows_the_random_state_and_excludes_the_sample_itself() -> None:
    bank, keys = filled(20, 20), torch.tensor([3, 50, 7])
    torch.manual_seed(4)
    one = bank.references(keys, num=12)
    torch.manual_seed(4)
    other = bank.references(keys, num=12)
    assert torch.equal(one.image, other.image)
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
        found = bank.references(torch.tensor([99]), num=num)
        assert torch.equal(found.image, bank.image[:5])
        assert not found.exclude.any()
    empty = EmbeddingBank(8, 4).references(torch.tensor([1, 2]), num=4)
    assert empty.exclude.tolist() == [[True], [True]]


def test_it_knows_how_full_it_is_after_loading() -> None:
    bank, other = filled(10, 7), EmbeddingBank(10, 4)
    other.load_state_dict(bank.state_dict())
    assert other.filled == bank.filled == 7
    other.push(torch.ones(6, 4), torch.ones(6, 4), torch.arange(6))
    assert other.filled == 10


def test_the_same_image_under_another_name_is_excluded() -> None:
    bank, images = filled(20, 20), torch.randn(3, 4, generator=torch.Generator().manual_seed(5))
    images[1] = bank.image[8] * 3.0
    cosines = F.normalize(images, dim=-1) @ bank.image.T
    for limit in (0.999, 0.5):
        for num in (None, 10):
            torch.manual_seed(0)
            found = bank.references(torch.tensor([97, 98, 99]), num=num, images=images, duplicates_above=limit)
            near = F.normalize(images, dim=-1) @ found.image.T > limit
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
