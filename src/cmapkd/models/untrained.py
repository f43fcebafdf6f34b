"""Towers that nobody has trained: a model by a name without weights is random, and scores at chance."""

from __future__ import annotations

from cmapkd.models.base import DualEncoder


def remark_on_untrained(model: DualEncoder) -> str | None:
    """One line that says which towers have random weights, and what to name instead; None where none has."""
    if not getattr(model, "random_towers", ()):
        return None
    towers = " and ".join(model.random_towers)
    what = f"{model.name} is untrained" if len(model.random_towers) > 1 else f"the {towers} tower is untrained"
    return (
        f"{what}: its weights are random{'' if model.name in what else f' ({model.name})'}. Name trained ones, such as "
        "open_clip:ARCHITECTURE/TAG, a model's folder, or a checkpoint."
    )
