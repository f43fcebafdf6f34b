"""Retrieval against the protocol written out in loops."""

from __future__ import annotations

import statistics
from math import comb
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cmapkd.evaluation.retrieval import retrieval, shared_captions


def slow(
    images: Tensor, texts: Tensor, own: set[tuple[int, int]], also: set[tuple[int, int]] | None = None
) -> dict[str, Any]:
    """The protocol, one query and one candidate at a time; `own` and `also` are (text, image) pairs that are right."""
    positives = own | (also or set())

    def direction(num_queries: int, num_candidates: int, score: Any, right: Any) -> dict[str, float]:
        hits: dict[int, list[float]] = {1: [], 5: [], 10: []}
        ranks, precisions = [], []
        for query in range(num_queries):
            answers = [c for c in range(num_candidates) if right(query, c)]
            if not answers:
                continue
            best = max(score(query, c) for c in answers)
            better = sum(score(query, c) > best for c in range(num_candidates))
            positive = sum(score(query, c) == best for c in answers)
            negative = sum(score(query, c) == best for c in range(num_candidates)) - positive
            ranks.append(1 + better + negative / (positive + 1))
            precision = 0.0
            for answer in answers:
                above = [c for c in range(num_candidates) if score(query, c) > score(query, answer)]
                tied = [c for c in range(num_candidates) if score(query, c) == score(query, answer)]
                others = sum(c in answers for c in tied) - 1  # each stands before with the same chance as any place
                for place in range(len(tied)):
                    before = sum(c in answers for c in above) + place * others / max(1, len(tied) - 1)
                    precision += (before + 1) / (len(above) + place + 1) / len(tied) / len(answers)
            precisions.append(precision)
            for k, seen in hits.items():
                places = min(k - better, positive + negative)
                seen.append(1 - comb(negative, places) / comb(negative + positive, places) if places > 0 else 0.0)
        recall = {f"r@{k}": 100 * statistics.mean(seen) for k, seen in hits.items()}
        middle = {"median_rank": statistics.median(ranks), "mean_rank": statistics.mean(ranks)}
        return recall | middle | {"map": 100 * statistics.mean(precisions)}

    table = (texts.double() @ images.double().T).tolist()
    t2i = direction(len(texts), len(images), lambda t, i: table[t][i], lambda t, i: (t, i) in positives)
    i2t = direction(len(images), len(texts), lambda i, t: table[t][i], lambda i, t: (t, i) in positives)
    means = {f"mean_r@{k}": (i2t[f"r@{k}"] + t2i[f"r@{k}"]) / 2 for k in (1, 5, 10)}
    least = min(sum(i == image for _, i in own) for image in {i for _, i in own})
    counts = {"num_images": len(images), "num_texts": len(texts), "min_texts_per_image": least}
    return {"i2t": i2t, "t2i": t2i} | means | counts


def own_pairs(image_of_text: Tensor) -> set[tuple[int, int]]:
    return set(enumerate(image_of_text.tolist()))


def assert_same(left: dict[str, Any], right: dict[str, Any]) -> None:
    assert left.keys() == right.keys()
    for key, value in left.items():
        assert value == pytest.approx(right[key], abs=1e-9), key


def drawn(seed: int, *, num_images: int = 23, per_image: int = 3, width: int = 8, exact: bool = False) -> Any:
    """Images, texts in shuffled order, and whose they are; `exact` values make many ties and no rounding."""
    generator = torch.Generator().manual_seed(seed)

    def values(rows: int) -> Tensor:
        if exact:
            return torch.randint(-1, 2, (rows, width), generator=generator).float()
        return torch.nn.functional.normalize(torch.randn(rows, width, generator=generator), dim=-1)

    image_of_text = torch.arange(num_images).repeat_interleave(per_image)
    image_of_text = image_of_text[torch.randperm(len(image_of_text), generator=generator)]
    return values(num_images), values(len(image_of_text)), image_of_text


@pytest.mark.parametrize("seed", range(4))
def test_retrieval_is_the_protocol_written_out(seed: int) -> None:
    images, texts, image_of_text = drawn(seed)
    assert_same(retrieval(images, texts, image_of_text), slow(images, texts, own_pairs(image_of_text)))


@pytest.mark.parametrize("seed", range(4))
def test_retrieval_with_many_ties_is_the_protocol_written_out(seed: int) -> None:
    images, texts, image_of_text = drawn(seed, width=3, exact=True)
    images[5:9] = images[4]
    texts[10:20] = texts[3]
    assert_same(retrieval(images, texts, image_of_text), slow(images, texts, own_pairs(image_of_text)))


def test_also_positive_pairs_count_in_both_directions() -> None:
    images, texts, image_of_text = drawn(7, width=3, exact=True)
    extra = torch.tensor([[0, 3], [0, 4], [8, 1], [8, int(image_of_text[8])]])
    expected = slow(images, texts, own_pairs(image_of_text), {(int(t), int(i)) for t, i in extra})
    assert_same(retrieval(images, texts, image_of_text, also_positive=extra), expected)


