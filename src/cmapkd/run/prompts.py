"""The prompts that models of run folders were trained with, for who evaluates them later."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from cmapkd.config import ConfigError, load_mapping
from cmapkd.data.config import PromptConfig


def prompts_of_runs(folders: Iterable[Path]) -> tuple[PromptConfig | None, str]:
    """What all run folders among these were asked in, and a sentence about it.

    Args:
        folders: some of them runs; others say nothing.
    Returns:
        None and an empty sentence where there is no run; None and a warning where runs differ.
    """
    found: dict[Path, PromptConfig] = {}
    for folder in folders:
        if (folder / "config.yaml").is_file():
            try:
                data = load_mapping(folder / "config.yaml").get("data")
                prompts = data.get("prompts") if isinstance(data, dict) else None
                found[folder] = PromptConfig.from_mapping(prompts or {}, where=f"data.prompts of {folder}")
            except ConfigError:  # a run's config says nothing where it is damaged; its model may still be whole
                continue
    asked = {(each.kind, each.suffix, each.plain_captions) for each in found.values()}
    if not asked:
        return None, ""
    if len(asked) > 1:
        return None, (
            "warning: the runs were trained with different prompts, and all models are asked in the same words: choose "
            "them with --set writing.question_suffix=... and --set writing.instruction=..."
        )
    folder, prompts = next(iter(found.items()))
    if prompts.suffix or prompts.plain_captions or prompts.kind != "auto":
        return prompts, f"asked as {folder} was trained (data.prompts); --set writing... changes it"
    return prompts, ""
