"""The knobs of optimisation and of the loop."""

from __future__ import annotations

import sys
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator

from cmapkd.config import RESUMABLE, Config
from cmapkd.methods.stages import StageConfig, length_of_stages, stage_ends

LOCAL_LOSS_FROM = 4_096
"""Pairs in a batch from which the work of in-batch losses is worth sharing out: below, encoders take far longer."""


class OptimConfig(Config):
    """AdamW with linear warm-up, then a cosine to (nearly) zero."""

    learning_rate: float = Field(1e-3, gt=0, description="Peak learning rate of the student.")
    module_rate: float = Field(1.0, ge=0, description="Rate of a method's own modules, as a multiple of the student's.")
    weight_decay: float = Field(
        0.1, ge=0, description="Decoupled decay of matrices; biases, norms and scales have none."
    )
    betas: tuple[float, float] = Field((0.9, 0.98), description="AdamW's averaging of gradient and squared gradient.")
    eps: float = Field(1e-6, gt=0, description="AdamW's epsilon.")
    warmup_steps: int = Field(100, ge=0, description="Linear warm-up, in optimizer steps.")
    schedule: Literal["cosine", "constant"] = Field("cosine", description="What follows the warm-up.")
    final_rate: float = Field(0.0, ge=0, le=1, description="Where the cosine ends, as a share of the peak.")
    weighting_rate: float = Field(
        0.5, ge=0, description="Rate of the modules that weight levels and terms, as a multiple of the student's."
    )
    max_gradient_norm: float | None = Field(
        1.0, gt=0, description="Gradients are scaled down to this norm; none: never."
    )


