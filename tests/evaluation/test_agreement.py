"""Agreement: the definitions in plain loops, the invariants, and what must not be compared."""

from __future__ import annotations

import pytest
import torch

from cmapkd.evaluation.agreement import linear_cka, prediction_agreement, rank_agreement, ranks, spearman


def slow_ranks(values: list[float]) -> list[float]:
    return [
        sum(other < value for other in values) + (sum(other == value for other in values) + 1) / 2 for value in values
    ]


def test_ranks_share_the_places_of_ties() -> None:
    draws = torch.randint(0, 4, (6, 9), generator=torch.Generator().manual_seed(0)).float()
    assert ranks(draws).tolist() == [slow_ranks(row) for row in draws.tolist()]


def test_spearman_is_pearson_of_the_ranks() -> None:
    draws = torch.Generator().manual_seed(0)
    a, b = torch.randint(0, 5, (3, 20), generator=draws).float(), torch.randn(3, 20, generator=draws)
    for row, value in enumerate(spearman(a, b).tolist()):
        both = torch.stack([torch.tensor(slow_ranks(each[row].tolist())) for each in (a, b)])
        assert value == pytest.approx(float(torch.corrcoef(both)[0, 1]), abs=1e-6)


def test_spearman_sees_order_and_nothing_else() -> None:
    x = torch.randn(2, 30, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(spearman(x, x.exp() * 3 + 1), torch.ones(2).double())
    assert torch.allclose(spearman(x, -x), -torch.ones(2).double())
    assert bool(spearman(x, torch.ones_like(x)).isnan().all())


def test_rank_agreement_in_blocks_equals_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    draws = torch.Generator().manual_seed(0)
    q, c, tq, tc = (torch.randn(n, d, generator=draws) for n, d in ((7, 4), (11, 4), (7, 6), (11, 6)))
    whole = rank_agreement(q, c, tq, tc)
    monkeypatch.setattr("cmapkd.evaluation.agreement._BLOCK_SCORES", 22)
    assert rank_agreement(q, c, tq, tc) == pytest.approx(whole)
    assert whole["rank_correlation"] == pytest.approx(float(spearman(q @ c.T, tq @ tc.T).mean()))
    assert whole["top1"] == pytest.approx(100 * float(((q @ c.T).argmax(1) == (tq @ tc.T).argmax(1)).float().mean()))
    assert rank_agreement(q, c, q, c) == {"rank_correlation": pytest.approx(1), "top1": 100}
    with pytest.raises(ValueError, match="7 x 11, the teacher 6 x 11"):
        rank_agreement(q, c, tq[:6], tc)


def test_linear_cka_is_the_kernel_definition() -> None:
    draws = torch.Generator().manual_seed(0)
    x, y = torch.randn(12, 5, generator=draws).double(), torch.randn(12, 3, generator=draws).double()
    centre = torch.eye(12).double() - 1 / 12
    k, m = centre @ x @ x.T @ centre, centre @ y @ y.T @ centre
    expected = (k * m).sum() / (k.norm() * m.norm())
    assert linear_cka(x, y) == pytest.approx(float(expected))


def test_linear_cka_is_blind_to_rotation_scale_and_shift() -> None:
    draws = torch.Generator().manual_seed(0)
    x, y = torch.randn(30, 6, generator=draws), torch.randn(30, 4, generator=draws)
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=draws)).Q
    assert linear_cka(x, 3 * x @ rotation + 2) == pytest.approx(1, abs=1e-5)
    assert linear_cka(x, y) == pytest.approx(linear_cka(y, 5 * x @ rotation), abs=1e-6)
    assert 0 < linear_cka(x, y) < 0.7
    with pytest.raises(ValueError, match="two or more"):
        linear_cka(x[:1], y[:1])


def test_predictions_alike_and_alike_in_error() -> None:
    classes = torch.eye(3)
    teacher, student = classes[[0, 1, 2, 1]], classes[[0, 1, 1, 1]]
    scores = prediction_agreement(student, classes, teacher, classes, torch.tensor([0, 1, 1, 2]))
    assert scores == {"top1": 75, "top1_where_teacher_errs": 50}
