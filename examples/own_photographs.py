# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # From a folder of photographs to a small model
#
# This notebook makes a student from your own photographs, scores it, uses it, and exports it.
# The notebook is a Python file in cells. Run it as a script, or open it in an editor that knows `# %%` cells:
#
#     uv sync --inexact --extra onnx
#     uv run python examples/own_photographs.py
#
# `jupytext --to ipynb examples/own_photographs.py` makes an `.ipynb` of it.

# %%
import csv
import os
from pathlib import Path

import cmapkd
from cmapkd.data.open import open_source
from cmapkd.export.origin import origin_of
from cmapkd.export.write import export_onnx

PICTURES = Path(os.environ.get("PICTURES", "runs/notebook/pictures"))  # your folder
OUT = Path(os.environ.get("OUT", "runs/notebook"))  # a new folder for what this notebook makes
TEACHER = os.environ.get("TEACHER", "tiny:scenes-teacher")  # for photographs: open_clip:ViT-B-32/laion2b_s34b_b79k
STUDENT = os.environ.get("STUDENT", "tiny:base")  # for photographs: timm:mobilenetv3_small_100.lamb_in1k/pretrained
STEPS = int(os.environ.get("STEPS", "60"))
BATCH = int(os.environ.get("BATCH", "64"))  # at most: fewer where there are fewer photographs

# %% [markdown]
# ## 1. The photographs
#
# Each photograph has a text file of the same name beside it: `beach.jpg` and `beach.txt`, one caption a line.
# Where you name no folder, the built-in world draws pictures, so that the notebook runs as it is.

# %%
if "PICTURES" not in os.environ and not PICTURES.exists():
    PICTURES.mkdir(parents=True)
    drawn = open_source("scenes?length=512", split="train")
    for index in range(len(drawn)):
        sample = drawn[index]
        sample.image.save(PICTURES / f"{index:04d}.jpg", quality=95)
        (PICTURES / f"{index:04d}.txt").write_text("\n".join(sample.captions), encoding="utf-8")

photographs = sorted(path for path in PICTURES.iterdir() if path.with_suffix(".txt").exists() and path.suffix != ".txt")
print(f"{len(photographs)} photographs with captions in {PICTURES}")
if len(photographs) < 20:
    raise SystemExit("they are too few for three parts that say anything: this notebook needs at least 20")

# %% [markdown]
# ## 2. Three parts
#
# The student learns from `train`. `val` chooses the best checkpoint. `test` is read once, for the final scores.
# The parts share no photograph.

# %%
if (OUT / "train.csv").exists():
    raise SystemExit(f"{OUT} holds what an earlier try made: name a new folder, OUT=...")
OUT.mkdir(parents=True, exist_ok=True)
parts = {"test": photographs[0::5], "val": photographs[1::5]}
held_back = {*parts["test"], *parts["val"]}
parts["train"] = [path for path in photographs if path not in held_back]
for part, members in parts.items():
    with (OUT / f"{part}.csv").open("x", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["filepath", "title"])
        for path in members:
            captions = path.with_suffix(".txt").read_text(encoding="utf-8").splitlines()
            table.writerows([path.resolve(), caption] for caption in captions if caption.strip())
print({part: len(members) for part, members in parts.items()})

# %% [markdown]
# ## 3. The student
#
# `baseline="scratch"` also trains the student without a teacher. The difference is what the teacher gave.

# %%
result = cmapkd.distill(
    teacher=TEACHER,
    student=STUDENT,
    method="cmapkd",
    data={part: f"csv:{OUT / part}.csv" for part in ("train", "val", "test")},
    training={"steps": STEPS, "batch_size": min(BATCH, len(parts["train"])), "device": "cpu"},
    optim={"warmup_steps": STEPS // 10},
    baseline="scratch",
    out=OUT / "run",
)

# %% [markdown]
# ## 4. The scores
#
# R@1 says how often the right caption, or the right photograph, comes first. Chance is 100 divided by their number.

# %%
for role in ("teacher", "student", "baseline"):
    scores = result.metrics[role]
    print(f"{role:9} {scores['params']:>11,} parameters   mean R@1 {scores['retrieval']['mean_r@1']:.1f} %")
print(f"measured on {result.metrics['student']['retrieval']['num_images']} photographs")

# %% [markdown]
# ## 5. A search
#
# `embed` gives unit vectors. Their products are cosines.

# %%
student = cmapkd.load(OUT / "run")
found = student.embed(images=parts["test"], texts=["something red", "something blue"])
for text, cosines in zip(("something red", "something blue"), found.similarity.T, strict=True):
    print(text, "->", parts["test"][int(cosines.argmax())].name)

# %% [markdown]
# ## 6. The export
#
# The ONNX files run without PyTorch. Each file is compared with the student before the folder gets its name.

# %%
parity = export_onnx(student, OUT / "onnx", origin=origin_of(str(OUT / "run")))
for path in sorted((OUT / "onnx" / "onnx").glob("*.onnx")):
    print(f"{path}  {path.stat().st_size / 1e6:.1f} MB")