class TrainConfig(Config):
    """How long, in what precision, and how often things are written."""

    steps: int | None = Field(None, ge=1, description="Optimizer steps; give this or epochs.")
    epochs: float | None = Field(None, gt=0, description="Passes over the training data; give this or steps.")
    stages: tuple[StageConfig, ...] = Field((), description="Stretches with terms, levels and parts of their own.")
    train_parts: tuple[str, ...] | None = Field(
        None,
        min_length=1,
        description="Parts of the student that learn, by the names in its `parts` (image, text, projections, scale); "
        "none: all. A method's own modules learn in any case.",
    )
    batch_size: int = Field(256, ge=2, description="Pairs in a step, over all processes.")
    micro_batch: int | None = Field(
        None,
        ge=1,
        description="Pairs that a process encodes at once, for batches that do not fit; none: all of its.",
        json_schema_extra=RESUMABLE,
    )
    local_loss: bool | Literal["auto"] = Field(
        "auto",
        description="With several processes each computes its own rows of the in-batch losses instead of all: the same "
        "loss and gradient, a share of the work and memory, one more exchange of a number a row. auto: from 2 "
        "processes and a batch of 4,096 pairs on.",
        json_schema_extra=RESUMABLE,
    )
    sharding: Literal["none", "fsdp2"] = Field(
        "none",
        description="fsdp2: student and modules are shared out among the processes; none: each has them whole.",
        json_schema_extra=RESUMABLE,
    )
    shard_teacher: bool = Field(
        False, description="With fsdp2, live teachers are shared out, too.", json_schema_extra=RESUMABLE
    )
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="Of forward and backward; weights that learn stay fp32."
    )
    compile: bool = Field(
        False,
        description="torch.compile the student: docs/results/speed.md says when it pays.",
        json_schema_extra=RESUMABLE,
    )
    activation_checkpointing: bool = Field(
        False,
        description="The blocks of the student compute again in the backward pass: less memory, more time, the same "
        "losses and gradients.",
        json_schema_extra=RESUMABLE,
    )
    device: Literal["auto", "cpu"] = Field(
        "auto", description="auto: the accelerator if there is one.", json_schema_extra=RESUMABLE
    )
    ema: float | None = Field(
        None, gt=0, lt=1, description="Decay of an averaged student, which is then the one saved."
    )
    mean_every: int | None = Field(
        None,
        ge=1,
        description="Steps between the weights of which a mean is kept, the first ones included; that mean is then the "
        "student that is saved. none: no such mean.",
    )
    log_every: int = Field(10, ge=1, description="Steps between lines of metrics.jsonl.", json_schema_extra=RESUMABLE)
    evaluate_every: int | None = Field(None, ge=1, description="Steps between validations; none: only at the end.")
    checkpoint_every: int | None = Field(
        None, ge=1, description="Steps between checkpoints; none: ten in a run.", json_schema_extra=RESUMABLE
    )
    checkpoint_form: Literal["whole", "shares"] = Field(
        "whole",
        description="shares: with fsdp2 every process writes and reads its own share of a checkpoint; the folder must "
        "be one that all processes see. whole: the first process writes everything.",
        json_schema_extra=RESUMABLE,
    )
    keep_checkpoints: int = Field(
        2,
        ge=0,
        description="Latest checkpoints kept besides the best, 1 at least while it trains. A finished run keeps the "
        "last one and the best, for --extend-to and finalize; 0: none.",
        json_schema_extra=RESUMABLE,
    )
    student: Literal["last", "best"] = Field(
        "last", description="Which weights are saved: of the end, or best validated."
    )
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = Field(
        (), description="Written besides metrics.jsonl.", json_schema_extra=RESUMABLE
    )

    @model_validator(mode="after")
    def _one_average(self) -> Self:
        if self.ema is not None and self.mean_every is not None:
            raise ValueError("ema and mean_every are both averages of the student: give one of them")
        if self.steps is not None:
            self.check_mean(self.steps)
        return self

    def check_mean(self, steps: int) -> None:
        """Refuses a mean of the student's weights that a run of so many steps never takes.

        Raises:
            ValueError: names both numbers.
        """
        if self.mean_every is not None and self.mean_every > steps:
            raise ValueError(
                f"mean_every is {self.mean_every} and the run has {steps} steps: the student as it began would be saved"
            )

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        given = [name for name in ("steps", "epochs") if getattr(self, name) is not None]
        kind = length_of_stages(self.stages)
        if kind in ("steps", "epochs"):
            if given:
                raise ValueError(f"the stages state their own {kind}: leave {' and '.join(given)} out (null)")
        elif len(given) != 1:
            which = "both: add training.epochs=null, or training.steps=null" if given else "neither"
            raise ValueError(f"give either steps or epochs, not {which}")
        if self.student == "best" and self.evaluate_every is None:
            raise ValueError("student: best needs evaluate_every, the number of steps between validations")
        if self.shard_teacher and self.sharding == "none":
            raise ValueError("shard_teacher needs sharding: fsdp2")
        if self.checkpoint_form == "shares" and self.sharding == "none":
            raise ValueError("checkpoint_form: shares needs sharding: fsdp2")
        if self.compile and self.sharding != "none":
            raise ValueError("compile and sharding do not go together in this version: set one of them")
        if self.compile and self.activation_checkpointing:
            raise ValueError("compile and activation_checkpointing do not go together in this version: set one of them")
        return self

    def writes_shares(self, processes: int) -> bool:
        """Whether so many processes write a checkpoint in shares: one alone has everything whole."""
        return self.checkpoint_form == "shares" and processes > 1

    @property
    def on_cpu(self) -> bool:
        """Whether the CPU trains: asked for, or all there is. Accelerate groups CPU processes only if told."""
        return self.device == "cpu" or not torch.accelerator.is_available()

    def splits_losses(self, processes: int) -> bool:
        """Whether each of so many processes computes its own rows of the in-batch losses."""
        if self.local_loss == "auto":
            return processes > 1 and self.batch_size >= LOCAL_LOSS_FROM
        return self.local_loss

    def without_stages(self) -> TrainConfig:
        """The same length, for a method that lacks the stages' terms and levels.

        In one piece; or in stages of the same lengths that read the same streams, where a stage reads one alone.
        """
        if any(stage.data is not None for stage in self.stages):
            lengths = ("name", "share", "steps", "epochs", "data")
            alike = tuple(StageConfig(**{key: getattr(stage, key) for key in lengths}) for stage in self.stages)
            return self.model_copy(update={"stages": alike})
        given: dict[str, Any] = {"stages": ()}
        for unit in ("steps", "epochs"):
            stated = [getattr(stage, unit) for stage in self.stages]
            if stated and None not in stated:
                given[unit] = sum(stated)
        return self.model_copy(update=given)

    def num_steps(self, steps_per_epoch: int) -> int:
        """Optimizer steps of the whole run."""
        if self.steps is not None:
            return self.steps
        if self.epochs is not None:
            return max(1, round(self.epochs * steps_per_epoch))
        return stage_ends(self.stages, total=sys.maxsize, steps_per_epoch=steps_per_epoch)[-1]
