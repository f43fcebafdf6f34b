"""What each process of a group of one, two or four does for `test_evaluated_writers.py`. Names a folder."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import socket
import sys
import traceback
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing import get_context

sys.path.insert(0, str(Path(__file__).parents[1]))
from cmapkd.data.types import BadSampleError, QuestionAnswer, Sample
from cmapkd.evaluation import EvaluationConfig, caption_tools, evaluate
from cmapkd.evaluation.dialogues import descriptions, questions
from cmapkd.evaluation.probes.data import read_annotations
from cmapkd.evaluation.run import assist
from cmapkd.evaluation.share import ALONE, Share
from cmapkd.evaluation.tools import MissingToolError
from cmapkd.evaluation.writing import Writer
from cmapkd.run import RunConfig
from cmapkd.run.measure import share_of, validator_of
from cmapkd.training.processes import start_processes
from writers import Dialogues, make_writer


def no_java() -> str:
    """Of the COCO tool, which takes seconds to start: its scores are a function of what was written."""
    raise MissingToolError("no Java in these processes")


SIZES = (1, 2, 4)
LENGTHS = (13, 2)  # pictures of two questions each, in batches of four: six, and fewer than processes
BAD = 6
LONG = (2, 3, 8)  # pictures with a question of too many tokens; nothing of the first two can be asked
FAULTS = ("the first fails", "another fails", "nothing can be read")

CONFIG = RunConfig.from_mapping(
    {
        "student": "tiny_vlm:small",
        "method": "sft",
        "data": {"train": "scenes", "val": "scenes@val"},
        "training": {"steps": 2, "evaluate_every": 1, "device": "cpu"},
        "evaluation": {
            "tasks": ["answering", "yes_no", "describing", "perplexity"],
            "writing": {"batch_size": 4, "answer_tokens": 5, "caption_tokens": 9},
        },
    }
)
IN_SHARES = CONFIG.model_copy(update={"training": CONFIG.training.model_copy(update={"sharding": "fsdp2"})})
ON_CAPTIONS = {"tasks": ["perplexity"], "writing": {"batch_size": 4, "asks": "captions"}}


class Album:
    """Noise pictures with captions and two questions, of which some cannot be read."""

    name = "album"
    class_names = None

    def __init__(self, length: int, long: Mapping[int, int]) -> None:
        self.pictures, self.long = Dialogues(length, bad=(BAD,)), long  # how many questions of a picture are too long

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> Sample:
        sample, long = self.pictures[index], self.long.get(index, 0)
        first, second = (text * (40 if long > place else 1) for place, text in enumerate(("circle?", "How many?")))
        asked = (QuestionAnswer(first, (("yes", "no")[index % 2],), "yes/no"), QuestionAnswer(second, ("2",), "number"))
        return dataclasses.replace(sample, turns=(), captions=self.captions(index), questions=asked)

    def captions(self, index: int) -> tuple[str, ...]:
        return "a red circle", " ".join(["2 blue squares"] * (1 + index % 3))

    def fingerprint(self) -> str:
        return f"album-{len(self)}"


def album(length: int) -> Album:
    return Album(length, {index: 1 if index == LONG[-1] else 2 for index in LONG})


def make_model() -> tuple[Any, list[int]]:
    """A model in float32, and how many answers each of its batches had so far."""
    model, sizes = make_writer().float(), list[int]()
    write = model.generate

    def counted(inputs: Any, *more: Any) -> Any:
        answers = write(inputs, *more)
        sizes.append(len(answers))
        return answers

    model.generate = counted
    return model, sizes


def answers_of(model: Any, source: Any, share: Share, on_bad_sample: Any = "skip") -> dict[str, Any]:
    """What a writer keeps of questions, which it is asked twice, and of descriptions."""
    config, how = CONFIG.evaluation, CONFIG.evaluation.writing.resolved
    writer = Writer(model, source, config, torch.device("cpu"), None, on_bad_sample, share)
    if not share.leads:
        while (asked := share.asked()) is not None:
            writer.computed(**asked)
        return {}
    with share:
        said = read_annotations(source)
        written = [writer.written(questions(said, how), most=5) for _ in range(2)]
        written.append(writer.written(descriptions(said, how), most=9))
    return {
        "written": [[each and dataclasses.astuple(each) for each in answers] for answers in written],
        "bad": [*writer.bad.items()],
        "asked": [(index, dialogue[0].text) for index, dialogue in writer.asked],
        "counts": writer.counts(),
    }


def scored(model: Any, source: Any, config: EvaluationConfig, share: Share, file: Path | None = None) -> Any:
    if share.leads:
        return evaluate(model, source, config, device="cpu", share=share, ranks_file=file)
    return assist(model, source, config, device="cpu", share=share)


def find(length: int, size: int, out: Path) -> dict[str, Any]:
    """Everything of one source. Scores are those of the first process, and None in the others."""
    source: Any = album(length)
    share, (model, sizes) = share_of(CONFIG), make_model()
    assert share.of == size
    assert share_of(IN_SHARES) is ALONE
    found: dict[str, Any] = {"answers": answers_of(model, source, share), "sizes": [*sizes]}
    found["scores"] = scored(model, source, CONFIG.evaluation, share, out / f"answers-{length}-{size}.safetensors")
    found["of captions"] = scored(model, source, EvaluationConfig.from_mapping(ON_CAPTIONS), share)
    validator = validator_of(CONFIG, source)
    found["validation"] = validator(model) if share.leads else validator.assist(model)
    too_long: Any = Album(length, dict.fromkeys(range(length), 2))
    auto = CONFIG.evaluation.model_copy(update={"tasks": "auto"})
    found["too long"] = scored(model, too_long, auto, share)
    try:
        answers_of(model, Album(4, {3: 1}), share, "error")
    except BadSampleError as error:
        found["refused"] = str(error)
    return found


def work(rank: int, size: int, port: int, task: Callable[[int], None]) -> None:
    torch.set_num_threads(1)
    os.environ["PATH"] = ""  # without Java, whose metrics take long
    caption_tools.java = no_java  # type: ignore[assignment]
    if size > 1:
        os.environ |= {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": f"{size}"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}"}
        start_processes(on_cpu=True)
    task(rank)


def write_all(size: int, out: Path, rank: int) -> None:
    found = {length: find(length, size, out) for length in LENGTHS}
    (out / f"found-{size}-{rank}.json").write_text(json.dumps(found), encoding="utf-8")


def fail(fault: str, out: Path, rank: int) -> None:
    """One process fails where two evaluate; the error of each is written."""
    model, _ = make_model()
    if fault == FAULTS[rank]:
        model.generate = None  # which nobody can call
    long = dict.fromkeys(range(4), 2) if fault == FAULTS[-1] else {}
    try:
        scored(model, Album(4, long), CONFIG.evaluation, share_of(CONFIG))
    except Exception:
        (out / f"{fault}-{rank}.txt").write_text(traceback.format_exc(), encoding="utf-8")
        raise


def start(size: int, task: Callable[[int], None]) -> list[int | None]:
    """How the processes end; None where one does not."""
    context = get_context("fork")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [context.Process(target=work, args=(rank, size, port, task)) for rank in range(size)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    ends = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return ends


def main(out: Path) -> None:
    make_model()  # imports transformers: once, before the fork
    gc.freeze()
    for size in SIZES:
        if any(start(size, partial(write_all, size, out))):
            sys.exit(f"a process of {size} failed")
    ends = {fault: start(2, partial(fail, fault, out)) for fault in FAULTS}
    (out / "ends.json").write_text(json.dumps(ends), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
