"""A list of `cmapkd engine` with the answers of other pictures: a control of what answers say about their picture.

    uv run python benchmarks/shuffled_answers.py runs/hops/kept.jsonl

Writes shuffled.jsonl beside the list. Answers change places among questions of the same words: each
picture gets the answer of the next one of which the same was asked. So every answer is as frequent as before.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("list", type=Path)
    path = parser.parse_args().list
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in shuffled(lines))
    out = path.with_name("shuffled.jsonl")
    out.write_text(text, encoding="utf-8")
    print(out)


def shuffled(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines, each answer replaced by that of the next question of the same words."""
    asked: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        for each in line["qa"]:
            asked.setdefault(each["question"], []).append(each)
    following = {
        each["question_id"]: after["answer"]
        for same in asked.values()
        for each, after in zip(same, [*same[1:], same[0]], strict=True)
    }
    return [
        {**line, "qa": [{**each, "answer": following[each["question_id"]]} for each in line["qa"]]} for line in lines
    ]


if __name__ == "__main__":
    main()
