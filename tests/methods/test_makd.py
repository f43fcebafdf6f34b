"""MaKD against the published loss; how the teacher answers, what is refused, and a run that drops its questions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.autograd import gradcheck

from cmapkd.config import ConfigError
from cmapkd.data.dialogues import Turn, join_items
from cmapkd.features import sample_keys
from cmapkd.methods.makd import Makd
from cmapkd.methods.makd_config import MakdConfig
from cmapkd.methods.stages import WHOLE_RUN
from cmapkd.methods.targets import Answered
from cmapkd.models import FrozenTeacher
from cmapkd.models.asked_writer import AskedWriter
from cmapkd.objectives import answer_cross_entropy, answers_among
from cmapkd.run.prolong import check_longer
from helpers import make_method, make_teacher, make_trainer, random_batch, read_lines
from writers import make_writer

PUBLISHED = json.loads((Path(__file__).parent / "fixtures" / "makd.json").read_text())
GROUPS = {"colour": ["red", "green", "blue"], "form": ["round", "square"]}
ENTRIES = [entry for entries in GROUPS.values() for entry in entries]


def tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def makd(**settings: Any) -> Makd:
    method = make_method("makd", settings=settings)
    assert isinstance(method, Makd)
    return method


@pytest.mark.parametrize("case", PUBLISHED["cases"])
def test_terms_are_the_published_loss(case: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The published layer of classes and questions is here two heads on the same features."""
    task, questions = case["weights"]
    method = makd(task_weight=task, question_weight=questions).double()
    features, answers, number = tensor(case["features"]).requires_grad_(), tensor(case["answers"]), case["classes"]
    weight, bias = tensor(case["weight"]), tensor(case["bias"])
    head, other = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    head.weight, head.bias = torch.nn.Parameter(weight[:number]), torch.nn.Parameter(bias[:number])
    other.weight, other.bias = torch.nn.Parameter(weight[number:]), torch.nn.Parameter(bias[number:])
    method.student.heads["labels"], method.question_head = head, other
    monkeypatch.setattr(method, "features", lambda _batch: features)
    monkeypatch.setattr(method, "labels", lambda _batch: torch.tensor(case["labels"]))
    monkeypatch.setattr(method, "teacher_answers", lambda _batch: answers)
    terms = method.terms(random_batch(2))
    values = {name: (term.weight * term.value).item() for name, term in terms.items()}
    assert values == pytest.approx({"labels": case["loss_ce"], "questions": case["loss_makd"]}, rel=1e-12)
    sum(term.weight * term.value for term in terms.values()).backward()
    found = {
        "features": features.grad,
        "weight": torch.cat([head.weight.grad, other.weight.grad]),
        "bias": torch.cat([head.bias.grad, other.bias.grad]),
    }
    for name, expected in case["gradients"].items():
        torch.testing.assert_close(found[name], tensor(expected), rtol=1e-10, atol=1e-12, msg=name)


def own_vectors(method: Makd, template: str) -> Tensor:
    assert method.teacher is not None
    model = method.teacher.model
    with torch.no_grad():
        return F.normalize(model.encode_text(model.tokenizer([template.format(e) for e in ENTRIES])).embedding, dim=-1)


