"""Captions above false ones: the share in loops, ties, kinds, and data that have none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image

from cmapkd.data.open import open_source
from cmapkd.data.texts import false_texts
from cmapkd.data.types import Sample, Source
from cmapkd.evaluation import EvaluationConfig, evaluate
from cmapkd.evaluation.embed import FalseTexts, embed
from cmapkd.evaluation.headline import headlines
from cmapkd.evaluation.tasks.compositional import _above
from cmapkd.models import DualEncoder, build_model
from cmapkd.run import vocabulary_captions


class Given:
    """Pictures whose false texts are a column."""

    name, class_names = "given", None
    texts: tuple[tuple[str, ...], ...] = (("x", "y"), (), ("own 2",), ("x",))

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Sample:
        pools = {"negatives": self.texts[index]} if self.texts[index] else {}
        return Sample(f"g{index}", Image.new("RGB", (20, 20), (60 * index, 9, 9)), self.captions(index), texts=pools)

    def captions(self, index: int) -> tuple[str, ...]:
        return (f"own {index}", "another")

    def fingerprint(self) -> str:
        return "given"


@pytest.fixture(scope="module")
def scenes() -> Source:
    return open_source("scenes@val?length=30&size=32")


@pytest.fixture(scope="module")
def model(scenes: Source) -> DualEncoder:
    torch.manual_seed(0)
    built = build_model("tiny:debug", captions=vocabulary_captions(scenes))
    assert isinstance(built, DualEncoder)
    return built


def scored(model: DualEncoder, source: Any, **options: Any) -> dict[str, Any]:
    config = EvaluationConfig(tasks=("compositional",), **options)
    return evaluate(model, source, config, device="cpu")


def test_shares_are_those_of_loops(model: DualEncoder, scenes: Source) -> None:
    found = scored(model, scenes, negatives=3)["compositional"]
    above, chance, of_kind = [], [], {"relation": [], "replaced": []}  # type: ignore[var-annotated]
    for sample in (scenes[index] for index in range(len(scenes))):
        false = dict([*false_texts(sample, sample.captions[0], 0).items()][:3])
        embedded = model.embed([sample.image], [sample.captions[0], *false])
        assert embedded.images is not None
        assert embedded.texts is not None
        own, *others = (embedded.images @ embedded.texts.T)[0].tolist()
        above.append(all(own > other for other in others))
        chance.append(1 / (1 + len(others)))
        for kind, margins in of_kind.items():
            mine = [other for other, each in zip(others, false.values(), strict=True) if each == kind]
            margins += [all(own > other for other in mine)] if mine else []
    assert found["above"] == pytest.approx(100 * sum(above) / len(above))
    assert found["chance"] == pytest.approx(100 * sum(chance) / len(chance))
    assert (found["num_samples"], found["num_false"]) == (30, sum(round(1 / each) - 1 for each in chance))
    for kind, margins in of_kind.items():
        part = found["by_kind"][kind]
        assert (part["above"], part["num_samples"]) == (pytest.approx(100 * sum(margins) / len(margins)), len(margins))
    assert headlines({"compositional": found})["compositional"][1] == found["above"]


def test_a_tie_with_the_best_counts_half() -> None:
    rows = torch.tensor([0, 0, 2, 2, 3])
    found = FalseTexts(torch.zeros(5, 2), rows, rows, ("",) * 5)
    scores = _above(torch.tensor([0.1, 0.2, 0.0, 0.3, -0.1]), found, torch.ones(5, dtype=torch.bool))
    assert scores["above"] == pytest.approx(100 * (1 + 0.5 + 0) / 3)
    assert scores["chance"] == pytest.approx(100 * (1 / 3 + 1 / 3 + 1 / 2) / 3)


def test_false_texts_of_a_file_have_no_kind(model: DualEncoder) -> None:
    """A sample without any is left out; one whose only false text is its caption is a tie."""
    found = scored(model, Given())["compositional"]
    assert (found["num_samples"], found["num_false"], found["by_kind"]) == (3, 4, {})
    embedded = embed(model, Given(), batch_size=2, device="cpu", negatives=4)
    assert embedded.negatives is not None
    assert embedded.negatives.image_of_text.tolist() == [0, 0, 2, 3]
    assert embedded.negatives.caption_of_text.tolist() == [0, 0, 4, 6]
    torch.testing.assert_close(embedded.negatives.texts[2], embedded.texts[4])
    assert embed(model, Given(), batch_size=2, device="cpu").negatives is None


def test_data_without_false_texts_are_refused(model: DualEncoder, scenes: Source) -> None:
    class Plain(Given):
        texts = ((), (), (), ())

    with pytest.raises(
        ValueError, match=r"compositional: none of its first samples .* pool negatives.*\?texts=negatives"
    ):
        scored(model, Plain())
    assert "compositional" not in evaluate(model, scenes, EvaluationConfig(limit=4), device="cpu")


def test_settings_are_written_where_they_are_set() -> None:
    """So that runs of earlier versions are still found by their configs."""
    assert "negatives" not in EvaluationConfig().model_dump()
    assert EvaluationConfig(negatives=2).model_dump()["negatives"] == 2
