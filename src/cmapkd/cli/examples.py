"""Two examples for the help of each command."""

from __future__ import annotations

EXAMPLES: dict[str, tuple[str, str]] = {
    "demo": ("cmapkd demo training.steps=300 --out runs/demo", "cmapkd demo generative teacher=runs/teacher"),
    "init": ("cmapkd init my_photos", "cmapkd init train.csv --max-mb 20 --max-ms 10 --out my_recipe.yaml"),
    "distill": (
        "cmapkd distill my_recipe.yaml --out runs/first",
        "cmapkd distill clip_kd_scenes training.steps=500 seed=1 --out runs/second",
    ),
    "finalize": ("cmapkd finalize runs/stopped", "cmapkd finalize runs/stopped --step best"),
    "doctor": ("cmapkd doctor my_recipe.yaml", "cmapkd doctor my_recipe.yaml training.batch_size=1024"),
    "evaluate": (
        "cmapkd evaluate runs/first --data csv:test.csv --json scores.json",
        "cmapkd evaluate tiny:scenes-teacher runs/first --data scenes --tasks retrieval,efficiency",
    ),
    "export": (
        "cmapkd export runs/first --out phone",
        "cmapkd export runs/first --precision fp32,fp16 --data csv:test.csv --out phone",
    ),
    "report": ("cmapkd report runs/first", "cmapkd report runs/first phone --gallery 6 --out report.html"),
    "compare": (
        "cmapkd compare demo --arms 'clip_kd: method=clip_kd' 'hinton: method=hinton' --seeds 0 1 --out compared",
        "cmapkd compare comparison.yaml --dry-run",
    ),
    "select": (
        "cmapkd select folder:train --by balance --budget 100 --out ids.txt",
        "cmapkd select folder:train --by pcoreset --model runs/first --labelled ids.txt --budget 40 --out more.txt",
    ),
    "engine": (
        "cmapkd engine mpa_scenes --out runs/mpa",
        "cmapkd engine mpa_scenes models.small=runs/first data=csv:photos.csv --out runs/mine",
    ),
    "methods": ("cmapkd methods", "cmapkd methods clip_kd"),
    "models": ("cmapkd models", "cmapkd models timm mobilenetv3"),
    "settings": ("cmapkd settings training", "cmapkd settings learning_rate"),
    "build": ("cmapkd cache build my_recipe.yaml", "cmapkd cache build my_recipe.yaml --all"),
    "info": ("cmapkd cache info caches/mine", "cmapkd cache info caches/mine --json"),
    "verify": ("cmapkd cache verify caches/mine", "cmapkd cache verify caches/mine --remove-damaged"),
}


def examples(command: str) -> str:
    """The end of a command's help; empty for one that has none, which a test refuses."""
    lines = [f"  {line}" for line in EXAMPLES.get(command, ())]
    return "\b\n" + "\n".join(["Examples:", *lines]) if lines else ""
