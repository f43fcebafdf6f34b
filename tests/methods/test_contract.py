"""The contract of methods: steps, terms with counts, momentum teachers, and which parts learn."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cmapkd.config import ConfigError
from cmapkd.methods import StepInfo, Term
from cmapkd.methods.micro_batches import map_rows
from cmapkd.methods.terms import divided
from cmapkd.models import MomentumTeacher
from cmapkd.models.average import follow
from cmapkd.training.checkpoint import list_checkpoints, read_checkpoint
from contracted import Contracted, NormedStudent
from helpers import make_method, make_model, make_trainer, random_batch


def test_a_term_with_a_count_is_divided_once() -> None:
    terms = {
        "plain": Term(torch.tensor(3.0), 2.0),
        "counted": Term(torch.tensor(6.0, requires_grad=True), 0.5, torch.tensor(4)),
        "of nothing": Term(torch.tensor(0.0), 1.0, torch.tensor(0)),
    }
    found = divided(terms)
    assert list(found) == list(terms)
    assert [float(term.value.detach()) for term in found.values()] == [3.0, 1.5, 0.0]
    assert [term.weight for term in found.values()] == [2.0, 0.5, 1.0]
    assert all(term.count is None for term in found.values())
    found["counted"].value.backward()
    assert float(terms["counted"].value.grad) == 0.25


def test_draws_belong_to_seed_step_and_name() -> None:
    def draw(name: str, **info: Any) -> list[float]:
        return torch.rand(3, generator=StepInfo(**info).generator(name)).tolist()

    before = torch.get_rng_state()
    assert draw("a", step=3, seed=1) == draw("a", step=3, seed=1, total=9, progress=0.5)
    others = [draw("b", step=3, seed=1), draw("a", step=4, seed=1), draw("a", step=3, seed=2)]
    assert draw("a", step=3, seed=1) not in others
    assert len({tuple(each) for each in others}) == 3
    assert torch.equal(torch.get_rng_state(), before)


def test_rows_are_any_tree_of_tensors() -> None:
    tree = {"a": torch.ones(2), "b": {"c": torch.zeros(3)}}
    joined = map_rows(lambda *rows: torch.cat(rows), tree, tree)
    assert {key: value.shape for key, value in (("a", joined["a"]), ("c", joined["b"]["c"]))} == {"a": (4,), "c": (6,)}
    with pytest.raises(TypeError, match="not list"):
        map_rows(torch.neg, [torch.ones(1)])


def test_micro_batches_give_the_same_terms_and_gradients() -> None:
    found = []
    for size in (None, 3):
        method, batch = make_method(Contracted).double().train(), random_batch(8, dtype=torch.float64)
        method.micro_batch = size
        terms = method(batch, StepInfo(step=2))
        torch.stack([term.weight * term.value for term in terms.values()]).sum().backward()
        found.append([term.value for term in terms.values()] + [p.grad for p in method.parameters() if p.requires_grad])
    for whole, parts in zip(*found, strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-9, atol=1e-12)


def test_a_momentum_teacher_is_the_average_written_out() -> None:
    torch.manual_seed(0)
    student = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    student.register_buffer("mask", torch.full((2,), -math.inf))
    student.register_buffer("ids", torch.arange(4))
    average = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    average.register_buffer("mask", torch.zeros(2))
    average.register_buffer("ids", torch.zeros(4, dtype=torch.long))
    expected = {
        key: 0.9 * old + 0.1 * student.state_dict()[key]
        for key, old in average.state_dict().items()
        if key not in ("mask", "ids", "1.num_batches_tracked")
    }
    student(torch.randn(4, 3))
    expected["1.running_mean"] = 0.1 * student[1].running_mean
    expected["1.running_var"] = 0.9 * average[1].running_var + 0.1 * student[1].running_var
    follow(average, student, 0.9)
    for key, value in expected.items():
        torch.testing.assert_close(average.state_dict()[key], value)
    assert torch.equal(average.mask, student.mask)
    assert torch.equal(average.ids, student.ids)
    assert int(average[1].num_batches_tracked) == 1


def test_the_decay_of_a_momentum_teacher_rises_to_one() -> None:
    student = make_model()
    constant, cosine = MomentumTeacher(student, decay=0.9), MomentumTeacher(student, decay=0.9, schedule="cosine")
    assert [constant.decay_at(step, 10) for step in (0, 9)] == [0.9, 0.9]
    assert cosine.decay_at(0, 10) == pytest.approx(0.9)
    assert cosine.decay_at(5, 10) == pytest.approx(0.95)
    assert cosine.decay_at(10, 10) == pytest.approx(1.0)
    with pytest.raises(ValueError, match=r"decay of a momentum teacher is 1.5: give a number from 0 to 1"):
        MomentumTeacher(student, decay=1.5)


def test_a_momentum_teacher_of_decay_one_stays_as_the_student_began() -> None:
    student = make_model()
    teacher = MomentumTeacher(student, decay=1.0)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1.0)
    teacher.update(student, 0, 10)
    for name, value in teacher.model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_momentum_teacher_is_in_checkpoints_once_and_never_optimised(tmp_path: Path) -> None:
    student = make_model(kind=NormedStudent)
    trained = make_trainer(tmp_path, make_method(Contracted, student=student), steps=3, checkpoint_every=3)
    result = trained.run()
    tensors, _ = read_checkpoint(list_checkpoints(tmp_path / "checkpoints")[-1])
    held = [key for key in tensors["method"] if key.startswith("momentum.")]
    assert len(held) == len(student.state_dict())
    assert not any("momentum" in key for key in result.student.state_dict())
    optimised = {id(p) for group in trained.engine.optimizer.param_groups for p in group["params"]}
    method = trained.method
    assert isinstance(method, Contracted)
    assert not any(
        id(parameter) in optimised or parameter.grad is not None for parameter in method.momentum.parameters()
    )
    assert method.training
    assert not any(module.training for module in method.momentum.modules())
    ours, theirs = student.state_dict(), method.momentum.model.state_dict()
    assert any(not torch.equal(ours[key], theirs[key]) for key in ours)
    assert torch.equal(ours["norm.num_batches_tracked"], theirs["norm.num_batches_tracked"])


@pytest.mark.parametrize("parts", [("image",), ("text",), ("projections", "scale")])
def test_only_the_named_parts_learn(parts: tuple[str, ...], tmp_path: Path) -> None:
    student = make_model()
    before = {name: parameter.detach().clone() for name, parameter in student.named_parameters()}
    trained = make_trainer(tmp_path, make_method("clip_kd", student=student), steps=3, train_parts=parts)
    trained.run()
    changed = {name for name, parameter in student.named_parameters() if not torch.equal(parameter, before[name])}
    wanted = frozenset().union(*(student.parts[part] for part in parts))
    assert changed
    assert changed <= wanted
    assert all(
        f"student.{name}" not in {n for n, p in trained.method.named_parameters() if p.requires_grad}
        for name in before
        if name not in wanted
    )


def test_a_frozen_part_has_no_graph(tmp_path: Path) -> None:
    method = make_method("contrastive")
    method.train_only(["text"])
    inputs = random_batch(4).inputs["student"]
    assert method.student.encode_image(inputs.images).embedding.grad_fn is None
    assert method.student.encode_text(inputs.texts).embedding.grad_fn is not None


def test_statistics_of_a_frozen_part_stay(tmp_path: Path) -> None:
    student = make_model(kind=NormedStudent)
    make_trainer(tmp_path, make_method("contrastive", student=student), steps=2, train_parts=("text",)).run()
    assert not student.norm.running_mean.any()


def test_parts_that_a_student_lacks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train_parts has 'imge' \(did you mean 'image'\?\).*it has: image, text"):
        make_trainer(tmp_path, train_parts=("imge",))
    method = make_method("contrastive")
    method.student.requires_grad_(False)
    with pytest.raises(ConfigError, match="has nothing that learns"):
        make_trainer(tmp_path, method, train_parts=("text",))


def test_a_momentum_teacher_may_average_some_parts_alone() -> None:
    student = make_model()
    teacher = MomentumTeacher(student, decay=0.5, parts=("projections",))
    before = {name: value.clone() for name, value in teacher.model.state_dict().items()}
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1.0)
    teacher.update(student, 0, 10)
    for name, value in teacher.model.named_parameters():
        kept = 0.5 if name in student.parts["projections"] else 1.0
        torch.testing.assert_close(value, before[name] + kept)
    with pytest.raises(ValueError, match=r"has no part 'projection' \(did you mean 'projections'\?\)"):
        MomentumTeacher(student, parts=("projection",))


class Forgotten(Contracted):
    """Its momentum teacher is a submodule that nobody moves."""

    def __init__(self, config: Any, **models: Any) -> None:
        super().__init__(config, **models)
        del self.teachers[self.momentum.role]


def test_a_momentum_teacher_that_would_never_move_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Forgotten has 1 momentum teachers as submodules and 0 in `teachers`"):
        make_trainer(tmp_path, make_method(Forgotten))


def test_a_frozen_logit_scale_stays_as_it_is(tmp_path: Path) -> None:
    student = make_model()
    with torch.no_grad():
        student.log_logit_scale.fill_(4.77)  # above the range to which a learning one is held
    make_trainer(tmp_path, make_method("contrastive", student=student), steps=2, train_parts=("image",)).run()
    assert float(student.log_logit_scale) == pytest.approx(4.77)


def test_a_method_of_momentum_alone_encodes_with_its_first_teacher() -> None:
    method, batch = make_method(Contracted), random_batch(4)
    expected = method.encode_teachers(batch)["momentum"].image.embedding
    assert torch.equal(method.encode_teacher(batch).image.embedding, expected)
    student, teacher, rows = method.encode_both(batch, lambda _part, ours, theirs: {"sum": ours.image.embedding.sum(1)})
    assert torch.equal(teacher.image.embedding, expected)
    torch.testing.assert_close(rows["sum"], student.image.embedding.sum(1))


def test_frozen_parts_stay_frozen_when_a_smaller_student_is_resumed(tmp_path: Path) -> None:
    def trainer(out: Path) -> Any:
        settings = {"masks": {"sparsity": [0.3], "choice": "random"}}
        return make_trainer(out, make_method("tinyclip", settings=settings), steps=8, train_parts=("image",))

    whole, cut = trainer(tmp_path / "whole"), trainer(tmp_path / "cut")
    whole.run()
    step = cut._step

    def until(batch: Any) -> Any:
        if cut.progress.step == 6:
            cut._save()
            raise KeyboardInterrupt
        return step(batch)

    cut._step = until
    with pytest.raises(KeyboardInterrupt):
        cut.run()
    again = trainer(tmp_path / "cut")
    again.run(resume=True)
    for name, value in whole.method.state_dict().items():
        assert torch.equal(again.method.state_dict()[name], value), name
