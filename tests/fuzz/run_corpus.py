"""Reads the corpus and writes how it ended, by kind.

PYTHONPATH=src:tests:tests/fuzz python tests/fuzz/run_corpus.py --inputs 40 --json docs/results/malformed.json
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=40, help="of each kind")
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    parser.add_argument("--kinds", nargs="*", default=None)
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        os.environ.update(
            XDG_CACHE_HOME=cache, HF_HOME=f"{cache}/hf", HF_HUB_OFFLINE="1", HF_DATASETS_DISABLE_PROGRESS_BARS="1"
        )
        from corpus import KINDS, outcome

        found, failures = {}, []
        for kind in arguments.kinds or KINDS:
            start = time.monotonic()
            ends: Counter[str] = Counter()
            for seed in range(arguments.first, arguments.first + arguments.inputs):
                end = outcome(kind, seed)
                ends[end.ending] += 1
                if end.ending == "failure":
                    failures.append({"kind": kind, "seed": seed, "detail": end.detail})
                    print(f"  {kind} {seed}: {end.detail}", file=sys.stderr, flush=True)
            found[kind] = {
                "inputs": arguments.inputs,
                **{name: ends[name] for name in ("refused", "skipped", "read", "failure")},
            }
            print(f"{kind:24} {dict(ends)} {time.monotonic() - start:.1f} s", flush=True)
    total = {
        name: sum(each[name] for each in found.values()) for name in ("inputs", "refused", "skipped", "read", "failure")
    }
    print(f"{len(found)} kinds: {total}")
    if arguments.json is not None:
        content = {"first": arguments.first, "kinds": found, "total": total, "failures": failures}
        arguments.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
