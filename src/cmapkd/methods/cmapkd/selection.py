"""The selection of CMAPKD: who weighs the levels, what the weightings are shown, and how weights meet losses."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cmapkd.data.types import Batch
from cmapkd.features import Role
from cmapkd.methods.cmapkd.config import CMAPKDConfig
from cmapkd.methods.cmapkd.levels import INTRA, LEVELS, LevelRows
from cmapkd.methods.cmapkd.measuring import measure
from cmapkd.methods.cmapkd.reading import LevelPlan
from cmapkd.methods.cmapkd.slopes import Columns, evaluating
from cmapkd.methods.dual import DualEncoderMethod, task_loss
from cmapkd.methods.in_batch import similarity_loss
from cmapkd.methods.stages import StageConfig
from cmapkd.models import Features
from cmapkd.weighting import WEIGHTINGS, JointWeighting, Weighting, for_items, make_weighting

Context = Mapping[str, Float[Tensor, "batch width"]]  # what describes each of all samples, by what it is read from

JOINTLY = "jointly"
"""The name of a weighting of all levels and terms together."""


class Selecting(DualEncoderMethod):
    """What CMAPKD knows of its selection. `method.CMAPKD` has the terms."""

    config: CMAPKDConfig
    term_weights: dict[str, float]
    items: dict[str, tuple[str, ...]]
    weighting: nn.ModuleDict
    _counted: Columns | None = None  # where `columns` collects the levels' losses

    @property
    @abstractmethod
    def plan(self) -> LevelPlan:
        """What the terms of the current stage read of the levels."""

    @abstractmethod
    def _widths(self, role: Role, levels: Sequence[str]) -> dict[str, int]: ...

    @abstractmethod
    def _wants(self, term: str) -> bool: ...

    def _make_weightings(self) -> nn.ModuleDict:
        """One weighting for each term that has several levels or pairs; or one for all of them and the other terms."""
        assert self.teacher is not None
        weighed = {term: items for term, items in self.items.items() if term in self.term_weights}
        if WEIGHTINGS[self.config.weighting.name].joint:
            others = [term for term in self.term_weights if term not in weighed and term != "bridge"]
            everything = [*(item for items in weighed.values() for item in items), *others]
            return nn.ModuleDict(
                {
                    JOINTLY: make_weighting(
                        self.config.weighting, items=everything, context_dim=1, level_widths=[1] * len(everything)
                    )
                }
            )
        configs = for_items(self.config.weighting, weighed)
        of_teacher = self._widths("teacher", LEVELS)
        made = {}
        for term, items in weighed.items():
            widths = {
                "teacher": 2 * self.teacher.embed_dim,
                "student": 2 * self.student.embed_dim,
                "losses": len(items),
            }
            made[term] = make_weighting(
                configs[term],
                items=items,
                context_dim=sum(widths[read] for read in self.config.ablations.selection_reads),
                level_widths=[sum(of_teacher[level] for level in item.split("-")) for item in items],
            )
        return nn.ModuleDict(made)

    @property
    def joint(self) -> JointWeighting | None:
        """The weighting of all levels and terms together, where it is such a one."""
        found = dict(self.weighting.items()).get(JOINTLY)
        assert found is None or isinstance(found, JointWeighting)
        return found

    @property
    def steady(self) -> bool:
        """Unless a weighting learns from held-out pairs, which not every step has."""
        return self.held_out_every is None

    @property
    def held_out_every(self) -> int | None:
        found = [each.held_out_every for each in self.weighting.values() if isinstance(each, Weighting)]
        return min((every for every in found if every is not None), default=None)

    @property
    def held_out_whole(self) -> bool:
        return self.joint is not None and self.joint.whole_held_out

    @property
    def needs_held_out(self) -> bool:
        return self.joint is not None

    def why_whole(self, stages: Sequence[StageConfig]) -> str | None:
        if self.joint is not None:
            return (
                f"weighting {self.config.weighting.name} measures with the student's whole weights, of which every "
                "process has a share only: choose another weighting"
            )
        return super().why_whole(stages)

    def _weighed_together(self) -> list[str]:
        """The levels and terms of this stage that the joint weighting weighs."""
        assert self.joint is not None
        levels = [level for term in self.items for level in self.plan.compared(term) if term in INTRA]
        pairs = [pair for pair in self.items["pyramid"] if self._wants("pyramid") and self._has_levels(pair)]
        present = {*levels, *pairs, *(term for term in self.term_weights if self._wants(term))}
        return [item for item in self.joint.items if item in present]

    def _has_levels(self, pair: str) -> bool:
        return all(map(self.stage.wants_level, pair.split("-")))

    def columns(self, batch: Batch) -> Columns:
        """The losses of the levels and other terms as they count before the selection, in eval mode.

        Returns:
            Float[batch] of all processes' samples for each level, one number for each other term.
        """
        self._counted = {}
        try:
            terms = self.terms(batch)
            others = {name: each.weight * each.value for name, each in terms.items() if name not in self.items}
            return self._counted | {name: value for name, value in others.items() if name != "bridge"}
        finally:
            self._counted = None

    def _measure(self, batch: Batch) -> None:
        """In the steps that are due, what the joint weighting learns from; before the step's own terms."""
        if self.training and self.joint is not None:
            self.joint.by_sample = {}
            every = self.joint.held_out_every
            if every is not None and self.step.step % every == 0:
                measure(self, self.joint, batch)

    def _look(self, columns: Mapping[str, Mapping[str, Float[Tensor, " batch"]]]) -> None:
        """Shows the joint weighting all levels' losses of the step, by term, before any is weighed."""
        if self.joint is not None and self._counted is None:
            self.joint.look(
                {
                    item: self.term_weights[term] * column.detach()
                    for term, losses in columns.items()
                    for item, column in losses.items()
                }
            )

    def _weights_of_terms(self) -> dict[str, float]:
        """What the joint weighting lets whole terms count, which is logged with what it lets levels count."""
        if self.joint is None:
            return {}
        counts = self.joint.weights_of(self._weighed_together())
        by_sample = self.joint.by_sample
        means = {item: value * by_sample[item].mean() for item, value in counts.items() if item in by_sample}
        numbers = {item: torch.tensor(value) for item, value in counts.items()} | means
        self.measurements |= {f"selection/weight/{item}": value for item, value in numbers.items()}
        self.measurements |= {f"selection/{name}": value for name, value in self.joint.log().items()}
        if self._counted is not None:  # a measurement, which is of the losses before they are weighed
            return {}
        return {item: value for item, value in counts.items() if item in self.term_weights}

    def _weigh(
        self,
        term: str,
        losses: Mapping[str, Float[Tensor, " batch"]],
        context: Context,
        rows: LevelRows,
    ) -> Float[Tensor, ""]:
        """A term's levels or pairs as one number, each sample's by the weights that the selection gives it."""
        if self.joint is not None:
            return self._weigh_together(term, losses)
        weighting, items = self.weighting[term], self.items[term]
        assert isinstance(weighting, Weighting)
        none = torch.zeros_like(next(iter(losses.values())))
        columns = torch.stack([losses.get(item, none) for item in items], dim=-1)
        if weighting.reads_levels:
            parts = self._vectors_of(items, rows, none)
        else:
            parts = [columns if read == "losses" else context[read] for read in self.config.ablations.selection_reads]
        active = torch.tensor([item in losses for item in items])
        weighted = weighting(
            columns,
            torch.cat(parts, dim=-1),
            None if len(losses) == len(items) else active,
            generator=self.step.generator(f"weighting of {term}"),
        )
        self.measurements |= {f"{term}/{name}": value for name, value in weighted.log.items()}
        loss: Tensor = weighted.loss
        return loss

    def _weigh_together(self, term: str, losses: Mapping[str, Float[Tensor, " batch"]]) -> Float[Tensor, ""]:
        """The same by the joint weighting, which saw the losses of all levels before."""
        assert self.joint is not None
        if self._counted is not None:
            self._counted |= {item: self.term_weights[term] * column for item, column in losses.items()}
        known, by_sample = self.joint.weights_of(self._weighed_together()), self.joint.by_sample
        weighed = [known[item] * by_sample.get(item, 1.0) * column for item, column in losses.items()]
        return torch.stack(weighed).sum(0).mean()

    def _vectors_of(
        self, items: Sequence[str], rows: LevelRows, like: Float[Tensor, " batch"]
    ) -> list[Float[Tensor, "batch width"]]:
        """The teacher's vectors of the items' levels; zeros for a level that the stage does not read."""
        widths = self._widths("teacher", LEVELS)
        return [
            rows.teacher.get(level, like.new_zeros(len(like), widths[level]))
            for item in items
            for level in item.split("-")
        ]

    @torch.no_grad()
    def _observe(self, batch: Batch, student: Features, teacher: Features) -> None:
        """Tells the selection the student's own loss on held-out pairs.

        Where the data name none, it is told how far the student is from the teacher on this batch, which is unseen
        only in the first pass over the data.
        """
        learning = [w for w in self.weighting.values() if isinstance(w, Weighting) and w.reads_held_out]
        if learning:
            if batch.held_out is None:
                held_out = similarity_loss(student, teacher)
            else:
                with evaluating(self.student):
                    held_out = task_loss(self.encode_student(batch.held_out))
            for weighting in learning:
                weighting.observe(held_out)
