"""A source's name taken apart, and the options that every opener takes off it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from cmapkd.config import ConfigError, closest
from cmapkd.data.picked import PICKS, Pick
from cmapkd.data.stored import SampleFilter
from cmapkd.data.texts import CAPTIONS

PART = "part"  # the option that splits a source in two
TEXTS = "texts"  # the option that names keys or columns of further texts


@dataclass(slots=True)
class Spec:
    """A source's name taken apart: `kind:rest@split?key=value&key=value`."""

    text: str
    kind: str
    rest: str
    split: str | None  # named by the user
    default_split: str | None  # of whoever opens the source
    keep: SampleFilter
    options: dict[str, str] = field(default_factory=dict)
    pick: Pick = field(default_factory=Pick)

    def take(self, name: str) -> str | None:
        """An option's value, which then counts as used."""
        return self.options.pop(name, None)

    def take_int(self, name: str) -> int | None:
        text = self.options.pop(name, None)
        if text is not None and not text.isdecimal():
            raise ConfigError(f"data {self.text!r}: {name} must be a whole number, got {text!r}")
        return None if text is None else int(text)

    def take_float(self, name: str) -> float | None:
        text = self.options.pop(name, None)
        try:
            return None if text is None else float(text)
        except ValueError:
            raise ConfigError(f"data {self.text!r}: {name} must be a number, got {text!r}") from None

    def take_texts(self) -> tuple[str, ...]:
        """The keys or columns of further texts that the user names."""
        text = self.options.pop(TEXTS, None)
        names = () if text is None else tuple(name.strip() for name in text.split(","))
        for name in names:
            if not name or name == CAPTIONS:
                raise ConfigError(
                    f"data {self.text!r}: {TEXTS} names keys of further texts with commas between, such as "
                    f"{TEXTS}=negatives,paraphrases, but not {name!r}"
                    + (", which is the pool of a sample's own captions" if name else "")
                )
        return names

    def take_templates(self) -> tuple[str, ...]:
        """The sentences that the user makes of class names, each with `{}` where the name goes."""
        text = self.options.pop(CAPTIONS, None)
        if text is not None and self.pick.hidden:
            raise ConfigError(f"data {self.text!r}: captions made of class names tell the labels that are hidden")
        sentences = () if text is None else tuple(each.strip().strip("\"'") for each in text.split("|"))
        for sentence in sentences:
            if "{}" not in sentence:
                raise ConfigError(
                    f"data {self.text!r}: {CAPTIONS} makes captions of class names, such as {CAPTIONS}=a photo of a "
                    f"{{}}., but {sentence!r} has no {{}}. A column of captions is named by another option, see "
                    "docs/data.md."
                )
        return sentences

    def take_part(self) -> tuple[float, float] | None:
        """The part of the samples that is read, `0-0.9` for nine in ten; `0.4-1.2` goes on from 0 to 0.2."""
        text = self.options.pop(PART, None)
        if text is None:
            return None
        low, _, high = text.partition("-")
        try:
            found = float(low), float(high)
        except ValueError:
            found = (1.0, 0.0)
        if not (0 <= found[0] < 1 and found[0] < found[1] <= found[0] + 1):
            raise ConfigError(
                f"data {self.text!r}: {PART} is two numbers from 0 to 1, such as 0-0.9, or goes over 1 by less than a "
                f"round, such as 0.4-1.2; got {text!r}"
            )
        return found

    def take_pick(self) -> Pick:
        """Which samples are read, and whether with their labels."""
        ids, shots, draw = self.take("ids"), self.take_int("shots"), self.take_int("draw")
        labels = self.take("labels")
        if shots == 0:
            raise ConfigError(f"data {self.text!r}: shots is a number of samples of each class, >= 1")
        if draw is not None and shots is None:
            raise ConfigError(f"data {self.text!r}: draw says which samples of a class are read, but shots is not set")
        if labels not in (None, "hidden", "shown"):
            raise ConfigError(f"data {self.text!r}: labels must be hidden or shown, got {labels!r}")
        return Pick(None if ids is None else Path(ids).expanduser(), shots, draw or 0, labels == "hidden")

    def refuse_leftovers(self, known: tuple[str, ...]) -> None:
        """Called by every opener once it has taken its options and before it reads anything.

        Raises:
            ConfigError: an option is left that the kind does not have.
        """
        for name in self.options:
            every = (*known, *PICKS)
            if "limit" in known and self.kind != "scenes":
                every = (*known, CAPTIONS, PART, *PICKS)
            raise ConfigError(
                f"data {self.text!r}: unknown option {name!r}{closest(name, every)}. Known for {self.kind}: "
                f"{', '.join(every) or 'none'}."
            )

    def need_rest(self, example: str) -> str:
        if not self.rest:
            raise ConfigError(f"data {self.text!r} does not say what to read: write {example}")
        return self.rest
