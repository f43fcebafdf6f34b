"""What a model that sees nothing can reach: the commonest answer to each question, as training pictures have it.

    uv run python benchmarks/blind_answers.py

A question that no training picture asks gets the commonest answer to questions with the same first three words. Writes
docs/results/blind_answers.json: accuracy by VQA's rules, in per cent, of all questions and by kind.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

from cmapkd.data.open import open_source
from cmapkd.data.types import QuestionAnswer
from cmapkd.data.unseen import unseen
from cmapkd.evaluation.vqa import vqa_scores
from cmapkd.provenance import describe_environment

LEARNED, SCORED = "scenes?start=810000&length=10000", "scenes@test?start=80000&length=600"
JSON = Path("docs/results/blind_answers.json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--learned", default=LEARNED)
    parser.add_argument("--scored", default=SCORED)
    parser.add_argument("--json", type=Path, default=JSON)
    arguments = parser.parse_args()
    exact: defaultdict[str, Counter[str]] = defaultdict(Counter)
    alike: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for asked in questions(arguments.learned):
        exact[asked.question][asked.answers[0]] += 1
        alike[begin(asked.question)][asked.answers[0]] += 1
    scored = {str(number): asked for number, asked in enumerate(questions(arguments.scored))}
    said = {
        key: (exact.get(asked.question) or alike[begin(asked.question)]).most_common(1)[0][0]
        for key, asked in scored.items()
    }
    scores = vqa_scores(
        said,
        {key: list(asked.answers) for key, asked in scored.items()},
        kinds={key: asked.kind for key, asked in scored.items()},
    )
    kinds = Counter(asked.kind for asked in scored.values())
    result = {
        "learned": arguments.learned,
        "scored": arguments.scored,
        "questions": len(scored),
        "share_by_kind": {kind: 100 * count / len(scored) for kind, count in kinds.items()},
        "overall": scores.overall,
        "by_kind": scores.by_kind,
        "environment": describe_environment(),
    }
    arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps({key: result[key] for key in ("questions", "share_by_kind", "overall", "by_kind")}, indent=2))


def questions(spec: str) -> Iterator[QuestionAnswer]:
    source = open_source(spec)
    for index in range(len(source)):
        yield from unseen(source, index).questions


def begin(question: str) -> str:
    return " ".join(question.split()[:3])


if __name__ == "__main__":
    main()
