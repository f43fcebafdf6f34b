"""Softmax attention becomes linear: converted layers of a copy of the teacher learn what the teacher's layers do.

InfiniteVL (hustvl/InfiniteVL, 2025), mmMamba (arXiv:2502.13145) and MaTVLM (arXiv:2503.13440) as forms of one method.
The student is a model `linear:TEACHER`. Departures: the card below and docs/methods/linearize.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from cmapkd.config import ConfigError
from cmapkd.data.types import Batch
from cmapkd.features.gather import gather_rows
from cmapkd.methods.behind_terms import Made
from cmapkd.methods.card import MethodCard, MethodConfig
from cmapkd.methods.generative import Counted, GenerativeMethod
from cmapkd.methods.linearize_config import STAGES, LinearizeConfig
from cmapkd.methods.micro_batches import encode_checkpointed, micro_batches
from cmapkd.methods.stages import StageConfig
from cmapkd.methods.terms import Term
from cmapkd.models import FrozenTeacher
from cmapkd.models.generative import GenerativeModel
from cmapkd.models.layer_calls import Inside, LayerCall, check_same_layers, layer_calls
from cmapkd.models.linear_vlm import LinearVlm
from cmapkd.models.token_types import TokenFeatures
from cmapkd.objectives.layer_errors import error_norms, squared_errors
from cmapkd.objectives.tokens import TokenDivergence


class _Read(NamedTuple):
    """What the teacher was asked of a part of the batch."""

    calls: Mapping[int, LayerCall]
    features: TokenFeatures | None


class Linearize(GenerativeMethod):
    """Converted layers are given the teacher's states and learn its layers' outputs; then all tokens are followed."""

    Config: ClassVar[type[MethodConfig]] = LinearizeConfig
    card: ClassVar[MethodCard] = MethodCard(
        title="linearize: softmax attention to linear attention, by the layer (InfiniteVL, mmMamba, MaTVLM)",
        paper="mmMamba, Liao et al. 2025, arXiv:2502.13145; MaTVLM, Li et al. 2025, arXiv:2503.13440; InfiniteVL 2025",
        equations=(
            "h: what the teacher's layer l was given; C: the converted layers, of N in all",
            "mmmamba: layers = 1/|C| Σ_l mean (mixer_l(h) − attention_l(h))², before the output projection",
            "infinitevl: layers = 1/N Σ_l mean (student's layer_l(h) − teacher's layer_l(h))²",
            "matvlm: layers = Σ_l mean over dialogues ‖student's layer_l(h) − teacher's layer_l(h)‖₂, not squared",
            "distillation = T² KL(p_T ‖ q_T) of next tokens",
            "L = layers_weight layers + distill_weight distillation + answers_weight CE(y, q), by stages",
        ),
        needs="a student linear:TEACHER and its teacher; calls of the teacher's layers; no cache",
        trainable="new parts of converted layers; then queries, keys and values too; see the page for each form",
        departures=(
            "Mixers are plain torch. matvlm's is that of mmMamba: no skip D, and its gate stands behind the norm.",
            "gated_delta begins with the attention's weights, values as wide. Published: random, values twice as wide.",
            "Kept layers keep their attention. InfiniteVL's attend to a window.",
            "Padding counts in no mean. MaTVLM's norm is of one dialogue, as each of its devices holds one.",
            "The divergence is of the answers' tokens. Published: of every place.",
            "Stages take equal shares. Rates of stages are those of the recipe.",
        ),
        checked_against="sums in plain loops; published compute_loss, criterion and torch.norm lines, and "
        "ssd_minimal_discrete and delta_rule_recurrence (tests/methods/fixtures/linearize.json)",
    )
    config: LinearizeConfig
    student: LinearVlm
    begun: Tensor
    """Mean squared error of each converted layer in the first step that measured it; 0 before."""

    def __init__(
        self, config: LinearizeConfig, *, student: GenerativeModel, teacher: FrozenTeacher | None = None
    ) -> None:
        if not isinstance(student, LinearVlm):
            raise ConfigError(
                f"method linearize trains converted layers, and the student {student.name} has none: set student: "
                f"linear:{teacher.name if teacher is not None else student.name}"
            )
        super().__init__(config, student=student, teacher=teacher)
        self.config, self.not_cached = config, config.not_cached
        assert teacher is not None
        check_same_layers(student, teacher.model)
        self.numbers = [*student.mixers]
        if config.targets == "shuffled" and len(self.numbers) == 1:
            raise ConfigError("targets: shuffled needs two converted layers, and one is: convert more, or leave it out")
        self.inside: Inside = "attention" if config.form == "mmmamba" else "layer"
        self.weights = {
            "layers": config.layers_weight or (1.0 if config.form == "matvlm" else 1000.0),
            "distillation": config.distill_weight,
            "answers": config.answers_weight,
        }
        temperature = config.temperature or (2.0 if config.form == "infinitevl" else 1.0)
        self.divergence = TokenDivergence("forward", temperature=temperature)
        self.register_buffer("begun", student.head.weight.new_zeros(len(self.numbers)))

    @property
    def compares_tokens(self) -> bool:
        return super().compares_tokens and bool(self.config.distill_weight)

    @property
    def default_stages(self) -> tuple[StageConfig, ...]:
        wanted = [
            StageConfig(name=name, share=1.0, terms=kept, train=(*train, "weighting"))
            for name, terms, train in STAGES[self.config.form]
            if (kept := tuple(term for term in terms if term in self.term_names))
        ]
        return tuple(stage.model_copy(update={"share": 1 / len(wanted)}) for stage in wanted)

    @property
    def made_of(self) -> Mapping[str, Made]:
        return {"layers": "mixed" if self.inside == "attention" else "mixers"}

    def why_whole(self, stages: Sequence[StageConfig]) -> str | None:
        if any(stage.wants_term("layers") for stage in stages or self.default_stages):
            return "converted layers are called by themselves, outside of the student: leave sharding out"
        return super().why_whole(stages)

    def shared_parameters(self) -> Mapping[str, nn.Parameter]:
        """Values and gates of all converted layers, which stand behind all terms."""
        mixers = self.student.mixers.values()
        behind = {id(each.weight) for mixer in mixers for each in (mixer.v_proj, mixer.gate)}
        return {name: each for name, each in self.student.named_parameters() if id(each) in behind}

    def check_stages(self, stages: Sequence[StageConfig]) -> None:
        super().check_stages(stages)
        idle = "targets" if self.config.targets != "own" else "layers_weight" if self.config.layers_weight else None
        if idle is not None and not any(stage.wants_term("layers") for stage in stages or self.default_stages):
            raise ConfigError(f"no stage has the term layers, so method.{idle} is not read: leave it out")

    def sums(self, part: Batch, student: TokenFeatures, teacher: TokenFeatures | None) -> dict[str, Counted]:
        weighed = self.weigh(part, student.hidden["answer"])
        return self.losses(student, weighed, teacher=teacher, divergence=self.divergence, soft=weighed)

    def terms(self, batch: Batch) -> dict[str, Term]:
        parts, read = micro_batches(batch, self.micro_batch), dict[int, _Read]()
        found = encode_checkpointed(partial(self._part, read), parts, model=self)
        self.measurements = {}
        if self.wants("layers"):
            self._note(torch.stack([errors for _, errors in found if errors is not None]).sum(0))
        return self.summed([counted for counted, _ in found])

    def _part(self, read: dict[int, _Read], part: Batch, number: int) -> tuple[dict[str, Counted], Tensor | None]:
        """The sums of a part; and each converted layer's sum of squared errors, with their number at the end."""
        if number not in read:  # the backward pass would ask the teacher again
            read[number] = self._ask(part)
        counted: dict[str, Counted] = {}
        if self.wants("distillation") or self.wants("answers"):
            student = self.student(self.dialogues(part).to(self.device, True), self.student_needs)
            counted = self.sums(part, student, read[number].features)
        if not self.wants("layers"):
            return counted, None
        term, errors = self._compared(part, read[number].calls)
        return counted | {"layers": term}, errors

    def _ask(self, part: Batch) -> _Read:
        layers = {}
        if self.wants("layers"):
            layers = {number: self._first.model.layers[number] for number in self.numbers}
        elif not self.wants("distillation"):
            return _Read({}, None)
        with layer_calls(layers, self.inside) as calls:
            features = self.read_teacher(part)
        return _Read(calls, features)

    def _compared(self, part: Batch, calls: Mapping[int, LayerCall]) -> tuple[Counted, Tensor]:
        real = self.dialogues(part, self._first.reads).texts.mask.to(self.device, non_blocking=True)
        numbers = self.numbers
        targets = numbers if self.config.targets == "own" else numbers[1:] + numbers[:1]
        made = [calls[number].of(self.student.layers[number], self.inside) for number in numbers]
        pairs = [(own, calls[number].output) for own, number in zip(made, targets, strict=True)]
        errors = torch.stack([squared_errors(own, target, real).sum() for own, target in pairs])
        count = real.sum().to(errors.dtype) * made[0].shape[-1]
        if self.config.form == "matvlm":
            total = torch.stack([error_norms(own, target, real).sum() for own, target in pairs]).sum()
            term = Counted.of(total, len(part))
        else:
            layers = len(numbers) if self.config.form == "mmmamba" else len(self.student.layers)
            term = Counted(errors.sum() / layers, count)
        return term, torch.cat([errors.detach(), count[None]])

    @torch.no_grad()
    def _note(self, sums: Tensor) -> None:
        """Logs the mean squared error of each converted layer, also as a share of what it was in the first step."""
        *errors, count = gather_rows(sums[None]).sum(0)
        mean = torch.stack(errors) / count.clamp(min=1)
        if self.training:
            self.begun.copy_(torch.where(self.begun > 0, self.begun, mean))
        left = mean / torch.where(self.begun > 0, self.begun, mean)
        for number, error, share in zip(self.numbers, mean, left, strict=True):
            self.measurements |= {f"error/layers.{number}": error, f"left/layers.{number}": share}
        self.measurements["left/worst"] = left.max()

    @property
    def _first(self) -> Any:
        return next(iter(self.teachers.values()))
