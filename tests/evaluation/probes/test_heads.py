"""The heads: what they learn, what they must not see, and the geometry of the detector by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from cmapkd.data.types import QuestionAnswer
from cmapkd.evaluation.probes.decoder import END, PAD, START, UNKNOWN, DecoderHead, WordTokenizer
from cmapkd.evaluation.probes.detector import CellPositions, DetectorHead, assign, centredness
from cmapkd.evaluation.probes.fusion import FusionHead, answer_shares, frequent_answers
from cmapkd.evaluation.probes.probe import HeadInput


def head_input(batch: int = 3, *, cells: int = 4, width: int = 10, dim: int = 6, tokens: int = 5) -> HeadInput:
    draws = torch.Generator().manual_seed(batch)
    mask = torch.arange(tokens)[None] < torch.tensor([tokens, 2, 3])[:batch, None]
    return HeadInput(
        torch.randn(batch, cells, width, generator=draws),
        torch.randn(batch, dim, generator=draws),
        torch.randn(batch, tokens, 8, generator=draws),
        mask,
        torch.randn(batch, dim, generator=draws),
    )


def fusion(answers: int = 3) -> FusionHead:
    torch.manual_seed(0)
    return FusionHead(patch_width=10, embed_dim=6, cells=4, text_width=8, answers=answers, width=32, depth=2)


def decoder(words: int = 20, length: int = 6) -> DecoderHead:
    torch.manual_seed(0)
    return DecoderHead(patch_width=10, embed_dim=6, cells=4, words=words, length=length, width=32, depth=2)


def detector(names: torch.Tensor, *, scales: tuple[float, ...] = (2.0, 1.0, 0.5)) -> DetectorHead:
    torch.manual_seed(0)
    return DetectorHead(
        patch_width=10, embed_dim=names.shape[1], grid=(2, 2), names=names, scales=scales, width=32, depth=1
    )


def test_padding_of_a_question_changes_no_answer() -> None:
    head, given = fusion(), head_input()
    padded = F.pad(given.tokens, (0, 0, 0, 4), value=9.0), F.pad(given.mask, (0, 4))
    longer = replace(given, tokens=padded[0], mask=padded[1])
    torch.testing.assert_close(head(longer), head(given))
    assert given.tokens is not None
    for changes in ({"tokens": given.tokens.flip(-1)}, {"text_embedding": -given.text_embedding}):
        assert not torch.allclose(head(replace(given, **changes)), head(given), atol=1e-4)


def test_fusion_loss_is_soft_cross_entropy_written_out() -> None:
    head, given = fusion(), head_input()
    targets = {
        "answers": torch.tensor([[0, 2], [1, 0], [2, 0]]),
        "shares": torch.tensor([[0.7, 0.3], [1, 0], [1.0, 0]]),
    }
    log_p = head(given).log_softmax(-1)
    expected = -(0.7 * log_p[0, 0] + 0.3 * log_p[0, 2] + log_p[1, 1] + log_p[2, 2]) / 3
    torch.testing.assert_close(head.loss(given, targets), expected)


def test_answers_by_frequency_and_their_shares() -> None:
    asked = [
        QuestionAnswer("a", ("Yes",)),
        QuestionAnswer("b", ("yes", "yes", "no", "maybe")),
        QuestionAnswer("c", ("2", "two")),
        QuestionAnswer("d", ("green",)),
    ]

    def normalise(text: str) -> str:
        return {"two": "2"}.get(text.lower(), text.lower())

    answers = frequent_answers(asked, most=3, normalise=normalise)
    assert answers == ("yes", "2", "green")  # 1.5, 1, 1; 2 before green as the alphabet has it
    numbers, shares = answer_shares(asked, answers, normalise=normalise)
    assert [dict(zip(n, s, strict=True)).get(0, 0) for n, s in zip(numbers.tolist(), shares.tolist(), strict=True)][
        :2
    ] == [1, 1]
    assert shares.sum(1).tolist() == [1, 1, 1, 1]
    _, none = answer_shares([QuestionAnswer("e", ("purple",))], answers, normalise=normalise)
    assert none.sum() == 0
    with pytest.raises(ValueError, match="1 different answers"):
        frequent_answers(asked[:1], most=3, normalise=normalise)


def test_words_are_lower_case_without_punctuation_and_cut() -> None:
    words = WordTokenizer(["A cat, the dog's cat.", "a CAT!"], most=50, length=3)
    ids = words(["A cat, a cat and more", "cat", "zebra"])
    assert ids.shape == (3, 5)
    assert [words.text(row) for row in ids.tolist()] == ["a cat a", "cat", ""]
    assert ids[0, 0] == START
    assert ids[0, -1] == END
    assert ids[1].tolist()[2:] == [END, PAD, PAD]
    assert ids[2, 1] == UNKNOWN
    assert words.text(words(["the dog's"])[0].tolist()) == "the dog's"
    assert len(WordTokenizer(["a b c d e f"], most=6, length=3)) == 6
    with pytest.raises(ValueError, match="no words"):
        WordTokenizer(["...", "!"], most=50, length=3)


def test_a_word_does_not_see_the_words_after_it() -> None:
    head, given = decoder(), head_input()
    ids = torch.tensor([[START, 5, 6, 7]] * 3)
    later = ids.clone()
    later[:, 3] = 9
    torch.testing.assert_close(head(given, ids)[:, :3], head(given, later)[:, :3])
    assert not torch.allclose(head(given, ids)[:, 3], head(given, later)[:, 3], atol=1e-4)
    other = HeadInput(given.patches + 1 * torch.randn(3, 4, 10), given.embedding)
    assert not torch.allclose(head(given, ids)[:, 0], head(other, ids)[:, 0], atol=1e-4)


def test_decoder_loss_leaves_padding_out() -> None:
    head, given = decoder(), head_input(2)
    words = torch.tensor([[START, 5, 6, END, PAD, PAD], [START, 7, END, PAD, PAD, PAD]])
    log_p = head(given, words).log_softmax(-1)
    expected = -(log_p[0, 0, 5] + log_p[0, 1, 6] + log_p[0, 2, END] + log_p[1, 0, 7] + log_p[1, 1, END]) / 5
    torch.testing.assert_close(head.loss(given, {"words": words}), expected)


def test_a_decoder_learns_to_say_what_it_sees() -> None:
    head, given = decoder(), head_input()
    words = torch.tensor([[START, 5, 6, END, PAD], [START, 7, END, PAD, PAD], [START, 8, 5, 9, END]])
    optimizer = torch.optim.AdamW(head.parameters(), lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        head.loss(given, {"words": words}).backward()
        optimizer.step()
    written = head.write(given, length=6)
    assert [row[: row.index(END)] for row in written] == [[5, 6], [7], [8, 5, 9]]


def positions() -> CellPositions:
    """A level of 4 x 4 cells and one of 2 x 2."""
    parts = []
    for level, side in enumerate((4, 2)):
        at = (torch.arange(side) + 0.5) / side
        y, x = torch.meshgrid(at, at, indexing="ij")
        parts.append(
            (torch.stack([x, y], -1).flatten(0, 1), torch.full((side**2, 2), 1 / side), torch.full((side**2,), level))
        )
    return CellPositions(*(torch.cat(column) for column in zip(*parts, strict=True)))


def test_boxes_go_to_their_level_and_to_the_cells_around_their_centre() -> None:
    small, large = [0.26, 0.26, 0.49, 0.49], [0.1, 0.1, 1.0, 1.0]
    boxes = torch.tensor([[small, large, [0.0, 0.0, 1.0, 1.0]]])
    owner = assign(positions(), boxes, torch.tensor([[True, True, False]]))[0]
    assert (owner == 0).nonzero().flatten().tolist() == [5]  # the cell that holds the small one's centre
    level_of_large = {int(positions().level[cell]) for cell in (owner == 1).nonzero().flatten()}
    assert level_of_large == {1}
    assert not (owner == 2).any()  # padding


def test_a_box_between_cells_is_not_lost_and_the_smaller_one_wins() -> None:
    tiny = [0.24, 0.24, 0.27, 0.27]  # holds no cell's centre
    assert (assign(positions(), torch.tensor([[tiny]]), torch.tensor([[True]])) == 0).sum() == 1
    wide, narrow = [0.05, 0.05, 0.70, 0.70], [0.2, 0.2, 0.55, 0.55]
    owner = assign(positions(), torch.tensor([[wide, narrow]]), torch.tensor([[True, True]]))[0]
    assert owner[5] == 1


def test_centredness_is_one_in_the_middle_and_zero_at_the_edge() -> None:
    box = torch.tensor([[0.0, 0.0, 0.4, 0.2]]).expand(3, 4)
    points = torch.tensor([[0.2, 0.1], [0.0, 0.1], [0.1, 0.1]])
    torch.testing.assert_close(centredness(points, box), torch.tensor([1.0, 0.0, (1 / 3) ** 0.5]))


def test_a_detector_finds_what_it_learned_and_names_it_by_any_text() -> None:
    """Two pictures with one box each; afterwards the classes are found by name, in any order and among others."""
    names = torch.eye(6)
    head, given = detector(names[:4]), head_input(2)
    targets = {
        "boxes": torch.tensor([[[0.1, 0.1, 0.5, 0.6], [0.0, 0, 0, 0]], [[0.4, 0.3, 0.9, 0.9], [0, 0, 0, 0]]]),
        "labels": torch.tensor([[0, -1], [1, -1]]),
    }
    optimizer = torch.optim.AdamW(head.parameters(), lr=5e-3)
    for _ in range(150):
        optimizer.zero_grad()
        head.loss(given, targets).backward()
        optimizer.step()
    new = F.normalize(names[2:3] + names[3:4], dim=-1)  # of what the known names are made of, as words are
    found = head.find(given, torch.cat([new, names[[1, 2, 0]]]), nms_iou=0.5, max_boxes=10)
    assert [int(each.classes[0]) for each in found] == [3, 1]  # class 0 now stands last, a new one first
    for each, truth in zip(found, targets["boxes"][:, 0], strict=True):
        torch.testing.assert_close(each.boxes[0], truth, atol=0.06, rtol=0)
        assert bool((each.scores.diff() <= 0).all())
        assert float(each.scores[0]) > 0.3


def test_a_picture_without_boxes_gives_a_finite_loss_with_gradient() -> None:
    names = F.normalize(torch.randn(2, 6), dim=-1)
    head, given = detector(names), head_input(2)
    loss = head.loss(given, {"boxes": torch.zeros(2, 1, 4), "labels": torch.full((2, 1), -1)})
    loss.backward()
    assert bool(loss.isfinite())
    assert head.shrink.weight.grad is not None


@pytest.mark.parametrize("scales", [(4.0, 2.0, 1.0, 0.5, 0.25), (1.0,)])
def test_every_cell_of_every_level_has_its_place(scales: tuple[float, ...]) -> None:
    head = detector(F.normalize(torch.randn(2, 6), dim=-1), scales=scales)
    cells = head(head_input(2), head.names)
    sides = [max(1, int(2 * scale)) for scale in scales]
    assert cells.boxes.shape[1] == sum(side**2 for side in sides) == len(head.positions(torch.device("cpu")).centres)


def test_one_class_has_a_name_too() -> None:
    name = F.normalize(torch.randn(1, 6), dim=-1)
    torch.testing.assert_close(detector(name).names, name)