def test_a_yes_is_weighed_against_the_others_of_its_group() -> None:
    method, batch = makd(), random_batch(6)
    assert method.teacher is not None
    v = F.normalize(method.encode_teacher(batch).image.embedding, dim=-1)
    scores = method.teacher.model.log_logit_scale.exp() * v @ own_vectors(method, "{}").T
    expected = torch.cat([scores[:, :3].softmax(1), scores[:, 3:].softmax(1)], 1).detach()
    torch.testing.assert_close(method.teacher_answers(batch), expected)
    terms, f = method(batch), method.features(batch)
    p = method.question_head(f).sigmoid()  # type: ignore[misc]
    written = -sum(
        expected[i, q] * p[i, q].log() + (1 - expected[i, q]) * (1 - p[i, q]).log() for i in range(6) for q in range(5)
    )
    torch.testing.assert_close(terms["questions"].value, written / 30)
    floor = -(expected * expected.log() + (1 - expected) * (1 - expected).log()).mean()
    torch.testing.assert_close(method.measurements["answer_entropy"], floor)
    labels = batch.extra["labels"]
    known = labels >= 0
    ce = F.cross_entropy(method.student.heads["labels"](f)[known], labels[known])
    torch.testing.assert_close(terms["labels"].value, ce)
    assert (terms["labels"].weight, terms["questions"].weight) == (1.0, 4.0)
    hard = makd(answers="hard").teacher_answers(batch)
    assert set(hard.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(hard[:, :3].argmax(1), expected[:, :3].argmax(1))
    assert torch.equal(hard[:, :3].sum(1), torch.ones(6))
    torch.testing.assert_close(makd(answers="shuffled").teacher_answers(batch), expected.roll(1, 0))


def test_or_against_its_own_negation() -> None:
    batch, settings = random_batch(6), {"options": "negation", "negations": ["under {}"], "teacher_scale": 20.0}
    method = makd(**settings)
    v = F.normalize(method.encode_teacher(batch).image.embedding, dim=-1)
    yes, no = own_vectors(method, "{}"), own_vectors(method, "under {}")
    expected = (20 * (v @ yes.T - v @ no.T)).sigmoid()
    torch.testing.assert_close(method.teacher_answers(batch), expected)
    hard = makd(**settings, answers="hard").teacher_answers(batch)
    assert torch.equal(hard, (expected > 0.5).float())
    makd(**settings, questions={"colour": ["red"]})  # a question may stand alone
    random = makd(**settings, answers="random")
    assert not torch.equal(random.yes, random.no)
    assert torch.equal(random.yes, makd(**settings, answers="random").yes)
    torch.testing.assert_close(random.yes.norm(dim=1), torch.ones(5))


def test_answers_of_groups_and_their_loss() -> None:
    draws = torch.Generator().manual_seed(0)
    scores, answers = torch.randn(4, 5, generator=draws).double(), torch.rand(4, 5, generator=draws).double()
    found = answers_among(scores, [2, 3])
    torch.testing.assert_close(found[:, :2].sum(1) + found[:, 2:].sum(1), torch.full((4,), 2.0, dtype=torch.float64))
    shifted = scores + torch.tensor([1.0, 1.0, -3.0, -3.0, -3.0])  # a constant of each group changes nothing
    torch.testing.assert_close(answers_among(shifted, [2, 3]), found)
    assert gradcheck(lambda x: answer_cross_entropy(x, answers), scores.requires_grad_())
    own = answers.logit().requires_grad_()
    answer_cross_entropy(own, answers).backward()  # the least value
    torch.testing.assert_close(own.grad, torch.zeros_like(answers), rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match=r"groups have \[2, 2\] texts: expected \[batch, 4\]"):
        answers_among(scores, [2, 2])
    with pytest.raises(ValueError, match=r"\(4, 5\) but answers \(4, 4\)"):
        answer_cross_entropy(scores, answers[:, :4])


def test_questions_are_dropped_and_one_term_may_be_left_out(tmp_path: Path) -> None:
    student = make_trainer(tmp_path, "makd", steps=2).run().student
    assert not any("question" in name for name in student.state_dict())
    assert "answer_entropy" in "".join(read_lines(tmp_path / "metrics.jsonl")[0])
    labels = makd(question_weight=0.0)
    assert labels.term_names == ("labels",)
    assert not any("question" in name for name, _ in labels.named_parameters())
    assert labels.needs_labels


def test_wrong_settings_are_refused() -> None:
    for settings, message in (
        ({"questions": {}}, r"method.questions has none: give groups of alternatives"),
        ({"questions": {"colour": ["red"]}}, r"questions.colour is \['red'\], and options: contrast weighs an entry"),
        ({"questions": {"colour": ["red", "red"]}}, r"questions.colour has an entry twice, \['red', 'red'\]"),
        ({"questions": {"colour": []}, "options": "negation"}, r"questions.colour is empty: name an entry or more"),
        ({"asks": "Is it {}?"}, r"method.asks is for teachers that write, .* set method.templates"),
        ({"templates": ["a thing"]}, r"give one text or more, each with \{\}"),
        ({"task_weight": 0.0}, "task_weight 0 leaves the head of the classes random, and no other .* raise it"),
        ({"teacher_scale": 0.0}, r"method.teacher_scale is 0: give a number > 0, or own"),
    ):
        with pytest.raises(ConfigError, match=message):
            makd(**settings)
    untrained, tuned = make_teacher(), make_teacher()
    untrained.model.random_towers, tuned.model.class_templates = ("text",), ("this is {}",)  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="text tower, and that of test-24 has random weights"):
        make_method("makd", teacher=untrained)
    with pytest.raises(ConfigError, match="tuned for names, so it reads no negations: take options: contrast"):
        make_method("makd", teacher=tuned, settings={"options": "negation"})


# ------------------------------------------------------------------------------------------------ a teacher that writes


