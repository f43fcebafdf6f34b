"""Parameters by name: which part of a model each one belongs to, and which ones weight decay leaves alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from cmapkd.config import ConfigError

DUAL_PARTS = ("image", "text", "projections", "scale")
"""The parts of every dual encoder: the towers, what leads from them to the joint space, logit scale and bias."""

# Owners of parameters that say where a token stands, or that are tokens themselves: they have no direction to shrink.
_PLACES = ("position", "positions", "position_embedding", "position_embeddings", "positional_embedding", "pos_embed")
_TOKENS = ("class_embedding", "class_token", "cls_token", "cls_emb", "dist_token", "reg_token", "register_tokens")
_SCALES = ("logit_scale", "log_logit_scale", "logit_bias")
_UNDECAYED = frozenset((*_PLACES, "relative_position_bias_table", *_TOKENS, *_SCALES))


def split_by_name(names: Iterable[str], prefixes: Mapping[str, Iterable[str]]) -> dict[str, frozenset[str]]:
    """Names by the part whose prefix is the longest that fits; a part that no name belongs to is empty.

    Names that begin with no prefix, as of parameters that a subclass adds, make a further part, `added`.
    """
    lengths = {prefix: part for part, found in prefixes.items() for prefix in found}
    parts: dict[str, set[str]] = {part: set() for part in prefixes}
    for name in names:
        fitting = [prefix for prefix in lengths if name == prefix or name.startswith(f"{prefix}.")]
        part = lengths[max(fitting, key=len)] if fitting else "added"
        parts.setdefault(part, set()).add(name)
    return {part: frozenset(found) for part, found in parts.items()}


def refuse_empty(parts: Mapping[str, frozenset[str]], named: Iterable[str], *, where: str) -> None:
    """Refuses a part without weights, since a setting of it would do nothing.

    Raises:
        ConfigError: names the part.
    """
    for part in named:
        if not parts.get(part):
            raise ConfigError(
                f"{where} names {part}, which has no weights of its own here (a head that is tied to the words belongs "
                f"to embeddings): name parts of {', '.join(name for name, held in parts.items() if held)}"
            )


def within(outer: str, parts: Mapping[str, frozenset[str]]) -> dict[str, frozenset[str]]:
    """The same parts with the names that they have in a model that holds this one as `outer`."""
    return {part: frozenset(f"{outer}.{name}" for name in names) for part, names in parts.items()}


def joined_parts(*several: Mapping[str, frozenset[str]]) -> dict[str, frozenset[str]]:
    """Parts of the same name put together."""
    names = dict.fromkeys(name for parts in several for name in parts)
    return {name: frozenset().union(*(parts.get(name, frozenset()) for parts in several)) for name in names}


def undecayed(model: nn.Module) -> frozenset[str]:
    """Names of the parameters that weight decay leaves alone, whatever their shape.

    These are positions, class, register and prompt tokens, logit scale and bias, and the parameters that a module
    of the model (timm's and open_clip's have such a list) names in `no_weight_decay()`. Vectors, as gains and
    biases, are not listed: an optimizer leaves them out by their number of axes.
    """
    names = {name for name, _ in model.named_parameters()}
    found = {name for name in names if _owner(name) in _UNDECAYED}
    for prefix, module in model.named_modules():
        listed = getattr(module, "no_weight_decay", None) if prefix else None  # the model's own asks this function
        if callable(listed):
            found |= {f"{prefix}.{name}" for name in listed()}
    return frozenset(found & names)


def word_tables(model: nn.Module, words: int) -> list[nn.Embedding]:
    """The tables of token vectors in a model that knows so many words; tables of places are none."""
    return [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and module.num_embeddings >= words and _owner(name) not in _PLACES
    ]


def _owner(name: str) -> str:
    """The last word of a parameter's name that says what it is: `position_embedding` of `position_embedding.weight`."""
    words = name.split(".")
    last = words[-2] if words[-1] in ("weight", "bias") and len(words) > 1 else words[-1]
    return last.lstrip("_")
