"""CMAPKD: its terms against the objectives by hand, its levels, its selection, and what flows where."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cmapkd.config import ConfigError
from cmapkd.data.types import Batch, TokenBatch
from cmapkd.features import pyramid
from cmapkd.features.pyramid import cells_at, cells_of, standardise
from cmapkd.methods import Method, StageConfig, StepInfo, build_method
from cmapkd.methods.cmapkd import CMAPKD, AblationsConfig, CMAPKDConfig, reading
from cmapkd.methods.cmapkd.config import MovedSettingWarning
from cmapkd.models import FrozenTeacher, Level
from cmapkd.objectives import interactive_loss, similarity_divergence
from helpers import CMAPKD_EXACT, make_method, make_model, make_trainer, random_batch
from training.test_resume import assert_same_end, interrupt

TERMS = {
    "contrastive", "interactive", "relational", "bank", "bank_within", "bank_level", "bank_pair",
    "visual", "language", "pyramid", "alignment", "bridge",
    "relation", "layer_relation",
}  # fmt: skip
EVERY = dict.fromkeys(("P2", "P3", "P4", "P5"), 1.0)
MANUAL = {"name": "manual", "weights": dict.fromkeys(("P2", "P3", "P4", "P5", "L1", "L2", "L3", "L4"), 1.0)}


def cmapkd(**settings: Any) -> CMAPKD:
    method = make_method("cmapkd", settings=settings)
    assert isinstance(method, CMAPKD)
    return method.train()


def loss_of(method: Method, batch: Batch) -> Tensor:
    return torch.stack([term.weight * term.value for term in method(batch).values()]).sum()


def test_every_term_of_the_design_is_there_with_its_weight() -> None:
    method = cmapkd(**CMAPKD_EXACT)
    terms = method(random_batch(6))
    assert set(terms) == TERMS == set(method.term_names)
    assert terms["pyramid"].weight == 0.7
    assert terms["relation"].weight == 3.0
    assert method.level_names == ("P2", "P3", "P4", "P5", "L1", "L2", "L3", "L4")
    assert {f"distance/{level}" for level in method.level_names} <= set(method.measurements)
    assert {"visual/weight/P2", "language/entropy", "pyramid/weight/P2-L1"} <= set(method.measurements)


def test_a_weight_of_zero_removes_a_term_and_what_only_it_needs() -> None:
    off = {name: 0.0 for name in CMAPKDConfig.model_fields if name.endswith("_weight") and name != "task_weight"}
    method = cmapkd(**off, ablations={name: 0.0 for name in AblationsConfig.model_fields if name.endswith("_weight")})
    assert set(method(random_batch(4))) == {"contrastive"}
    assert method.student_needs.image_levels == method.teacher_needs.text_levels == ()
    assert not any(name for name, _ in method.named_parameters() if not name.startswith("student."))


def test_embedding_terms_are_the_objectives_of_the_projected_embeddings() -> None:
    method, batch = cmapkd(relational_weight=2.0), random_batch(5)
    terms = method(batch)
    student, teacher = method.encode_student(batch), method.encode_teacher(batch)
    assert method.project is not None
    projected = method.project(student)
    ours, theirs = [(f.image.embedding, f.text.embedding) for f in (projected, teacher)]
    expected = interactive_loss(*ours, *theirs, logit_scale=1 / 0.07)
    torch.testing.assert_close(terms["interactive"].value, expected)
    joint = similarity_divergence(
        student.image.embedding,
        student.text.embedding,
        *theirs,
        student_scale=student.logit_scale,
        teacher_scale=teacher.logit_scale,
    )
    torch.testing.assert_close(terms["relational"].value, joint)
    assert terms["relational"].weight == 2.0
    assert "bridge" not in terms  # the joint space needs none


def test_visual_term_is_the_weighted_distance_written_out() -> None:
    counts = {"P2": 0.3, "P4": 0.2, "P5": 1.5}
    method, batch = cmapkd(visual_levels=counts), random_batch(3)
    value = method(batch)["visual"].value
    student, teacher = method.encode_student(batch), method.encode_teacher(batch)
    assert method.project is not None
    expected = 0.0
    for level in ("P2", "P4"):  # one block: both levels read it, each through a projector of its own
        ours, theirs = student.image.levels["blocks.0"].values[:, 1:], teacher.image.levels["blocks.0"].values[:, 1:]
        theirs = F.adaptive_avg_pool2d(theirs.unflatten(1, (3, 3)).permute(0, 3, 1, 2), 2).flatten(2).mT
        projected = method.match.project_visual.lateral[level](ours)
        expected += counts[level] * (standardise(projected) - standardise(theirs)).square().mean().item()
    ours, theirs = method.project(student).image.embedding, teacher.image.embedding
    expected += counts["P5"] * (2 - 2 * F.cosine_similarity(ours, theirs)).mean().item()
    assert value.item() == pytest.approx(expected, rel=1e-5)


def test_levels_as_means_of_their_depth_groups() -> None:
    student, teacher = make_model(depth=4), FrozenTeacher(make_model(dim=24, image_size=24, depth=6, seed=7))
    settings = {"visual_levels": {"P3": 1.0}, "language_levels": {}, "ablations": {"depths": "mean"}}
    method = make_method("cmapkd", student=student, teacher=teacher, settings=settings).train()
    assert isinstance(method, CMAPKD)
    assert method.student_needs.image_levels == ("blocks.1", "blocks.2")  # 4 and 6 blocks by 3 : 5 : 4
    assert method.teacher_needs.image_levels == ("blocks.2", "blocks.3")
    batch = random_batch(3)
    value = method(batch)["visual"].value
    of_both = method.encode_student(batch), method.encode_teacher(batch)
    ours, theirs = (torch.stack([it.values[:, 1:] for it in each.image.levels.values()]).mean(0) for each in of_both)
    theirs = F.adaptive_avg_pool2d(theirs.unflatten(1, (3, 3)).permute(0, 3, 1, 2), 2).flatten(2).mT
    projected = method.match.project_visual.lateral["P3"](ours)
    expected = (standardise(projected) - standardise(theirs)).square().mean()
    torch.testing.assert_close(value, expected)


def test_means_have_no_key_tokens() -> None:
    with pytest.raises(ConfigError, match="depths: last"):
        CMAPKDConfig.from_mapping({"name": "cmapkd", "places": "key_tokens", "ablations": {"depths": "mean"}})


def test_the_bank_holds_what_was_seen_and_never_the_sample_itself() -> None:
    method, batch = cmapkd(bank={"size": 6}), random_batch(4)
    assert method.bank is not None
    assert method(batch)["bank"].value.item() == 0  # nothing to compare with yet
    teacher = method.encode_teacher(batch)
    assert torch.equal(method.bank.image[:4], F.normalize(teacher.image.embedding, dim=-1).half())
    assert method(batch)["bank"].value.item() > 0  # the same samples again: each is compared with the three others
    assert len(set(method.bank.keys.tolist())) == 4  # eight were pushed into six places, four samples twice
    method.eval()
    before = method.bank.keys.clone()
    method(random_batch(4, seed=1))
    assert torch.equal(method.bank.keys, before)


def softmax_divergence(ours: Tensor, theirs: Tensor, entries: Tensor, scales: tuple[float, float]) -> Tensor:
    """KL of the softmaxes over cosines, for each sample, written out."""
    p, q = (
        (scale * F.normalize(x, dim=-1) @ F.normalize(entries, dim=-1).T).softmax(-1)
        for x, scale in ((theirs, scales[1]), (ours, scales[0]))
    )
    return (p * (p / q).log()).sum(-1)


BANKED = {
    "visual_levels": {"P2": 1.0, "P5": 1.0},
    "language_levels": {"L4": 1.0},
    "bank": {"size": 8, "store": "fp32"},
}


def test_a_level_against_the_bank_of_itself_written_out() -> None:
    method = cmapkd(ablations={"bank_level_weight": 1.0, "bank_level_scale": 5.0}, **BANKED)
    assert method.term_weights["bank_level"] == 1.0
    seen, batch = random_batch(4), replace(random_batch(4, seed=1), ids=tuple("abcd"))
    assert method(seen)["bank_level"].value.item() == 0  # nothing to compare with yet
    value = method(batch)["bank_level"].value
    of_bank = method.match.pooled("teacher", method.encode_teacher(seen), ["P2"])["P2"]
    entries = standardise(of_bank)
    ours = method.match.pooled("student", method.encode_student(batch), ["P2"])["P2"]
    theirs = method.match.pooled("teacher", method.encode_teacher(batch), ["P2"])["P2"]
    ours, middle = standardise(method.project_levels["P2"](ours)), entries.mean(0)
    expected = softmax_divergence(ours - middle, standardise(theirs) - middle, entries - middle, (5.0, 5.0)).mean()
    assert expected.item() > 1e-4
    torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-6)
    value.backward()
    reached = {name for name, parameter in method.named_parameters() if parameter.grad is not None}
    assert {"project_levels.P2.weight", "student.vision.blocks.0.qkv.weight"} <= reached


def test_pairs_of_levels_against_the_bank_of_the_other_modality_written_out() -> None:
    ablations = {"bank_pair_weight": 1.0, "coupling": {"P2-L1": 1.0, "P3-L2": 0.5}, "bridge_dim": 8}
    method = cmapkd(ablations=ablations, **BANKED)
    assert {"bank_pair", "bridge"} <= {*method.term_names}
    assert "pyramid" not in method.term_names
    seen, batch = random_batch(4), replace(random_batch(4, seed=1), ids=tuple("abcd"))
    method(seen)
    value = method(batch)["bank_pair"].value
    of_bank = method.match.pooled("teacher", method.encode_teacher(seen), ["P2", "P3", "L1", "L2"])
    features = {"student": method.encode_student(batch), "teacher": method.encode_teacher(batch)}
    scales = method.bridge_scale.exp().item(), method.teacher_bridge_scale.exp().item()
    vectors = {role: method.match.pooled(role, features[role], [*of_bank]) for role in ("student", "teacher")}
    bridges = {"student": method.bridge, "teacher": method.teacher_bridge}

    def mapped(role: str, level: str, vector: Tensor) -> Tensor:
        side = bridges[role].visual if level.startswith("P") else bridges[role].language
        return side[level](vector)

    expected = 0.0
    for weight, pair in ((1.0, ("P2", "L1")), (0.5, ("P3", "L2"))):
        for anchor, other in (pair, pair[::-1]):
            ours, theirs = (mapped(role, anchor, vectors[role][anchor]) for role in ("student", "teacher"))
            entries = mapped("teacher", other, of_bank[other])
            expected += weight / 2 * softmax_divergence(ours, theirs, entries, scales).mean().item()
    assert value.item() == pytest.approx(expected / 1.5, rel=1e-4)
    value.backward()
    assert all(parameter.grad is None for parameter in method.teacher_bridge.parameters())


def test_the_teachers_bridge_learns_where_levels_are_related_through_it() -> None:
    method = cmapkd(ablations={"layer_relation_weight": 1.0, "bridge_dim": 8})
    assert {"layer_relation", "bridge"} <= {*method.term_names}
    method(random_batch(4))["bridge"].value.backward()
    assert any(parameter.grad is not None for parameter in method.teacher_bridge.parameters())


def test_what_a_stage_did_not_read_is_no_reference_later() -> None:
    method = cmapkd(ablations={"bank_level_weight": 1.0}, **BANKED)
    method.enter(StageConfig(share=1.0, levels=("P5", "L4")))
    assert "bank_level" not in method(random_batch(4))
    method.enter(StageConfig(share=1.0))
    batch = replace(random_batch(4, seed=1), ids=tuple("abcd"))
    terms = method(batch)
    assert terms["bank"].value.item() > 0  # the embeddings of the first stage are there
    assert terms["bank_level"].value.item() == 0  # but of the level nothing is known yet
    assert method(replace(batch, ids=tuple("efgh")))["bank_level"].value.item() > 0
    with pytest.raises(ConfigError, match=r"bank\.source: run"):
        CMAPKDConfig.from_mapping({"bank": {"source": "cache"}, "ablations": {"bank_level_weight": 1.0}})


def test_only_the_bridge_term_trains_the_teachers_bridge_and_it_trains_nothing_else() -> None:
    method, batch = cmapkd(**CMAPKD_EXACT), random_batch(6)
    method(replace(batch, ids=tuple("abcdef")))  # something for the bank
    terms = method(batch)
    theirs = {name for name, _ in method.named_parameters() if name.startswith("teacher_bridge")}
    for name, term in terms.items():
        method.zero_grad()
        term.value.backward(retain_graph=True)
        reached = {key for key, parameter in method.named_parameters() if parameter.grad is not None}
        reached = {key for key in reached if bool(method.get_parameter(key).grad.any())}  # type: ignore[union-attr]
        if name == "bridge":
            assert reached
            assert reached <= theirs
        else:
            assert not reached & theirs, name
            assert any(key.startswith("student.") for key in reached), name


def test_texts_of_another_tokenizer_are_matched_by_their_words() -> None:
    method, batch = cmapkd(), random_batch(3)
    spans = torch.arange(7)[None, :, None] * 3 + torch.tensor([0, 2])
    texts = batch.inputs["student"].texts
    mine = TokenBatch(texts.ids, texts.mask, (spans * texts.mask[..., None]).long())
    theirs = TokenBatch(texts.ids + 1, texts.mask, mine.spans)  # other ids, the same words
    other = replace(batch.inputs["teacher"], texts=theirs)
    both = replace(batch, inputs={"student": replace(batch.inputs["student"], texts=mine), "teacher": other})
    assert method(both)["language"].value.item() > 0
    blind = replace(batch, inputs=batch.inputs | {"teacher": replace(other, texts=replace(theirs, spans=None))})
    with pytest.raises(ValueError, match="leave levels L1 and L2 out"):
        method(blind)
    method = cmapkd(language_levels={"L3": 1.0, "L4": 1.0})
    assert method(blind)["language"].value.item() > 0


@pytest.mark.parametrize("weighting", ["uniform", "uncertainty", "gate", "attention", MANUAL])
def test_weightings_that_start_uniform_give_the_same_first_loss(weighting: Any) -> None:
    methods = [cmapkd(weighting=each, visual_levels=EVERY) for each in ("uniform", weighting)]
    losses = [method(random_batch(4))["visual"].value for method in methods]
    torch.testing.assert_close(losses[0], losses[1])


def test_manual_weights_count_by_level() -> None:
    weights = {**MANUAL["weights"], "P2": 4.0, "P3": 0.0, "P4": 0.0, "P5": 0.0}  # type: ignore[dict-item]
    counts = {"visual_levels": {"P2": 0.5, "P3": 0.1, "P4": 0.1, "P5": 1.0}}
    method = cmapkd(weighting={**MANUAL, "weights": weights}, **counts)
    value = method(random_batch(4))["visual"].value
    torch.testing.assert_close(value.detach(), 4 * 0.5 * method.measurements["distance/P2"])
    with pytest.raises(ConfigError, match=r"weights\.P6: unknown item"):
        cmapkd(weighting={**MANUAL, "weights": {**weights, "P6": 1.0}}, **counts)


def test_attention_looks_at_the_teachers_own_levels() -> None:
    method, batch = cmapkd(weighting="attention", **CMAPKD_EXACT), random_batch(4)
    teacher = method.encode_teacher(batch)
    pooled = method.match.pooled("teacher", teacher, method.level_names)
    seen: dict[str, Tensor] = {}
    for term, weighting in method.weighting.items():
        weighting.register_forward_pre_hook(lambda _, given, term=term: seen.update({term: given[1]}))
    method(batch)
    for term in ("visual", "language"):
        torch.testing.assert_close(seen[term], torch.cat([pooled[level] for level in method.items[term]], dim=-1))
    of_pairs = [pooled[level] for pair in method.items["pyramid"] for level in pair.split("-")]
    torch.testing.assert_close(seen["pyramid"], torch.cat(of_pairs, dim=-1))


def test_attention_sees_nothing_of_what_a_stage_leaves_out() -> None:
    method, batch = cmapkd(weighting="attention", visual_levels=EVERY), random_batch(4)
    method.enter(StageConfig(share=1.0, levels=("P4", "P5", "L3", "L4"), terms=("contrastive", "visual")))
    assert method.teacher_needs.text_levels == ()
    assert set(method(batch)) == {"contrastive", "visual"}
    assert method.measurements["visual/weight/P2"].item() == 0
    assert method.measurements["visual/weight/P4"].item() == pytest.approx(1.0)
    with pytest.raises(ConfigError, match="whole terms have none"):
        make_method("clip_kd", settings={"term_weighting": "attention"})


def test_what_a_gate_sees_of_a_sample() -> None:
    reads = {"selection_reads": ("losses", "student", "teacher")}
    settings = {"weighting": "gate", "ablations": reads, "visual_levels": EVERY}
    method, batch = cmapkd(**settings), random_batch(4)
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    for term, weighting in method.weighting.items():
        weighting.register_forward_pre_hook(lambda _, given, term=term: seen.update({term: given[:2]}))
    method(batch)["visual"].value.backward()
    losses, context = seen["visual"]
    models = method.encode_student(batch), method.encode_teacher(batch)
    embeddings = [F.normalize(x.embedding, dim=-1) for each in models for x in (each.image, each.text)]
    torch.testing.assert_close(context, torch.cat([losses, *embeddings], dim=-1))
    with pytest.raises(ConfigError, match="uniform does not"):
        CMAPKDConfig.from_mapping({"ablations": {"selection_reads": ["student"]}})
    with pytest.raises(ConfigError, match="attention does not"):
        CMAPKDConfig.from_mapping({"ablations": {"selection_reads": ["student"]}, "weighting": "attention"})
    with pytest.raises(ConfigError, match="twice"):
        CMAPKDConfig.from_mapping({"ablations": {"selection_reads": ["student", "student"]}, "weighting": "gate"})


def test_names_of_levels_and_pairs_are_checked() -> None:
    with pytest.raises(ConfigError, match="visual_levels: unknown 'P6'"):
        CMAPKDConfig.from_mapping({"visual_levels": {"P6": 1}})
    with pytest.raises(ConfigError, match=r"ablations\.coupling: unknown 'L1-P2'"):
        CMAPKDConfig.from_mapping({"ablations": {"coupling": {"L1-P2": 1}}})
    for name in ("pyramid_weight", "alignment_weight", "bank_pair_weight"):
        with pytest.raises(
            ConfigError, match=rf"ablations\.{name} counts pairs of levels, and ablations\.coupling has"
        ):
            CMAPKDConfig.from_mapping({"ablations": {name: 1.0, "coupling": {}}})
    with pytest.raises(ConfigError, match="P2 is -1"):
        CMAPKDConfig.from_mapping({"visual_levels": {"P2": -1}})
    with pytest.raises(ConfigError, match=r"'gats' \(did you mean 'gate'\?\)"):
        CMAPKDConfig.from_mapping({"weighting": "gats"})


def test_a_setting_under_its_old_name_goes_where_it_belongs() -> None:
    with pytest.warns(
        MovedSettingWarning, match=r"write bank\.size in place of bank_size, bank\.source in place of bank_from$"
    ):
        old = CMAPKDConfig.from_mapping({"bank_size": 12, "bank_from": "cache", "bank": {"sample": 4}})
    assert old == CMAPKDConfig.from_mapping({"bank": {"size": 12, "source": "cache", "sample": 4}})
    for name, field in AblationsConfig.model_fields.items():
        value = field.get_default(call_default_factory=True)
        with pytest.warns(MovedSettingWarning, match=rf"write ablations\.{name} in place of {name}$"):
            assert CMAPKDConfig.from_mapping({name: value}) == CMAPKDConfig()
    coupled = {"pyramid_weight": 0.5, "coupling": {"P2-L1": 1.0, "P5-L4": 3.0}}
    with pytest.warns(MovedSettingWarning, match=r"write relational_weight in place of ablations\.coupling\.P5-L4$"):
        old = CMAPKDConfig.from_mapping({"ablations": coupled})
    new = {"relational_weight": 1.5, "ablations": {"pyramid_weight": 0.5, "coupling": {"P2-L1": 1.0}}}
    assert old == CMAPKDConfig.from_mapping(new)
    older = CMAPKDConfig().model_dump(mode="json")
    del older["relational_weight"]  # a run folder from before there was such a term
    with pytest.warns(MovedSettingWarning, match="relational_weight"):
        assert CMAPKDConfig.from_mapping(older).relational_weight == 0
    with pytest.raises(ConfigError, match=r"P5-L4 and relational_weight are one setting, and both are given"):
        CMAPKDConfig.from_mapping({"relational_weight": 1, "ablations": coupled})
    with pytest.raises(ConfigError, match=r"bank_size and bank\.size are one setting, and both are given"):
        CMAPKDConfig.from_mapping({"bank_size": 12, "bank": {"size": 13}})


def test_a_stage_reads_only_its_levels() -> None:
    method = cmapkd(**CMAPKD_EXACT)
    method.enter(StageConfig(share=1.0, levels=("P5", "L4")))
    assert method.teacher_needs.image_levels == method.student_needs.text_levels == ()
    terms = method(random_batch(4))
    assert {"relational", "visual", "language", "bank"} <= set(terms)
    assert not {"pyramid", "bridge", "alignment"} & set(terms)
    assert "distance/P4" not in method.measurements
    method.enter(StageConfig(share=1.0, levels=("P4", "P5", "L4"), terms=("contrastive", "visual")))
    assert method.teacher_needs.image_levels == ("blocks.0",)
    assert set(method(random_batch(4))) == {"contrastive", "visual"}


STAGES = (
    StageConfig(name="coarse", share=0.25, levels=("P5", "L4")),
    StageConfig(name="medium", share=0.25, levels=("P4", "P5", "L3", "L4")),
    StageConfig(name="fine", share=0.25),
    StageConfig(name="selection", share=0.25, train=("weighting",)),
)


@pytest.mark.parametrize(
    "weighting", ["gate", "attention", {"name": "policy", "warmup_steps": 2, "window": 2, "edge": 1}]
)
def test_a_staged_run_that_is_interrupted_in_every_stage_ends_bit_identically(
    tmp_path: Path, weighting: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trainer(out: Path) -> Any:
        return make_trainer(out, cmapkd(weighting=weighting, **CMAPKD_EXACT), steps=8, stages=STAGES)

    whole = trainer(tmp_path / "whole")
    whole.run()
    for step in (1, 3, 5, 7):
        interrupt(trainer(tmp_path / "parts"), step, monkeypatch, resume=step > 1)
    again = trainer(tmp_path / "parts")
    again.run(resume=True)
    assert_same_end(whole, again)


def test_terms_of_any_method_can_be_weighted() -> None:
    plain = make_method("clip_kd")
    config = type(plain).Config.from_mapping({"name": "clip_kd", "term_weighting": "uncertainty"})
    method = build_method(config, student=plain.student, teacher=plain.teacher)
    batch = random_batch(4)
    terms = method(batch)
    assert set(terms) == {"contrastive", "relational", "feature", "interactive", "weighted"}
    weights = {name: term.weight for name, term in plain(batch).items()}
    total = sum(weight * terms[name].value.item() for name, weight in weights.items())
    assert loss_of(method, batch).item() == pytest.approx(total, rel=1e-5)  # it starts uniform
    loss_of(method, batch).backward()
    assert any(method.part_of(name) == "weighting" for name, p in method.named_parameters() if p.grad is not None)


# ------------------------------------------------------------------------------------------------ places, and the bank


def features_of(method: CMAPKD, batch: Batch) -> tuple[Any, Any]:
    assert method.teacher is not None
    return method.student(batch.inputs["student"], method.student_needs), method.teacher(batch, method.teacher_needs)


def standard_distance(ours: Tensor, theirs: Tensor) -> Tensor:
    """Of vectors, channel by channel."""
    return (standardise(ours) - standardise(theirs)).square().mean(-1)


def test_pooled_levels_are_compared_as_one_vector() -> None:
    method, batch = cmapkd(places="pooled", visual_levels=EVERY), random_batch(5)
    student, teacher = features_of(method, batch)
    with torch.no_grad():
        method(batch)
        for term in ("visual", "language"):
            ours, theirs = (method.match.pooled(role, it, (*method.items[term],)) for role, it in
                            (("student", student), ("teacher", teacher)))  # fmt: skip
            layers = method.match.project_visual.lateral if term == "visual" else method.match.project_language.linear
            for level in method.items[term][:3]:
                expected = standard_distance(layers[level](ours[level]), theirs[level]).mean()
                torch.testing.assert_close(method.measurements[f"distance/{level}"], expected, rtol=1e-4, atol=1e-5)
    assert method.teacher_detail == "pooled"


def test_a_level_that_several_terms_read_as_one_vector_is_pooled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"places": "pooled", "visual_levels": EVERY, "ablations": {"relation_weight": 3.0}}
    batch = random_batch(5)

    def results() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        method = cmapkd(**settings)
        terms = method(batch)
        torch.stack([term.weight * term.value for term in terms.values()]).sum().backward()
        gradients = {name: p.grad for name, p in method.student.named_parameters() if p.grad is not None}
        return {name: term.value.detach() for name, term in terms.items()}, gradients

    pooled_levels: list[Level] = []

    def counted(level: Level) -> Tensor:
        pooled_levels.append(level)
        return cells_of(level)

    monkeypatch.setattr(pyramid, "cells_of", counted)
    values, gradients = results()
    method = cmapkd(**settings)
    needs = method.student_needs, method.teacher_needs
    exposed = sum(len(need.image_levels) + len(need.text_levels) for need in needs)
    assert len(pooled_levels) == exposed
    pooled_levels.clear()
    monkeypatch.setattr(reading, "with_means", lambda features: features)
    expected_values, expected_gradients = results()
    inner = [level for level in method.level_names if level not in ("P5", "L4")]
    assert len(pooled_levels) == 4 * len(inner)  # of both models, for the distance and for the relation
    torch.testing.assert_close(values, expected_values, rtol=0, atol=0)
    assert gradients.keys() == expected_gradients.keys()
    for name, expected in expected_gradients.items():  # two sums of the same numbers in another order
        assert float((gradients[name] - expected).norm()) <= 1e-6 * float(expected.norm()), name


@pytest.mark.parametrize("by", ["class", "norm"])
def test_key_tokens_are_compared_where_the_teacher_has_them(by: str) -> None:
    settings = {"places": "key_tokens", "key_tokens": 2, "ablations": {"key_tokens_by": by}}
    method, batch = cmapkd(**settings, visual_levels=EVERY), random_batch(4)
    student, teacher = features_of(method, batch)
    assert method.key_tokens is not None
    chosen = method.key_tokens.of(teacher)
    match = method.match
    with torch.no_grad():
        method(batch)
        for level in ("P2", "P3", "P4"):
            name, own = (match.visual[role][level][-1].name for role in ("teacher", "student"))
            keys, cells = chosen.image.levels[name], student.image.levels[own]
            taken = cells_at(cells, keys.places, keys.grid)
            expected = standard_distance(match.project_visual.lateral[level](taken), keys.values).mean()
            torch.testing.assert_close(method.measurements[f"distance/{level}"], expected, rtol=1e-4, atol=1e-5)
        for level in ("L1", "L2"):  # both tokenise alike here: a word is a token
            keys = chosen.text.levels[match.language["teacher"][level][-1].name]
            words = student.text.levels[match.language["student"][level][-1].name].values
            distances = []
            for row in range(4):
                places = [place for place in keys.places[row].tolist() if place >= 0]
                ours = match.project_language.linear[level](words[row, places])
                distances.append(standard_distance(ours, keys.values[row, : len(places)]).mean())
            expected = torch.stack(distances).mean()
            torch.testing.assert_close(method.measurements[f"distance/{level}"], expected, rtol=1e-4, atol=1e-5)
    assert method.teacher_detail == "key_tokens"


def test_places_without_grids_refuse_what_needs_them() -> None:
    for changes in ({"top_down": True}, {"grids": {"P2": 2.0}}):
        with pytest.raises(ConfigError, match="has no grids to resample"):
            cmapkd(places="pooled", ablations=changes)


def test_a_sample_of_the_bank_learns_and_follows_the_step_alone() -> None:
    values = []
    for number, sample in enumerate((None, 4, 4, 12)):
        method = cmapkd(bank={"size": 12, "sample": sample})
        with torch.no_grad():
            method(replace(random_batch(12, seed=1), ids=tuple(f"other{i}" for i in range(12))))
        torch.manual_seed(number)  # of no account
        values.append(method(random_batch(5), StepInfo(step=3, seed=7))["bank"].value)
    assert values[1] == values[2] != values[0]
    assert values[3] == values[0]
    values[1].backward()


def test_a_bank_of_the_cache_needs_one() -> None:
    with pytest.raises(ValueError, match=r"12 reference embeddings are to be drawn .* set cache: auto"):
        cmapkd(bank={"source": "cache", "size": 12})(random_batch(4))