def test_a_perfect_and_a_reversed_model() -> None:
    images, image_of_text = torch.eye(12), torch.arange(12).repeat(2)
    perfect = retrieval(images, images[image_of_text], image_of_text)
    assert (perfect["i2t"]["r@1"], perfect["t2i"]["r@1"], perfect["mean_r@1"]) == (100, 100, 100)
    assert (perfect["i2t"]["mean_rank"], perfect["t2i"]["median_rank"]) == (1, 1)
    reversed_ = retrieval(images, -images[image_of_text], image_of_text)
    assert (reversed_["i2t"]["r@10"], reversed_["t2i"]["r@10"], reversed_["t2i"]["mean_rank"]) == (0, 0, 12)


@pytest.mark.parametrize("num_images", [20, 100])
def test_identical_embeddings_score_chance(num_images: int) -> None:
    torch.manual_seed(0)
    same = torch.nn.functional.normalize(torch.randn(1, 192), dim=-1)
    scores = retrieval(
        same.expand(num_images, -1), same.expand(num_images, -1), torch.randperm(num_images), queries_per_block=7
    )
    for direction in ("i2t", "t2i"):
        for k in (1, 5, 10):
            assert scores[direction][f"r@{k}"] == pytest.approx(100 * k / num_images)
        assert scores[direction]["mean_rank"] == pytest.approx((num_images + 1) / 2)


def test_identical_embeddings_with_five_captions_score_chance() -> None:
    scores = retrieval(torch.ones(40, 4), torch.ones(200, 4), torch.arange(40).repeat(5))
    assert scores["t2i"]["r@5"] == pytest.approx(100 * 5 / 40)
    assert scores["i2t"]["r@1"] == pytest.approx(100 * 5 / 200)
    assert scores["i2t"]["r@10"] == pytest.approx(100 * (1 - comb(195, 10) / comb(200, 10)))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10_000), block=st.integers(1, 40), exact=st.booleans())
def test_order_and_blocks_do_not_change_the_scores(seed: int, block: int, exact: bool) -> None:
    images, texts, image_of_text = drawn(seed, num_images=11, width=4, exact=exact)
    generator = torch.Generator().manual_seed(seed + 1)
    image_order, text_order = (torch.randperm(len(x), generator=generator) for x in (images, texts))
    moved = image_order.argsort()[image_of_text[text_order]]  # where each caption's image went
    scores = retrieval(images, texts, image_of_text)
    assert_same(retrieval(images, texts, image_of_text, queries_per_block=block), scores)
    assert_same(retrieval(images[image_order], texts[text_order], moved), scores)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10_000))
def test_recall_grows_with_k_and_more_positives_never_hurt(seed: int) -> None:
    images, texts, image_of_text = drawn(seed, width=3, exact=True)
    generator = torch.Generator().manual_seed(seed)
    extra = torch.stack([torch.randint(0, n, (9,), generator=generator) for n in (len(texts), len(images))], dim=1)
    scores = retrieval(images, texts, image_of_text)
    more = retrieval(images, texts, image_of_text, also_positive=extra)
    for direction in ("i2t", "t2i"):
        assert 0 <= scores[direction]["r@1"] <= scores[direction]["r@5"] <= scores[direction]["r@10"] <= 100
        assert more[direction]["mean_rank"] <= scores[direction]["mean_rank"] + 1e-9
        assert all(more[direction][f"r@{k}"] >= scores[direction][f"r@{k}"] - 1e-9 for k in (1, 5, 10))


def test_images_without_captions_are_candidates_but_ask_nothing() -> None:
    images, texts, image_of_text = drawn(3)
    others = torch.nn.functional.normalize(torch.randn(9, 8, generator=torch.Generator().manual_seed(1)), dim=-1)
    everyone = torch.cat([images, others])
    scores, without = retrieval(everyone, texts, image_of_text), retrieval(images, texts, image_of_text)
    assert scores["i2t"] == pytest.approx(without["i2t"])
    assert scores["t2i"]["mean_rank"] > without["t2i"]["mean_rank"]
    assert_same(scores, slow(everyone, texts, own_pairs(image_of_text)))


def test_shared_captions_are_the_same_words_of_other_images() -> None:
    captions = ["A red  boat.", "a red boat", "a blue boat", "a RED boat .", "a red boat"]
    image_of_text = torch.tensor([0, 1, 1, 2, 0])
    pairs = shared_captions(captions, image_of_text)
    assert sorted(map(tuple, pairs.tolist())) == [(0, 1), (0, 2), (1, 0), (1, 2), (3, 0), (3, 1), (4, 1), (4, 2)]


def test_no_shared_captions() -> None:
    pairs = shared_captions(["a cat", "a dog", "a cat"], torch.tensor([0, 1, 0]))
    assert pairs.shape == (0, 2)
    images, texts, image_of_text = torch.eye(2), torch.eye(2)[[0, 1, 0]], torch.tensor([0, 1, 0])
    assert retrieval(images, texts, image_of_text, also_positive=pairs) == retrieval(images, texts, image_of_text)


