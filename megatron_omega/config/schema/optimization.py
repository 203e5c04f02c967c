"""How weights move: the sections `batch`, `precision`, `optimizer`, `schedule` and `training`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from megatron_omega.config.schema.base import Fraction, NonNegative, NonNegativeFloat, Positive, PositiveFloat, Section


class RampUp(Section):
    """Growth of the global batch at the start of a run."""

    start: Positive
    """Global batch size of the first step."""
    increment: Positive
    """Samples added at each growth."""
    samples: Positive
    """Samples over which the batch grows to batch.global_batch_size, in equal parts."""


class BatchConfig(Section):
    """Sizes of a step, in samples. Accumulation follows: global / (micro x data-parallel)."""

    micro_batch_size: Positive = 1
    """Samples of one forward pass of one replica."""
    global_batch_size: Positive = 8
    """Samples of one optimizer step, over all replicas."""
    ramp_up: RampUp | None = None
    """Grow the global batch: {start, increment, samples}."""


class PrecisionConfig(Section):
    """Number formats."""

    dtype: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Working format of weights and activations; master weights, moments and reductions are fp32."""
    tf32: bool = False
    """fp32 on CUDA: let products round their inputs to TF32 (10 bits), for several times the speed."""
    initial_loss_scale_power: NonNegative = 16
    """fp16: the first loss scale is 2 to this power."""
    loss_scale_window: Positive = 1000
    """fp16: steps without overflow before the loss scale doubles."""
    min_loss_scale: PositiveFloat = 1.0
    """fp16: lower bound of the loss scale."""


class OptimizerConfig(Section):
    """The optimizer and clipping."""

    name: Literal["adamw", "muon"] = "adamw"
    """adamw, or muon: the momentum of hidden matrices, made orthogonal, is their update; all else takes AdamW."""
    muon_learning_rate: PositiveFloat = 0.02
    """muon: peak learning rate of the matrices, the same at every width; it follows the schedule."""
    muon_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """muon: decay of the momentum (Nesterov)."""
    learning_rate: PositiveFloat = 3e-3
    """Peak learning rate at width_base; hidden matrices get it times width_base / hidden_size."""
    beta1: Fraction = 0.9
    """Decay of the first moment."""
    beta2: Fraction = 0.95
    """Decay of the second moment."""
    epsilon: PositiveFloat = 1e-8
    """Adam epsilon."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled weight decay of matrices; norms, gains and biases have none."""
    gradient_clipping: NonNegativeFloat = 1.0
    """Bound on the global gradient norm; 0 turns clipping off."""


class ScheduleConfig(Section):
    """Learning rate over steps."""

    decay: Literal["cosine", "linear", "wsd", "inverse_square_root", "constant"] = "cosine"
    """Shape after warm-up. wsd: stable, then linear decay over the last decay_fraction of the steps."""
    warmup_steps: NonNegative = 100
    """Steps of linear warm-up from 0."""
    min_learning_rate_fraction: Fraction = 0.1
    """Final learning rate as a share of the peak (cosine, linear, wsd)."""
    decay_fraction: Annotated[float, Field(gt=0, le=1)] = 0.2
    """wsd: share of the steps spent decaying."""


class TrainingConfig(Section):
    """Length and repeatability."""

    train_steps: Positive = 1000
    """Optimizer steps of the whole run."""
    epochs: PositiveFloat | None = None
    """Passes through data.tasks; training.train_steps follows from it if that is not given."""
    seed: NonNegative = 1234
    """Seed of weights and data; the only source of randomness."""
    deterministic: bool = False
    """Refuse kernels whose result depends on timing."""
    compile: Literal["off", "layers"] = "off"
    """layers: torch.compile fuses what each encoder and decoder layer computes; the first steps take a minute more."""
    profile_steps: tuple[Positive, Positive] | None = None
    """First and last step of which a trace is written into the run folder, with layers, branches, messages named."""
    profile_ranks: tuple[NonNegative, ...] = (0,)
    """Ranks that write one."""
