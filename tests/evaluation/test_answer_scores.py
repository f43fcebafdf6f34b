"""Scores of answers by picture: sums that give the score back, in a file that a comparison resamples."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from cmapkd.compare.picture_table import PictureTable, pictures_csv
from cmapkd.compare.pictures import KeptRanks, NoPictures
from cmapkd.data.turns import Turn
from cmapkd.evaluation.answer_scores import AnswerScore, load_answer_scores, save_answer_scores
from cmapkd.evaluation.dialogues import Asked
from cmapkd.run.measure import RANKS


def asked(index: int, question: str, answer: str = "yes") -> Asked:
    dialogue = (Turn("user", question, 1), Turn("assistant", answer))
    return Asked(index, f"s{index}", "question", dialogue, (answer,))


QUESTIONS = [asked(4, "a"), asked(4, "b"), asked(0, "a"), asked(9, "c"), asked(4, "c")]
VALUES = [100.0, 0.0, 100.0, 50.0, 100.0]


def test_sums_of_pictures_give_the_mean_over_questions() -> None:
    score = AnswerScore.of(QUESTIONS, VALUES)
    assert score.sums.tolist() == [100.0, 200.0, 50.0]  # pictures 0, 4 and 9
    assert score.weights.tolist() == [1.0, 3.0, 1.0]
    assert score.sums.sum() / score.weights.sum() == pytest.approx(np.mean(VALUES))
    weighed = AnswerScore.of(QUESTIONS, VALUES, [1, 2, 3, 4, 5])
    assert weighed.weights.tolist() == [3.0, 8.0, 4.0]


def test_other_questions_or_references_have_another_digest() -> None:
    digest = AnswerScore.of(QUESTIONS, VALUES).digest
    assert AnswerScore.of(QUESTIONS, VALUES[::-1]).digest == digest
    for other in (asked(4, "z"), asked(4, "c", "no"), asked(5, "c")):
        assert AnswerScore.of([*QUESTIONS[:-1], other], VALUES).digest != digest


def test_a_file_of_them_is_read_by_comparisons_and_their_committed_table(tmp_path: Path) -> None:
    score = AnswerScore.of(QUESTIONS, VALUES)
    save_answer_scores({"answering.overall": score, "perplexity.bits_per_byte": score}, tmp_path / RANKS)
    assert load_answer_scores(tmp_path / RANKS)["answering.overall"].digest == score.digest
    kept = KeptRanks({"run": tmp_path}, {})
    digest, read = kept.scores("run", "", "answering.overall")
    assert digest == score.digest
    assert read.mean == pytest.approx(70)
    with pytest.raises(NoPictures, match=r"no yes_no\.accuracy"):
        kept.scores("run", "", "yes_no.accuracy")
    table = pictures_csv(kept, [("a", "run")], ["answering.overall", "perplexity.bits_per_byte"], {})
    assert table is not None
    assert "perplexity" not in table  # no percentage, so it has no place in a byte
    (tmp_path / "pictures.csv").write_text(table)
    digest, read = PictureTable(tmp_path / "pictures.csv").scores("a", "", "answering.overall")
    assert digest == score.digest
    assert read.queries.tolist() == [1, 3, 1]
    assert read.sums == pytest.approx(score.sums, abs=0.7)  # rounded to 1/240 of each picture's mean


def test_damaged_files_are_told(tmp_path: Path) -> None:
    path = tmp_path / RANKS
    path.write_bytes(b"damaged")
    with pytest.raises(ValueError, match="holds no scores of answers"):
        load_answer_scores(path)
    ones = np.ones(3)
    save_file({"a:sums": ones, "a:weights": np.ones(2)}, path, metadata={"a": "digest"})
    with pytest.raises(ValueError, match="has sums of shape"):
        load_answer_scores(path)
    save_file({"a:sums": ones}, path, metadata={"a": "digest"})
    with pytest.raises(ValueError, match="holds no scores of answers"):
        load_answer_scores(path)
    with pytest.raises(NoPictures, match="holds no scores of answers"):
        KeptRanks({"run": tmp_path}, {}).scores("run", "", "answering.overall")
