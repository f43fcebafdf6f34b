"""`Classifier`: an image tower with linear heads over named classes, and the rule by which the heads answer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from cmapkd.config import Config, counted
from cmapkd.data.types import ModelInput
from cmapkd.models.architecture import settings_text
from cmapkd.models.base import ImageEncoder, eval_mode
from cmapkd.models.embedding import Picture, rows_of_images
from cmapkd.models.image_tower import ImageTower
from cmapkd.models.no_texts import NoTexts
from cmapkd.models.parts import split_by_name
from cmapkd.models.storage import write_model_folder
from cmapkd.models.types import Features, LevelRequest, TowerFeatures


class ClassHeadConfig(Config):
    """What a head makes of the tower's features f: scale (W x + b), where x is f or f / ‖f‖."""

    unit: bool = Field(False, description="Whether it reads features of length one.")
    scale: float = Field(1.0, gt=0, description="Multiplies its scores.")


class AnswerRule(Config):
    """How the heads' scores z become probabilities: α σ(z of the first) + (1 - α) σ(z of the second / β)."""

    heads: tuple[str, ...] = Field(min_length=1, max_length=2, description="One head, which answers alone; or two.")
    alpha: float = Field(1.0, ge=0, le=1, description="Weight of the first head's probabilities.")
    beta: float = Field(1.0, gt=0, description="Temperature of the second head.")

    @model_validator(mode="after")
    def _one_answers_alone(self) -> Self:
        if len(self.heads) == 1 and (self.alpha, self.beta) != (1.0, 1.0):
            raise ValueError(f"head {self.heads[0]} answers alone: alpha and beta are 1")
        return self