def test_a_sentence_said_of_two_images_is_half_right_by_the_standard_and_right_when_shared() -> None:
    captions, image_of_text = ["a boat", "a boat"], torch.tensor([0, 1])
    same = torch.ones(2, 2)
    assert retrieval(same, same, image_of_text)["mean_r@1"] == pytest.approx(50)
    shared = retrieval(same, same, image_of_text, also_positive=shared_captions(captions, image_of_text))
    assert shared["mean_r@1"] == pytest.approx(100)


def test_what_cannot_be_scored_is_refused() -> None:
    images, texts, image_of_text = drawn(0)
    with pytest.raises(ValueError, match="no images to retrieve"):
        retrieval(images[:0], texts, image_of_text)
    with pytest.raises(ValueError, match="none of the 23 images has a caption"):
        retrieval(images, texts[:0], image_of_text[:0])
    with pytest.raises(ValueError, match="one joint"):
        retrieval(images[:, :4], texts, image_of_text)
    with pytest.raises(ValueError, match="one image for each of 69 texts"):
        retrieval(images, texts, image_of_text[1:])
    with pytest.raises(ValueError, match="names images 0 to 22, but there are 20"):
        retrieval(images[:20], texts, image_of_text)
    texts[2] = torch.nan
    with pytest.raises(ValueError, match=r"1 of 69 text embeddings are not finite .* row 2"):
        retrieval(images, texts, image_of_text)


def test_map_of_one_positive_is_the_reciprocal_rank_and_of_all_positives_first_is_100() -> None:
    images = torch.eye(4)
    texts = torch.tensor([[4.0, 3, 2, 1], [9, 8, 1, 1], [2, 3, 1, 1]])
    scores = retrieval(images, texts, torch.tensor([2, 0, 1]))  # ranks 3, 1, 1 of the images
    assert scores["t2i"]["map"] == pytest.approx(100 * (1 / 3 + 1 + 1) / 3)
    everyone = retrieval(images, images.repeat(5, 1), torch.arange(4).repeat(5))
    assert (everyone["i2t"]["map"], everyone["t2i"]["map"]) == (100, 100)


def test_one_caption_where_five_are_expected() -> None:
    images, image_of_text = torch.eye(3), torch.tensor([0, 0, 1, 1, 2])
    texts = images[image_of_text]
    assert retrieval(images, texts, image_of_text)["min_texts_per_image"] == 1
    assert retrieval(images, texts[:4], image_of_text[:4])["min_texts_per_image"] == 2  # of those that have any
    with pytest.raises(ValueError, match=r"1 of 3 images have fewer than 2 captions, the first at row 2 with 1"):
        retrieval(images, texts, image_of_text, min_texts_per_image=2)


# Recall in percent of `recall_at_k` in clip_benchmark/metrics/zeroshot_retrieval.py of LAION-AI/CLIP_benchmark at
# 48de38c1689f, on the embeddings of `benchmarked`: (direction, k). With ties it depends on the order of the data: the
# mean over 3,000 random orders of images and texts, and that mean's standard error.
CLIP_BENCHMARK = {
    ("t2i", 1): 29.844961240310074, ("t2i", 5): 65.89147286821705, ("t2i", 10): 83.33333333333334,
    ("i2t", 1): 56.0, ("i2t", 5): 92.0, ("i2t", 10): 94.0,
}  # fmt: skip
CLIP_BENCHMARK_TIED = {
    ("t2i", 1): (22.80672, 0.04789), ("t2i", 5): (49.92158, 0.03573), ("t2i", 10): (58.72881, 0.02891),
    ("i2t", 1): (27.314, 0.09323), ("i2t", 5): (67.94533, 0.08911), ("i2t", 10): (83.66667, 0.07390),
}  # fmt: skip


def benchmarked(tied: bool) -> tuple[Tensor, Tensor, Tensor]:
    """50 images with five or six captions; from numpy's legacy generator, whose numbers never change."""
    draws = np.random.RandomState(7)
    image_of_text = draws.permutation(np.concatenate([np.arange(50).repeat(5), np.arange(0, 50, 7)]))
    if tied:
        images = draws.randint(-1, 2, (50, 4))
        same = draws.rand(len(image_of_text), 1) < 0.5
        texts = np.where(same, images[image_of_text], draws.randint(-1, 2, (len(image_of_text), 4)))
    else:
        images = draws.randn(50, 16)
        texts = images[image_of_text] + 2 * draws.randn(len(image_of_text), 16)
    return torch.tensor(images).float(), torch.tensor(texts).float(), torch.tensor(image_of_text)


def test_recall_of_clip_benchmark() -> None:
    scores = retrieval(*benchmarked(tied=False))
    for (direction, k), expected in CLIP_BENCHMARK.items():
        assert scores[direction][f"r@{k}"] == pytest.approx(expected, abs=1e-9), (direction, k)


def test_recall_of_clip_benchmark_averaged_over_orders_of_ties() -> None:
    scores = retrieval(*benchmarked(tied=True))
    for (direction, k), (mean, error) in CLIP_BENCHMARK_TIED.items():
        assert scores[direction][f"r@{k}"] == pytest.approx(mean, abs=4 * error), (direction, k)