WRITTEN = {"questions": GROUPS, "templates": MakdConfig.model_fields["templates"].default, "asks": "Is there a {}?"}


def written(**settings: Any) -> Makd:
    """The teacher has random weights; it answers the questions of `GROUPS`."""
    judge = FrozenTeacher(make_writer(seed=7, image_size=24).float())
    method = make_method("makd", teacher=judge, settings={**WRITTEN, **settings})
    assert isinstance(method, Makd)
    return method


def test_odds_are_those_of_the_first_token() -> None:
    """Question by question, from the library's own logits; in parts of any size."""
    writer = make_writer(seed=7, image_size=24).float()
    questions = [f"Is there a {entry}?" for entry in ENTRIES]
    model = AskedWriter(writer, questions, at_once=3)
    pixels = torch.randint(0, 256, (2, 3, 24, 24), dtype=torch.uint8)
    found = model.encode_image(model.image_spec.to_model(pixels)).embedding
    for row, picture in zip(found, pixels, strict=True):
        image = Image.fromarray(picture.permute(1, 2, 0).numpy())
        for odds, question in zip(row, questions, strict=True):
            item = writer.processor.read((Turn("user", question, 1), Turn("assistant", "yes")), [image])
            inputs = join_items([item], writer.processor.pad_id)
            logits = writer.model(**writer.arguments(inputs)).logits[0, int(inputs.answer[0].nonzero()[0]) - 1]
            begin = writer.processor.encode_answer
            heads = {word: {begin(each)[0] for each in (word, word.title())} for word in ("yes", "no")}
            ways = (heads["yes"] - heads["no"], heads["no"] - heads["yes"])
            yes, no = (logits[sorted(way)].logsumexp(0) for way in ways)
            assert float(odds) == pytest.approx((yes - no).item(), abs=1e-4)
    assert model.image_spec.size == 24
    assert {name for part in model.parts.values() for name in part} == {name for name, _ in model.named_parameters()}


def test_answers_of_a_teacher_that_writes_are_found_once() -> None:
    method = written()
    assert method.prepares
    with pytest.raises(ConfigError, match="cannot be prolonged: the teacher was asked once"):
        check_longer(method, (WHOLE_RUN,), Path("run"))
    assert "checkpoints hold its answers" in str(method.not_cached)
    batch = random_batch(4)
    assert method.table is not None
    method.table.resize(0)
    with pytest.raises(ValueError, match="`prepare` comes before the first step"):
        method.terms(batch)
    keys, odds = sample_keys(batch.ids), torch.linspace(-2, 2, 20).view(4, 5)
    nothing = torch.empty(3, 0)

    def survey(role: str = "teacher", *, num: int | None = None, towers: Any = ()) -> Any:
        assert (role, num, towers) == ("teacher", None, ("image",))
        yield Answered(odds[[2, 0]], nothing[:2], keys[[2, 0]], torch.zeros(2))
        yield Answered(odds[[1]], nothing[:1], keys[[1]], torch.zeros(1))

    method.prepare(survey)
    scores = torch.randn(4, 5, requires_grad=True)
    found = method._stored(method.table, batch, scores)  # type: ignore[arg-type]
    torch.testing.assert_close(found[:3], odds[:3].sigmoid())
    answer_cross_entropy(scores, found).backward()
    assert scores.grad is not None
    assert scores.grad[:3].all()
    assert scores.grad[3].abs().max() < 1e-7  # nobody was asked about the last picture
    again = written()
    again.restructure(method.structure)
    again.load_state_dict(method.state_dict())
    torch.testing.assert_close(again._stored(again.table, batch, scores), found)  # type: ignore[arg-type]
    for answers, expected in (("hard", (odds > 0).float()), ("shuffled", found.roll(1, 0)[:3])):
        other = written(answers=answers)
        other.prepare(survey)
        got = other._stored(other.table, batch, scores)  # type: ignore[arg-type]
        torch.testing.assert_close(got[:3], expected[:3])


def test_what_a_teacher_that_writes_does_not_read_is_refused() -> None:
    for settings, message in (
        ({"options": "negation"}, "leave options out"),
        ({"teacher_scale": 3.0, "templates": ["a {}"]}, "leave templates, teacher_scale out"),
        ({"answers": "random"}, "leave answers: random out"),
        ({"asks": "Is it red?"}, "'Is it red\\?' has none"),
    ):
        with pytest.raises(ConfigError, match=message):
            written(**settings)
    assert written(question_weight=0).table is None
    assert written(questions={"colour": ["red"]}).table is not None  # a writer answers each question alone
