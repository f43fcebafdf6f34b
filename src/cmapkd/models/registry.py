"""Model names: `family:rest`, the same everywhere, each built by its adapter; and folders that were saved by us."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Protocol, Self

from pydantic import Field, model_serializer, model_validator

from cmapkd.config import Config, ConfigError, closest
from cmapkd.models.base import DualEncoder
from cmapkd.models.inherit import DepthRule, inherit_weights
from cmapkd.models.storage import DESCRIPTION, read_description

FAMILIES = ("open_clip", "hf", "timm", "tiny")
JOINED = "joined"  # of folders only: two models' towers, see `JoinedEncoder`


class InheritConfig(Config):
    """Where a model's first weights are cut from. In a recipe the name alone is enough: `inherit: teacher`."""

    name: str = Field(description="teacher: the run's first teacher; or a larger model by name or folder.")
    depth: DepthRule = Field(
        "official", description="official: every n-th layer, as TinyCLIP's code; uniform: spread from first to last."
    )

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, values: Any) -> Any:
        return {"name": str(values)} if isinstance(values, str | Path) else values


class ModelConfig(Config):
    """A model by name. In a recipe the name alone is enough: `teacher: open_clip:ViT-L-14/openai`."""

    name: str = Field(description="family:model, or a folder saved by cmapkd. See docs/models.md.")
    init: Literal["auto", "scratch"] = Field(
        "auto", description="auto: the weights the name stands for; scratch: its architecture with random weights."
    )
    checkpoint: Path | None = Field(None, description="Weight file loaded over the built model (every name must fit).")
    options: dict[str, Any] = Field(
        default_factory=dict, description="The family's own settings, for example image_size."
    )
    inherit: InheritConfig | None = Field(None, description="Begin with slices of a larger model's weights.")

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, values: Any) -> Any:
        return {"name": str(values)} if isinstance(values, str | Path) else values

    @model_serializer(mode="wrap")
    def _without_default(self, handler: Any) -> dict[str, Any]:
        """A model that inherits nothing is written as it was before models could."""
        values: dict[str, Any] = handler(self)
        return values if self.inherit is not None else {key: value for key, value in values.items() if key != "inherit"}

    @model_validator(mode="after")
    def _weights_have_one_origin(self) -> Self:
        if self.inherit is not None and self.checkpoint is not None:
            raise ValueError("checkpoint replaces every weight that inherit would set: give one of the two")
        return self

    @model_validator(mode="after")
    def _known_family(self) -> Self:
        family, colon, rest = self.name.partition(":")
        if colon and family not in FAMILIES and not Path(self.name).exists():
            raise ValueError(
                f"unknown model family {family!r} in {self.name!r}{closest(family, FAMILIES)}; "
                f"known: {', '.join(FAMILIES)}"
            )
        if colon and family in FAMILIES and not rest:
            raise ValueError(f"{self.name!r} names no model after the colon, write for example tiny:small")
        return self


class Family(Protocol):
    """What an adapter module offers: `build` from a name, `load` from a folder that its `save` wrote."""

    def build(self, rest: str, config: ModelConfig, captions: Iterable[str] | None) -> DualEncoder: ...

    def load(self, folder: Path, description: dict[str, Any]) -> DualEncoder: ...


def _family(name: str) -> Family:
    """The adapter module, imported only when asked for: each library takes seconds."""
    if name == "open_clip":
        from cmapkd.models import open_clip_family as family
    elif name == "hf":
        from cmapkd.models import hf_family as family  # type: ignore[no-redef]
    elif name == "timm":
        from cmapkd.models import timm_family as family  # type: ignore[no-redef]
    elif name == "tiny":
        from cmapkd.models import tiny_family as family  # type: ignore[no-redef]
    elif name == JOINED:
        from cmapkd.models import joined as family  # type: ignore[no-redef]
    else:
        raise ValueError(f"unknown model family {name!r}{closest(name, FAMILIES)}; known: {', '.join(FAMILIES)}")
    return family


def build_model(
    config: ModelConfig | str, *, captions: Iterable[str] | None = None, teacher: DualEncoder | None = None
) -> DualEncoder:
    """The model that `config` names, in eval mode, float32, on the CPU.

    Args:
        captions: training texts, read only by an untrained `tiny` model to learn its vocabulary.
        teacher: what `inherit: teacher` takes the weights from.
    Raises:
        ConfigError: the name or an option is unknown, or there is nothing to inherit from.
        ValueError: weights are missing or do not fit.
    """
    config = ModelConfig.from_mapping(config, where="model") if isinstance(config, str) else config
    folder = Path(config.name)
    family, colon, rest = config.name.partition(":")
    if family in FAMILIES and colon:
        with explained(config.name) if Path(rest).exists() else nullcontext():
            model = _family(family).build(rest, config, captions)
    elif folder.is_dir():
        if config.options:
            raise ConfigError(
                f"model folder {folder} fixes its architecture: options {sorted(config.options)} do not apply"
            )
        model = load_model(folder)
        if config.init == "scratch":
            raise ConfigError(f"init: scratch needs a family name; {folder} is a trained model's folder")
        if config.inherit is not None:
            raise ConfigError(f"inherit would replace every weight of the trained model in {folder}: name a family's")
    else:
        raise ConfigError(
            f"there is no model {config.name!r}: it is no folder, and names no family "
            f"({', '.join(name + ':' for name in FAMILIES)})"
        )
    if config.inherit is not None:
        model = _inherited(model, config.inherit, teacher)
    if config.checkpoint is not None:
        model.load_checkpoint(config.checkpoint)
    return model.eval()


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Files that are damaged or odd make the libraries raise anything; here it becomes an error that names them.

    Raises:
        ValueError: with the library's own words, and its error as the cause.
    """
    try:
        yield
    except (ConfigError, MemoryError):
        raise
    except Exception as error:
        if type(error) is ValueError:  # ours, or in words
            raise
        detail = str(error).strip().split("\n")[0][:300]
        raise ValueError(
            f"{what} is damaged or of a kind that is not supported ({type(error).__name__}: {detail}): copy or export "
            "it again"
        ) from error


def _inherited(model: DualEncoder, config: InheritConfig, teacher: DualEncoder | None) -> DualEncoder:
    if config.name == "teacher" and teacher is None:
        raise ConfigError("inherit: teacher, but there is no teacher here: name a model or a folder")
    source = teacher if config.name == "teacher" and teacher is not None else build_model(config.name)
    model = model.with_tokenizer_of(source)
    inherit_weights(model, source, depth=config.depth)
    return model


def load_model(folder: str | Path) -> DualEncoder:
    """A model that cmapkd saved: a `student/` folder, or the run folder around it.

    Raises:
        ValueError: no model is there, or its files do not fit.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"there is no model folder {folder}")
    if not (folder / DESCRIPTION).exists() and (folder / "student" / DESCRIPTION).exists():
        folder = folder / "student"
    description = read_description(folder)
    with explained(f"model folder {folder}"):
        return _family(str(description["family"])).load(folder, description).eval()


def packaged_models() -> dict[str, Path]:
    """Trained models that ship with cmapkd, by the name they have after `tiny:`."""
    root = Path(str(resources.files("cmapkd"))) / "weights"
    return (
        {entry.name: entry for entry in sorted(root.iterdir()) if (entry / DESCRIPTION).exists()}
        if root.is_dir()
        else {}
    )
