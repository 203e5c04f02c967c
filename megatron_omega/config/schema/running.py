"""What happens around the steps: the sections `evaluation`, `checkpoint`, `resilience` and `logging`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from megatron_omega.config.schema.base import NonNegative, NonNegativeFloat, Positive, PositiveFloat, Section


class EvaluationConfig(Section):
    """Validation on held-out text, or on held-out pairs of data.tasks."""

    interval_steps: NonNegative = 200
    """Steps between validations; 0 turns them off. One more runs at the end, and one at the start."""
    num_batches: Positive = 8
    """Global batches of one validation, the same ones every time."""
    answers: NonNegative = 0
    """Held-out pairs of each task that are answered in a validation, as its first metric measures; 0: none."""
    patience: NonNegative = 0
    """Validations in a row that are no better than the best before, after which the run ends; 0: it never does."""


class CheckpointConfig(Section):
    """Saving and resuming."""

    interval_steps: NonNegative = 200
    """Steps between checkpoints; 0 saves at the end only."""
    keep_last: Positive = 3
    """Newest checkpoints that are kept."""
    keep_every_steps: NonNegative = 0
    """Also keep every checkpoint whose step is a multiple of this; 0: none."""
    keep_best: bool = True
    """Also keep the checkpoint with the best validation: by its answers if there are some, else by its loss."""
    drop_optimizer_from_older: bool = False
    """Remove the optimizer state from kept checkpoints other than the newest keep_last."""
    asynchronous: bool = True
    """Write behind training; it stops only for one copy to memory."""
    resume: bool = True
    """Continue from the newest valid checkpoint of the run folder, if there is one."""
    load: str | None = None
    """Start from this checkpoint (a step-... folder, or a run's checkpoints folder) when the run folder has none."""
    load_weights_only: bool = False
    """With load: take the weights, start optimizer, schedule and data afresh."""


class ResilienceConfig(Section):
    """Stopping, failing, and what to do about bad steps."""

    max_minutes: PositiveFloat | None = None
    """Minutes after which the run saves and ends with exit code 75, to be started again (--max-minutes)."""
    monitor: bool = True
    """Watch every rank from a process beside it: ends all ranks when one fails, and names a rank that hangs."""
    start_timeout_seconds: PositiveFloat = 600.0
    """How long ranks may take to arrive at the start."""
    hang_timeout_seconds: PositiveFloat | None = None
    """How long a step may make no progress; follows from the measured step times where it is not given."""
    hang_floor_seconds: PositiveFloat | None = None
    """Least of what follows from step times, so that a slow file system is no hang; 60 on a GPU, 15 on a CPU."""
    silence_seconds: PositiveFloat | None = None
    """Without a word from a host, after which it is gone; 10, and 5 more for each 1,000 ranks, where not given."""
    dump_seconds: PositiveFloat | None = None
    """How long a verdict waits for the stacks of all ranks; 4, and 5 more for each 1,000 ranks, where not given."""
    spike_z_score: NonNegativeFloat = 8.0
    """Robust z-score of the loss above which a step is skipped; 0 skips only what is not finite."""
    spike_window: Annotated[int, Field(ge=8)] = 64
    """Accepted steps that the z-score is measured against; no step is judged until a quarter of them is there."""
    spike_limit: Positive = 3
    """Bad steps in a row after which the run goes back to its last checkpoint and leaves their samples out."""
    max_rollbacks: NonNegative = 3
    """How often a run goes back before it gives up."""
    integrity_interval_steps: NonNegative = 100
    """Steps between comparisons of weights that must be equal on several ranks; 0: never."""
    slow_host_factor: NonNegativeFloat | None = None
    """Before the start, a host is refused whose devices take so many times the median; 0: never; 1.5 on a GPU."""
    straggler_window: NonNegative = 20
    """Steps over which a rank must be the slowest of its peers to be named; 0 does not measure."""


class LoggingConfig(Section):
    """What a run leaves behind."""

    run_directory: str = "runs/omega"
    """Folder of everything this run writes."""
    interval_steps: Positive = 1
    """Steps between log lines (metrics.jsonl has every step)."""
    progress_bar: bool = True
    """Show a bar on a terminal."""
    tensorboard: bool = True
    """Write TensorBoard events."""
    wandb: Literal["off", "offline", "online"] = "off"
    """Log to Weights & Biases; its failure never stops a run."""
    wandb_project: str = "megatron-omega"
    """Project of the wandb run."""
    peak_flops: PositiveFloat | None = None
    """Peak FLOP/s of one device for MFU; known for common GPUs, measured once on a CPU, where it is not given."""
