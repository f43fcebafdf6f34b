"""`masters`: which of the teacher's weights are left out and when; all else is `token_kd`."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cmapkd.config import ConfigError
from cmapkd.methods import StepInfo
from cmapkd.models.thinned import Thinned
from writers import assert_same, batch_of, loss_of, make_judge, make_task, make_writer


def test_each_matrix_loses_its_smallest_weights_and_gets_them_back() -> None:
    model = make_writer(seed=7)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    thinned = Thinned(model, ("vision", "projector", "language"))
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    assert len(thinned.names) == len(linears) - 1  # all but the head, which is the table of words
    for share in (0.2, 0.15, 0.45):
        thinned.to(share)
        for name in thinned.names:
            now, whole = model.get_parameter(name), before[name]
            zeros = now == 0
            assert int(zeros.sum()) == int(share * whole.numel() + 1e-9)
            assert whole[zeros].abs().max() < whole[~zeros].abs().min()
            assert torch.equal(now[~zeros], whole[~zeros])
        same = {name for name, value in model.state_dict().items() if torch.equal(value, before[name])}
        assert same >= before.keys() - set(thinned.names)
    thinned.to(0.0)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert not thinned._whole
    with pytest.raises(ConfigError, match="has no part 'tower' to thin"):
        Thinned(model, ("tower",))
    with pytest.raises(ConfigError, match="no linear layer in embeddings"):
        Thinned(model, ("embeddings",))


def test_the_share_falls_in_equal_parts_of_the_run() -> None:
    config = make_task("masters").config
    shares = [config.share(StepInfo(step, 10)) for step in range(10)]  # type: ignore[attr-defined]
    assert shares == pytest.approx([0.2, 0.2, 0.15, 0.15, 0.1, 0.1, 0.05, 0.05, 0, 0])
    other = make_task("masters", thin_from=0.3, thin_step=0.2, snapshots=3).config
    assert [other.share(StepInfo(step, 3)) for step in range(3)] == pytest.approx([0.3, 0.1, 0])  # type: ignore[attr-defined]


def test_it_is_token_kd_of_a_thinned_teacher() -> None:
    """Also in the last part of the run, where the teacher is whole again."""
    for step, share in ((2, 0.2), (5, 0.1), (9, 0.0)):
        judge = make_judge()
        Thinned(judge.model, ("vision", "projector", "language")).to(share)
        plain = make_task("token_kd", teacher=judge, divergence="jsd", answers_weight=0)
        task = make_task("masters")
        found = {}
        for method in (plain, task):
            terms = method(batch_of(method), StepInfo(step if step != 2 else 1, 10))
            loss_of(terms).backward()
            values = {name: term.value.detach() for name, term in terms.items()}
            found[method] = values | {n: p.grad for n, p in method.named_parameters() if p.grad is not None}
        assert_same(found[task], found[plain])
        assert float(task.measurements["thinned"]) == pytest.approx(share)


def test_a_teacher_that_is_always_whole_is_another_method_s() -> None:
    for settings, message in (
        ({"thin_from": 0}, "set method: token_kd"),
        ({"thin_from": 1.0}, "thin_from"),
        ({"thin_parts": []}, "thin_parts"),
        ({"thin_parts": ["head"]}, "thin_parts"),
        ({"snapshots": 1, "thin_step": 0.1}, r"snapshots: 1 is one part, so thin_step 0.1 is not read"),
    ):
        with pytest.raises(ConfigError, match=message):
            make_task("masters", **settings)  # type: ignore[arg-type]
