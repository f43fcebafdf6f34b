"""What each process of a group of one, two or four does for `test_evaluated_processes.py`. Names a folder."""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing import get_context

sys.path.insert(0, str(Path(__file__).parents[1]))
from cmapkd.data.open import open_source
from cmapkd.data.types import BadSampleError, Sample, Source
from cmapkd.evaluation import EvaluationConfig, evaluate
from cmapkd.evaluation.embed import embed
from cmapkd.evaluation.run import assist
from cmapkd.evaluation.share import ALONE, Share
from cmapkd.models import build_model
from cmapkd.run import vocabulary_captions
from cmapkd.training.processes import patient_group, start_processes

SIZES = (1, 2, 4)
LENGTHS = (43, 5)  # with batches of four: eleven, and fewer than processes
BAD = (2, 8, 9, 10, 11, 30)  # a whole batch of them, and others


class SomeBad:
    """Scenes of which some cannot be read."""

    def __init__(self, source: Source) -> None:
        self.source, self.name, self.class_names = source, source.name, source.class_names

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Sample:
        if index in BAD:
            raise BadSampleError(f"bad-{index}", "torn")
        return self.source[index]

    def fingerprint(self) -> str:
        return self.source.fingerprint()


def work(rank: int, size: int, port: int, out: Path) -> None:
    torch.set_num_threads(1)
    share = ALONE
    if size > 1:
        os.environ |= {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": f"{size}"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}"}
        start_processes(on_cpu=True)
        share = Share(rank, size, patient_group())
    found: dict[str, Any] = {}
    for length in LENGTHS:
        source: Any = SomeBad(open_source(f"scenes@val?length={length}&size=32"))
        torch.manual_seed(3)
        model = build_model("tiny:debug", captions=vocabulary_captions(open_source("scenes?length=40&size=32")))
        if not share.leads:
            assert share.asked()  # levels are wanted
        embedded = embed(model, source, batch_size=4, device="cpu", levels=True, share=share)
        if share.leads:
            arrays = {"images": embedded.images, "texts": embedded.texts, "of": embedded.image_of_text}
            arrays |= {f"image {name}": rows for name, rows in embedded.image_levels.items()}
            arrays |= {f"text {name}": rows for name, rows in embedded.text_levels.items()}
            torch.save(arrays | {"labels": embedded.labels}, out / f"embedded-{length}-{size}.pt")
            found[f"told {length}"] = [embedded.ids, embedded.captions, embedded.bad]
        else:
            assert not len(embedded.images)
        config = EvaluationConfig(batch_size=4, tasks=("retrieval", "zero_shot", "compositional"))
        if share.leads:
            found[f"scores {length}"] = evaluate(model, source, config, device="cpu", share=share)
        else:
            assist(model, source, config, device="cpu", share=share)
        try:
            if share.leads:
                with share:
                    embed(model, source, batch_size=4, device="cpu", on_bad_sample="error", share=share)
            else:
                assist(model, source, config, device="cpu", on_bad_sample="error", share=share)
        except BadSampleError as error:
            found[f"refused {length}"] = str(error)
    (out / f"found-{size}-{rank}.json").write_text(json.dumps(found), encoding="utf-8")


def main(out: Path) -> None:
    context = get_context("fork")
    for size in SIZES:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        processes = [context.Process(target=work, args=(rank, size, port, out)) for rank in range(size)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            sys.exit(f"a process of {size} failed")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