class Classifier(ImageEncoder):
    """An image tower whose features linear heads read, each with a score for every class.

    A recipe names the tower alone. The method gives the model its classes and heads, since the data name the classes.
    A tower that does not learn stays in eval mode.

    Attributes:
        image: the tower; its pooled features are the embeddings, not normalised.
        heads: by name.
        class_names: by label; empty before the model has heads.
        rule: which heads answer, and how; None before the model has heads.
    """

    does: ClassVar[str] = "classifies pictures"

    def __init__(self, tower: ImageTower, *, name: str) -> None:
        super().__init__()
        self.image, self.name = tower, name
        self.heads = nn.ModuleDict()
        self.head_configs: dict[str, ClassHeadConfig] = {}
        self.class_names: tuple[str, ...] = ()
        self.rule: AnswerRule | None = None
        self.embed_dim, self.image_spec, self.image_levels = tower.width, tower.spec, tower.levels
        self.tokenizer = NoTexts()

    def set_heads(
        self, class_names: Sequence[str], heads: Mapping[str, ClassHeadConfig], rule: AnswerRule | None = None
    ) -> None:
        """Gives the model its classes and heads, with random weights; heads that it has already stay as they are.

        Args:
            rule: none: the first head answers.
        Raises:
            ValueError: there are fewer than two classes, no heads, a rule that names others, or the model has learned
                other classes.
        """
        names = tuple(class_names)
        if len(names) < 2:
            raise ValueError(f"a classifier tells classes apart, and there {'is' if names else 'are'} {list(names)}")
        if self.class_names not in ((), names):
            raise ValueError(
                f"{self.name} has learned {counted(len(self.class_names), 'class')}, {_few(self.class_names)}, and the "
                f"data have {len(names)}, {_few(names)}: begin with a tower instead, or name data with its classes"
            )
        rule = rule or AnswerRule(heads=(next(iter(heads), ""),))
        if missing := [head for head in rule.heads if head not in heads]:
            raise ValueError(f"the rule names heads {', '.join(missing)}, and there are {', '.join(heads) or 'none'}")
        kept = {name: self.heads[name] for name in heads if self.head_configs.get(name) == heads[name]}
        device = self.device
        self.heads = nn.ModuleDict(
            {name: kept.get(name) or nn.Linear(self.embed_dim, len(names)).to(device) for name in heads}
        )
        self.class_names, self.head_configs, self.rule = names, dict(heads), rule

    @property
    def architecture(self) -> str:
        return settings_text(self, self.describe())

    @property
    def parts(self) -> Mapping[str, frozenset[str]]:
        prefixes = {"image": ("image",), "heads": ("heads",)}
        return split_by_name((name for name, _ in self.named_parameters()), prefixes)

    @property
    def image_blocks(self) -> tuple[nn.Module, ...]:
        return self.image.blocks

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self._settle()
        return self

    def _settle(self) -> None:
        mode = self.training and any(parameter.requires_grad for parameter in self.image.parameters())
        if self.image.training != mode:
            self.image.train(mode)

    def encode_image(self, images: Float[Tensor, "batch 3 height width"], levels: Sequence[str] = ()) -> TowerFeatures:
        self.check_levels("image", levels)
        self._settle()
        tower: TowerFeatures = self.image(images, levels)
        return tower

    def forward(self, inputs: ModelInput, needs: LevelRequest | None = None) -> Features:
        """The tower's features in the place of an image embedding; texts have width 0, and the logit scale is 1."""
        levels = needs.image_levels if needs is not None else ()
        image = self.encode_image(self.image_spec.to_model(inputs.images), levels)
        one = image.embedding.new_ones(())
        return Features(image, TowerFeatures(image.embedding.new_empty(len(image.embedding), 0)), one)

    def logits(self, head: str, features: Float[Tensor, "batch width"]) -> Float[Tensor, "batch classes"]:
        """A head's scores of what `encode_image` gives; of a head that reads unit features float32 or wider.

        Its product is taken outside autocast: in bf16, at a scale of 100, scores would be off by parts of a nat.
        """
        config, linear = self.head_configs[head], self.heads[head]
        assert isinstance(linear, nn.Linear)
        if not config.unit:
            scores: Tensor = linear(features)
        else:
            wide = torch.promote_types(torch.promote_types(features.dtype, linear.weight.dtype), torch.float32)
            with torch.autocast(features.device.type, enabled=False):
                unit = F.normalize(features.to(wide), dim=-1)
                scores = F.linear(unit, linear.weight.to(wide), linear.bias.to(wide))
        return scores if config.scale == 1.0 else scores * config.scale

    def probabilities(self, logits: Mapping[str, Float[Tensor, "batch classes"]]) -> Float[Tensor, "batch classes"]:
        """What the rule makes of the heads' scores, in float32 or wider.

        Raises:
            ValueError: the model has no heads yet.
        """
        if self.rule is None:
            raise ValueError(f"{self.name} has no heads yet: a method gives it some")
        first, *second = self.rule.heads
        return mixed(logits[first], logits[second[0]] if second else None, alpha=self.rule.alpha, beta=self.rule.beta)

    @torch.no_grad()
    def classify(self, images: Picture | Iterable[Picture], *, batch_size: int = 64) -> Float[Tensor, "images classes"]:
        """Probabilities of `class_names`, by the stored rule, float32, on the CPU; each row sums to 1.

        The model computes on the device where it is, in eval mode, without gradient; its modes are restored after.

        Args:
            images: paths, bytes of image files or PIL images, one or many.
            batch_size: how many are read at once; without influence on the result beyond rounding.
        Raises:
            ValueError: the model has no heads yet, or `batch_size` is below 1.
            FileNotFoundError, BadSampleError, TypeError: as `DualEncoder.embed`.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}: give a whole number >= 1")

        def answer(pixels: Tensor) -> Tensor:
            features = self.encode_image(pixels.to(self.device)).embedding
            return self.probabilities({name: self.logits(name, features) for name in self.heads})

        with eval_mode(self):
            return rows_of_images(images, self.image_spec, answer, dim=len(self.class_names), batch_size=batch_size)

    def write(self, folder: Path) -> None:
        with eval_mode(self):
            write_model_folder(
                folder, family="classifier", name=self.name, options=self.describe(), weights=self.state_dict()
            )
            self.image.save_config(folder)

    def describe(self) -> dict[str, Any]:
        """Plain data from which `classifier_family.load` makes the untrained model."""
        return {
            "image": self.image.describe(),
            "classes": list(self.class_names),
            "heads": {name: config.model_dump(mode="json") for name, config in self.head_configs.items()},
            "rule": None if self.rule is None else self.rule.model_dump(mode="json"),
        }


def mixed(
    first: Float[Tensor, "batch classes"],
    second: Float[Tensor, "batch classes"] | None,
    *,
    alpha: float,
    beta: float,
) -> Float[Tensor, "batch classes"]:
    """α σ(first) + (1 - α) σ(second / β), or σ(first) alone; float32 or wider, rows sum to 1.

    Source: Kang et al. 2025, arXiv:2505.07675, inference by two heads.
    """
    own = first.float() if first.dtype in (torch.bfloat16, torch.float16) else first
    if second is None:
        return own.softmax(dim=-1)
    return alpha * own.softmax(dim=-1) + (1 - alpha) * (second.to(own.dtype) / beta).softmax(dim=-1)


def _few(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:3])) + (", ..." if len(names) > 3 else "")
