"""OLA-VLM (Jain et al. 2024, arXiv:2412.09585): layers of the language model predict what vision experts see.

A small network behind each chosen layer reads the dialogue's states and predicts an expert's embedding of the picture.
The networks are dropped after training. Departures: the card below and docs/methods/ola_vlm.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from cmapkd.config import ConfigError
from cmapkd.data.types import Batch
from cmapkd.features.dialogue_tables import dialogue_table
from cmapkd.features.gather import gather_rows, own_rows
from cmapkd.features.resampler import Resampler
from cmapkd.features.taps import level_at
from cmapkd.features.visual_rows import per_picture
from cmapkd.methods.behind_terms import Made, mixers_of
from cmapkd.methods.beside_experts import ExpertMethod, tokens_of
from cmapkd.methods.card import MethodCard, MethodConfig
from cmapkd.methods.generative import Counted
from cmapkd.methods.micro_batches import encode_checkpointed, micro_batches
from cmapkd.methods.ola_config import ExpertConfig, OlaVLMConfig
from cmapkd.methods.stages import StageConfig
from cmapkd.methods.terms import Term
from cmapkd.models import MAX_LOGIT_SCALE, FrozenTeacher
from cmapkd.models.generative import GenerativeModel
from cmapkd.models.token_types import Rows, TokenFeatures, TokenNeeds, Where
from cmapkd.objectives.embedding_targets import embedding_contrast, embedding_distance

PRE_TRAINING, FINE_TUNING = 558, 665  # thousands of samples that each stage of the paper reads once


class OlaVLM(ExpertMethod):
    """Heads behind chosen layers predict embeddings of image encoders, while the model learns to answer."""

    Config: ClassVar[type[MethodConfig]] = OlaVLMConfig
    card: ClassVar[MethodCard] = MethodCard(
        title="OLA-VLM: embeddings of vision experts, predicted from layers of the language model",
        paper="Jain et al. 2024, arXiv:2412.09585 (later named VisPer-LM)",
        equations=(
            "f = H(states of a dialogue behind a layer), H a perceiver resampler; t: the expert's embedding or tokens",
            "EXPERT_distance = Σ over its layers of mean smooth L1(f, t)",
            "EXPERT_contrast = Σ over its layers of mean_b −log softmax_c(s cos(f_b, t_c))_b, s learned, <= 100",
            "L = answers_weight CE + Σ over experts weight (distance + contrast_weight contrast)",
        ),
        needs="one or more image encoders; states of layers of the student; no cache",
        trainable="projector and heads, then the student; heads and scales are dropped",
        departures=(
            "No task tokens stand in the dialogue, so the model stays what it was. Released: 8 a task, or none.",
            "Each place of a target has a learned query. Released with task tokens: copies of 8, which predict alike.",
            "A target of tokens is one level of the expert. Released: for depth the mean of four levels.",
            "Dialogues without a picture count in no mean. The released code sets their mask, and all others, to zero.",
            "The chosen layers are shares of the depth, those of 12 and 20 in 32 by default.",
            "The stages take 46 and 54 percent of the steps, as 558 and 665 thousand samples are.",
        ),
        checked_against="the sums in plain loops, with gradients; published _emb_loss, calculate_contrastive_loss and "
        "Resampler (tests/methods/fixtures/ola_vlm.json)",
    )
    config: OlaVLMConfig

    def __init__(
        self,
        config: OlaVLMConfig,
        *,
        student: GenerativeModel,
        teacher: FrozenTeacher | None = None,
        more_teachers: tuple[FrozenTeacher, ...] = (),
    ) -> None:
        super().__init__(config, student=student, teacher=teacher, more_teachers=more_teachers)
        self.config = config
        self.check_roles(config.experts, "experts")
        experts = {role: config.experts.get(role, ExpertConfig()) for role in self.teachers}
        self.experts = {role: each for role, each in experts.items() if each.weight}
        if not self.experts:
            raise ConfigError("every expert has weight 0, and what is left is sft: set method: sft")
        self.weights = {"answers": config.answers_weight}
        for role, each in self.experts.items():
            self.weights[f"{role}_distance"] = each.weight
            self.weights[f"{role}_contrast"] = each.weight * config.contrast_weight
        self.layers = {role: self._layers(role) for role in self.experts}
        self.levels = {
            role: None if each.target == "embedding" else self.level_of(role, each.target)
            for role, each in self.experts.items()
        }
        self.heads = nn.ModuleDict({role: self._heads(role, student) for role in self.experts})
        self.log_scales = nn.ParameterDict(
            {role: nn.Parameter(torch.tensor(config.log_scale)) for role in self.experts if config.contrast_weight}
        )

    def _layers(self, role: str) -> tuple[str, ...]:
        try:
            found = [level_at(self.student.text_levels, each, tower="text") for each in self.experts[role].layers]
        except ValueError as error:
            raise ConfigError(f"method.experts.{role}.layers, of {self.student.name}: {error}") from None
        return tuple(dict.fromkeys(info.name for info in found))

    def _heads(self, role: str, student: GenerativeModel) -> nn.ModuleList:
        tokens, to = self.size_of(role, self.levels[role])
        shape = {"depth": self.config.depth, "heads": self.config.heads, "head_width": self.config.head_width}
        width = student.text_levels[0].width
        return nn.ModuleList(
            Resampler(width, to, queries=tokens, factor=self.config.factor, **shape) for _ in self.layers[role]
        )

    @property
    def default_stages(self) -> tuple[StageConfig, ...]:
        if self.config.form == "one_stage":
            return ()
        models = (
            "vision",
            "projector",
            "embeddings",
            "language",
            "head",
            "adapters",
            *mixers_of(self.student_parts),
            "weighting",
        )
        first = round(PRE_TRAINING / (PRE_TRAINING + FINE_TUNING), 2)
        return (
            StageConfig(name="pre-training", share=first, train=("projector", "modules", "weighting")),
            StageConfig(name="fine-tuning", share=1 - first, terms=("answers",), train=models),
        )

    @property
    def made_of(self) -> Mapping[str, Made]:
        return {name: "layers" for name in self.weights if name != "answers"}

    def _wanted(self) -> list[str]:
        """Experts of which the stage wants a term."""
        return [role for role in self.experts if any(self.wants(f"{role}_{name}") for name in ("distance", "contrast"))]

    @property
    def student_needs(self) -> TokenNeeds:
        wanted = tuple(dict.fromkeys(name for role in self._wanted() for name in self.layers[role]))
        everywhere = wanted and self.config.reads == "all"
        where = {"answer", *(("visual",) if wanted else ()), *(("prompt",) if everywhere else ())}
        return TokenNeeds(frozenset(where), levels=wanted)

    def sums(self, part: Batch, student: TokenFeatures, teacher: TokenFeatures | None) -> dict[str, Counted]:  # noqa: ARG002
        return self.losses(student, self.weigh(part, student.hidden["answer"]))

    def terms(self, batch: Batch) -> dict[str, Term]:
        wanted, parts = self._wanted(), micro_batches(batch, self.micro_batch)
        self.measurements = {}  # a stage without an expert has no scale of it
        read = encode_checkpointed(partial(self._read, wanted), parts, model=self)
        terms = self.summed([sums for sums, _ in read])
        counts = torch.tensor([float(bool(number)) for number in per_picture(self.dialogues(batch))])
        shown = counts.to(self.device, non_blocking=True)
        for role in wanted:
            every, own = self._targets(parts, role)
            predicted = [torch.cat(each) for each in zip(*(found[role] for _, found in read), strict=True)]
            if self.wants(name := f"{role}_distance"):
                total = sum((embedding_distance(each, own) * shown).sum() for each in predicted)
                terms[name] = Term(total, self.weights[name], shown.sum())  # type: ignore[arg-type]
            if self.wants(name := f"{role}_contrast"):
                terms[name] = Term(self._contrast(predicted, every, shown, role), self.weights[name])
        return terms

    def _read(self, wanted: list[str], part: Batch, _number: int) -> tuple[dict[str, Counted], dict[str, list[Tensor]]]:
        """The sums of a part, and what heads predict of its pictures: of each expert a table for each layer."""
        inputs = self.dialogues(part)
        student: TokenFeatures = self.student(inputs.to(self.device, True), self.student_needs)
        predicted: dict[str, list[Tensor]] = {}
        for role in wanted:
            own = self.heads[role]
            assert isinstance(own, nn.ModuleList)
            heads = zip(self.layers[role], own, strict=True)
            predicted[role] = [head(*dialogue_table(self._rows(student, layer), inputs)) for layer, head in heads]
        return self.sums(part, student, None), predicted

    def _rows(self, student: TokenFeatures, layer: str) -> Mapping[Where, Rows]:
        rows = student.levels[layer]
        return rows if self.config.reads == "all" else {"visual": rows["visual"]}

    def _targets(self, parts: list[Batch], role: str) -> tuple[Tensor, Tensor]:
        """What is to be predicted of the pictures of all processes, and of this one's: Float[pictures tokens width]."""
        level = self.levels[role]
        levels = () if level is None else (level,)
        own = torch.cat([tokens_of(self.ask(part, role, levels), level) for part in parts]).detach()
        every = gather_rows(own)
        if self.config.targets == "shuffled":
            every = every.roll(1, 0)
        return every, own_rows(every, len(own))

    def _contrast(self, predicted: list[Tensor], every: Tensor, shown: Tensor, role: str) -> Tensor:
        """Each picture of any process must find its own target among those of all."""
        scale = self.log_scales[role].exp().clamp(max=MAX_LOGIT_SCALE)
        self.measurements[f"{role}/scale"] = scale.detach()
        counts = gather_rows(shown)
        rows = [embedding_contrast(gather_rows(each), every, logit_scale=scale) for each in predicted]
        total: Tensor = (torch.stack(rows).sum(0) * counts).sum() / counts.sum().clamp(min=1)
        return total
