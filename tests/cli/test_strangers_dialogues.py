"""`cmapkd distill` on dialogues that strangers wrote: bad ones are counted with their reason, wrong models refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cli_support import run_here
from PIL import Image

SMALL = {"image_size": 16, "patch_size": 8, "vision_width": 16, "vision_layers": 1, "vision_heads": 2, "width": 16}
SMALL |= {"layers": 1, "heads": 2, "vocab_size": 300, "max_tokens": 96}


def asked(question: str, answer: str, **more: Any) -> dict[str, Any]:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": turns, "images": ["a.png"], **more}


BAD: dict[str, tuple[dict[str, Any], str]] = {  # what is wrong: (line, reason)
    "more placeholders than pictures": (asked("<image><image>Is it red?", "yes"), "2 placeholders of pictures, but 1"),
    "a placeholder without its picture": (
        asked("<image>Is it red?", "yes", images=[]),
        "1 placeholders of pictures, but 0",
    ),
    "an empty answer": (asked("<image>Is it red?", "  "), "answer"),
    "a control token in an answer": (asked("<image>Is it red?", "yes<|im_end|>no"), "control token '<|im_end|>'"),
    "a placeholder in an answer": (asked("<image>Is it red?", "see <image>"), "2 placeholders of pictures, but 1"),
    "too long": (asked("<image>" + "Is it red? " * 10, "yes"), "more than data.max_tokens=40"),
    "no answer": ({"messages": [{"role": "user", "content": "<image>Is it red?"}], "images": ["a.png"]}, ""),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("strangers")
    Image.linear_gradient("L").convert("RGB").resize((24, 20)).save(folder / "a.png")
    # with the bad ones four whole batches: one epoch reads every line
    good = [asked(f"<image>Is it red, number {number}?", "yes" if number % 2 else "no") for number in range(25)]
    lines = good + [line for line, _ in BAD.values()]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def ends(data: Path) -> dict[str, tuple[int, str]]:
    """What the commands say that stand below, run one after the other."""
    sizes = [f"student.options.{name}={value}" for name, value in SMALL.items()]
    common = [
        f"data.train=jsonl:{data / 'data.jsonl'}",
        "student=tiny_vlm:small",
        *sizes,
        "training.batch_size=8",
        "training.device=cpu",
        "data.workers=0",
        "data.max_tokens=40",
    ]

    def distill(out: str, *more: str) -> list[str]:
        return ["distill", str(data / "recipe.yaml"), *common, *more, "--out", str(data / out)]

    (data / "recipe.yaml").write_text(
        "student: tiny_vlm:small\ndata: {train: scenes}\nmethod: sft\ntraining: {epochs: 1}\n", encoding="utf-8"
    )
    teacher = str(data / "counted" / "student")
    template = data / "counted" / "student" / "chat_template.jinja"
    commands = {
        "counted": distill("counted", "data.max_bad_share=0.5"),
        "too many": distill("many", "data.max_bad_share=0.01"),
        "distilled": distill("distilled", "data.max_bad_share=0.5", "method=token_kd", f"teacher={teacher}"),
        "stopped": distill("stopped", "data.on_bad_sample=error"),
        "other tokens": distill(
            "other", "method=token_kd", f"teacher={teacher}", "student.options.tokenizer=own",
            "data.train=scenes?length=40&size=32",
        ),
        "two towers": distill("towers", "method=token_kd", "teacher=tiny:scenes-teacher"),
    }  # fmt: skip
    found = {name: run_here(command) for name, command in commands.items()}
    if template.exists():
        template.write_text(template.read_text().replace("add_generation_prompt", "false"))
        found["no generation prompt"] = run_here(distill("late", "method=token_kd", f"teacher={teacher}"))
    return found


def test_bad_dialogues_are_counted_with_their_reason(ends: dict[str, tuple[int, str]], data: Path) -> None:
    code, said = ends["counted"]
    assert code == 0, said
    for out in ("counted", "distilled"):
        lines = [json.loads(line) for line in (data / out / "bad_samples.jsonl").read_text().splitlines()]
        reasons = [line["reason"] for line in lines]
        assert len(reasons) == len(BAD), reasons
        for what, (_, reason) in BAD.items():
            assert any(reason in each for each in reasons), (what, reasons)
    assert ends["distilled"][0] == 0, ends["distilled"][1]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("too many", "max_bad_share"),
        ("stopped", "sample '"),
        ("other tokens", "different tokenizers"),
        ("two towers", "token_kd needs a teacher that writes, and tiny"),
        ("no generation prompt", "has no generation prompt"),
    ],
)
def test_what_cannot_be_learned_from_is_refused_in_words(
    ends: dict[str, tuple[int, str]], command: str, message: str
) -> None:
    code, said = ends[command]
    assert code != 0
    assert message in " ".join(said.split()), said
    assert "Traceback" not in said
