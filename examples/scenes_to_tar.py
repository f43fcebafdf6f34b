"""Writes scenes as a tar shard: comparisons that show few of them many times need not draw them in every epoch.

    python examples/scenes_to_tar.py "scenes?wrong=0.3&length=3072" runs/noisy.tar

Read it with `webdataset:runs/noisy.tar`. Synthetic captions are in it, as DataCompDR stores them.
"""

from __future__ import annotations

import io
import json
import sys
import tarfile
from pathlib import Path

from cmapkd.data.open import open_source


def main(name: str, out: Path) -> None:
    source = open_source(name, split="train")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(out, "w") as shard:
        for index in range(len(source)):
            sample = source[index]
            png = io.BytesIO()
            sample.image.save(png, "PNG")
            said = {"id": sample.id, "captions": sample.captions, "label": sample.label}
            members = {
                "png": png.getvalue(),
                "json": json.dumps(said).encode(),
                "syn.json": json.dumps({"syn_text": sample.texts["synthetic"]}).encode(),
            }
            for field, data in members.items():
                info = tarfile.TarInfo(f"{index:06d}.{field}")
                info.size = len(data)
                shard.addfile(info, io.BytesIO(data))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
