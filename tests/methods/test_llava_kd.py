"""LLaVA-KD: terms in plain loops, the published functions' numbers, its stages, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from written_out import divergence, reduced, rows_of

from cmapkd.config import ConfigError
from cmapkd.data.types import Batch
from cmapkd.features.visual_rows import beside, by_pictures, check_visual_tokens
from cmapkd.methods import StageConfig
from cmapkd.methods.llava_kd import LlavaKD
from cmapkd.models.token_types import LogitHead, Rows, TokenFeatures
from cmapkd.objectives import token_relation_distance
from writers import assert_same, batch_of, loss_of, make_judge, make_run, make_task, make_writer, results

PUBLISHED = json.loads((Path(__file__).parent / "fixtures" / "llava_kd.json").read_text())
EQUAL = {"image_size": 16}  # a teacher whose pictures have as many visual tokens as the student's


def tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def task(**settings: Any) -> LlavaKD:
    method = make_task("llava_kd", **settings)
    assert isinstance(method, LlavaKD)
    return method


# ------------------------------------------------------------------------------------------------ written out


def cosine(one: Tensor, other: Tensor) -> Tensor:
    return (one * other).sum() / (one.square().sum().sqrt() * other.square().sum().sqrt())


def relation(student: Tensor, teacher: Tensor) -> Tensor:
    """Of the tokens of one picture."""
    tables = [torch.stack([torch.stack([cosine(a, b) for b in rows]) for a in rows]) for rows in (student, teacher)]
    return 1 - cosine(*tables)


def coarser(states: Tensor) -> Tensor:
    """A grid of 3 x 3 tokens as one of 2 x 2, each the mean of the four cells that it touches."""
    if len(states) != 9:
        return states
    grid = states.view(3, 3, -1)
    return torch.stack([grid[i : i + 2, j : j + 2].flatten(0, 1).mean(0) for i in range(2) for j in range(2)])


def seen_by(model: Any, inputs: Any, level: str) -> list[tuple[Tensor, Tensor]]:
    """Of each dialogue final states at visual tokens, and what `relation_level` reads there; by the library alone."""
    found = []
    for number in range(len(inputs)):
        alone = inputs.rows([number])
        states = model.model.model(**model.arguments(alone)).last_hidden_state[0][alone.visual[0]]
        fed = states
        if level == "projector" and len(states):
            fed = model.model.model.get_image_features(alone.pictures["pixel_values"], return_dict=True).pooler_output
            fed = torch.cat(list(fed)).reshape(-1, states.shape[-1])
        found.append((states, fed))
    return found


def written_out(method: LlavaKD, batch: Batch) -> dict[str, Tensor]:
    config, judge, writer = method.config, method.teacher, method.student
    assert judge is not None
    own_head: Any = writer.model
    settings = config.model_dump()
    size = method.student.vocabulary.size
    student = rows_of(method.student, batch.inputs["student"])  # type: ignore[arg-type]
    own = seen_by(method.student, batch.inputs["student"], config.relation_level)
    with torch.no_grad():
        teacher = rows_of(judge.model, batch.inputs["teacher"])  # type: ignore[arg-type]
        theirs = seen_by(judge.model, batch.inputs["teacher"], config.relation_level)
    their_head = judge.model.model.lm_head.weight[:size].detach()
    ce = [[-row.log_softmax(-1)[token] for row, token in zip(*each, strict=True)] for each in student]
    kd = [
        [divergence(ours, other, settings) for ours, other in zip(mine[0], judged[0], strict=True)]
        for mine, judged in zip(student, teacher, strict=True)
    ]
    seen = [pair for pair in zip(own, theirs, strict=True) if len(pair[0][0])]
    visual = [
        [
            divergence(own_head.lm_head.weight[:size] @ ours, their_head @ other, settings)
            for ours, other in zip(mine[0], coarser(judged[0]), strict=True)
        ]
        for mine, judged in seen
    ]
    relations = [relation(mine[1], coarser(judged[1])) for mine, judged in seen]
    terms = {"answers": reduced(ce, config.reduction), "distillation": reduced(kd, config.reduction)}
    terms["visual"] = reduced(visual, config.reduction)
    if config.reduction == "batch_sum":
        terms["visual"] = terms["visual"] * len(visual) / len(batch)
    terms["relation"] = torch.stack(relations).mean()
    return {name: terms[name] for name in method.term_names}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"divergence": "skew_reverse", "skew": 0.2, "relation_level": "projector", "reduction": "sample_mean"},
        {"divergence": "jsd", "beta": 0.3, "reduction": "batch_sum", "answers_weight": 0.0, "form": "one_stage"},
    ],
    ids=str,
)
def test_terms_and_gradients_are_the_sums_written_out(settings: dict[str, Any]) -> None:
    """Of pictures whose grids of visual tokens differ between both models, and of a dialogue without a picture."""
    method = task(**settings)
    batch = batch_of(method, range(4))
    found = results(method, batch)
    method.zero_grad()
    terms = written_out(method, batch)
    sum(method.weights[name] * value for name, value in terms.items()).backward()  # type: ignore[union-attr]
    expected = {f"term/{name}": value.detach() for name, value in terms.items()}
    expected |= {f"gradient/{name}": p.grad for name, p in method.named_parameters() if p.grad is not None}
    assert any("vision" in key for key in expected)
    assert_same(found, expected, 1e-8)  # norms of layers are in float32, over other paddings


@pytest.mark.parametrize("level", ["language", "projector"])
def test_micro_batches_are_the_batch(level: str) -> None:
    whole, parts = (results(task(relation_level=level), micro_batch=size) for size in (None, 4))
    assert_same(parts, whole)


def test_dialogues_without_pictures_have_no_visual_terms() -> None:
    method = task()
    found = method(batch_of(method, [3]))
    assert float(found["visual"].value.detach()) == float(found["relation"].value.detach()) == 0
    loss_of(found).backward()
    alone = make_task("token_kd")
    for name, gradient in results(alone, batch_of(alone, [3])).items():
        if name.startswith("gradient/"):
            learned = dict(method.named_parameters())[name.removeprefix("gradient/")].grad
            torch.testing.assert_close(learned, gradient)


# ------------------------------------------------------------------------------------------------ relations


def test_relations_are_cosines_of_cosines() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 4, 3, dtype=torch.float64), torch.randn(2, 4, 5, dtype=torch.float64)
    found = token_relation_distance(student, teacher)
    expected = torch.stack([relation(*pair) for pair in zip(student, teacher, strict=True)])
    torch.testing.assert_close(found, expected)
    assert gradcheck(lambda s: token_relation_distance(s, teacher), student.requires_grad_())
    turned = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64)).Q
    assert float(token_relation_distance(3 * teacher @ turned, teacher).abs().max()) < 1e-12
    with pytest.raises(ValueError, match="same pictures and tokens"):
        token_relation_distance(student[:, :3], teacher)


def test_cosines_are_the_published_ones() -> None:
    for who, rows in PUBLISHED["features"].items():
        unit = torch.nn.functional.normalize(tensor(rows), dim=-1)
        torch.testing.assert_close(unit @ unit.mT, tensor(PUBLISHED["cosines"][who]))
    student, teacher = (tensor(PUBLISHED["features"][who]) for who in ("student", "teacher"))
    own, theirs = (tensor(PUBLISHED["cosines"][who]).flatten(1) for who in ("student", "teacher"))
    expected = 1 - (own * theirs).sum(-1) / (own.norm(dim=-1) * theirs.norm(dim=-1))
    torch.testing.assert_close(token_relation_distance(student, teacher), expected, rtol=1e-12, atol=1e-12)


# ------------------------------------------------------------------------------------------------ published code


class Published:
    """The fixture's logits as final states behind a head that changes nothing."""

    def __init__(self, who: str) -> None:
        self.states = {where: tensor(values).requires_grad_() for where, values in PUBLISHED[who].items()}
        number = len(PUBLISHED["labels"])
        learned = [row for row in range(number) if PUBLISHED["labels"][row] != -100]
        visual = torch.arange(8)
        answer = Rows(self.states["answer"][learned], torch.tensor([0, 1, 1]), torch.tensor(learned))
        self.features = TokenFeatures(
            {"answer": answer, "visual": Rows(self.states["visual"], visual // 4, visual % 4)},
            torch.tensor([PUBLISHED["labels"][row] for row in learned]),
            LogitHead(torch.eye(7, dtype=torch.float64)),
        )


@pytest.mark.parametrize("case", PUBLISHED["cases"], ids=lambda case: f"{case['function']}, {case['where']}")
def test_divergences_are_the_published_ones(case: dict[str, Any]) -> None:
    method = task(**case["ours"])
    student, teacher = Published("student"), Published("teacher")
    batch = batch_of(method, [0, 1])
    method.visual_counts = lambda part: ([4, 4], [4, 4])  # type: ignore[method-assign]
    found = method.sums(batch, student.features, teacher.features)
    name = {"answer": "distillation", "visual": "visual"}[case["where"]]
    loss = found[name].total / found[name].number
    (gradient,) = torch.autograd.grad(loss, student.states[case["where"]])
    expected = case["value"]
    if case["form"] == "cross_entropy":  # with the teacher, whose entropy is left out here
        kept = teacher.features.hidden[case["where"]].values.detach()
        expected += float((kept.softmax(-1) * kept.log_softmax(-1)).sum(-1).mean())
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-6)
    torch.testing.assert_close(gradient, tensor(case["gradient"]), rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------------------ stages


def test_three_stages_have_their_terms_and_parts() -> None:
    method = task()
    names = [f"student.{name}" for name, _ in method.student.named_parameters()]
    asked, parts = [], []
    read = method.read_teacher

    def noted(part: Batch, role: str | None = None) -> TokenFeatures | None:
        asked.append(len(part))
        return read(part, role)

    method.read_teacher = noted  # type: ignore[method-assign]
    for stage in method.default_stages:
        method.enter(stage)
        before = len(asked)
        assert tuple(method(batch_of(method))) == (("answers",) if stage.name == "fine-tuning" else method.term_names)
        assert len(asked) - before == (stage.name != "fine-tuning")
        learned = {name for name, each in method.named_parameters() if each.requires_grad}
        parts.append(
            {part for part, own in method.student.parts.items() if {f"student.{name}" for name in own} & learned}
        )
        assert learned <= set(names)
    assert parts == [{"projector"}, *[{"projector", "embeddings", "language"}] * 2]
    assert sum(stage.share or 0 for stage in method.default_stages) == pytest.approx(1)
    assert task(form="one_stage").default_stages == ()


def test_a_level_is_read_only_where_a_stage_compares_it() -> None:
    method = task(relation_level="projector")
    assert method.student_needs.projected
    assert "visual" in method.student_needs.where
    for terms, where, projected in (
        (("relation",), {"answer"}, True),
        (("visual",), {"answer", "visual"}, False),
        (("answers", "distillation"), {"answer"}, False),
    ):
        method.enter(StageConfig(name="a", steps=1, terms=terms))
        assert set(method.teacher_needs.where) == where
        assert method.teacher_needs.projected is projected


def test_the_relation_alone_brings_cosines_to_the_teachers(tmp_path: Path) -> None:
    """What the term is for: it falls, and the tokens that the language model is fed with relate as the teacher's do."""
    settings = {"answers_weight": 0.0, "distill_weight": 0.0, "visual_weight": 0.0, "form": "one_stage"}
    method = task(teacher=make_judge(**EQUAL), relation_level="projector", **settings)
    batch = batch_of(method)
    before = float(method(batch)["relation"].value.detach())
    make_run(tmp_path, method, steps=8).run()
    assert float(method.train()(batch)["relation"].value.detach()) < 0.95 * before


# ------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"visual_weight": 0, "relation_weight": 0}, "set method: token_kd"),
        ({"answers_weight": 0}, "or set form: one_stage"),
        ({"beta": 0.3}, "beta is read by divergence jsd alone"),
        ({"relation_level": "vision"}, "relation_level"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        task(**settings)


def test_a_cache_is_refused_with_the_reason() -> None:
    assert "at visual tokens" in str(task().not_cached)


def test_grids_that_are_no_squares_are_refused_before_the_first_step() -> None:
    def reader(count: int) -> Any:
        item = SimpleNamespace(visual=torch.ones(count, dtype=torch.bool))
        return SimpleNamespace(name=f"reads {count}", processor=SimpleNamespace(read=lambda *_: item))

    check_visual_tokens(reader(6), reader(6))
    check_visual_tokens(reader(4), reader(9))
    with pytest.raises(
        ConfigError, match=r"reads 6 visual tokens .* and its teacher reads 9 9: .*take method token_kd"
    ):
        check_visual_tokens(reader(6), reader(9))
    rows = Rows(torch.zeros(6, 2), torch.zeros(6, dtype=torch.long), torch.arange(6))
    with pytest.raises(ValueError, match="the student has 4 visual tokens and the teacher 6"):
        beside(rows, [4], [6])


def test_pictures_of_other_sizes_are_compared_apart() -> None:
    values = torch.arange(14.0)[:, None]
    tables = by_pictures(values, 2 * values, [4, 0, 6, 4])
    assert [tuple(own.shape) for own, _ in tables] == [(2, 4, 1), (1, 6, 1)]
    assert tables[0][0][1, :, 0].tolist() == [10, 11, 12, 13]
    assert torch.equal(tables[1][1], 2 * tables[1][0])


def test_a_student_may_have_tokens_of_its_own() -> None:
    """Its head and the teacher's are cut to the tokens that both have, behind visual tokens as behind answers."""
    method = task(student=make_writer(extra=3))
    assert method.num_tokens == make_judge().model.vocabulary.size
    found = method(batch_of(method, [0, 1]))
    assert torch.isfinite(loss_of(found))
