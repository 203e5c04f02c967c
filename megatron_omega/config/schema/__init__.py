"""Every setting of a run: typed, frozen, documented once, here.

A `RunConfig` is plain data. It knows what a value means and which values contradict each other; it does not know
where they came from (`config.load`), what DeepSpeed calls them (`config.deepspeed`) or what is built from them.
Fields that depend on the number of processes are checked by `check_world`.
"""

from __future__ import annotations

from megatron_omega.config.schema.base import Section
from megatron_omega.config.schema.data import Corpus, DataConfig, ObjectiveConfig, Reweight
from megatron_omega.config.schema.model import (
    BRANCH_FORMS,
    DECODER_BRANCHES,
    ENCODER_BRANCHES,
    LEGAL_BRANCHES,
    VOCABULARY_MULTIPLE,
    Branch,
    Branches,
    LayerBranches,
    ModelConfig,
    Stack,
)
from megatron_omega.config.schema.optimization import (
    BatchConfig,
    OptimizerConfig,
    PrecisionConfig,
    RampUp,
    ScheduleConfig,
    TrainingConfig,
)
from megatron_omega.config.schema.parallel import ParallelConfig
from megatron_omega.config.schema.running import CheckpointConfig, EvaluationConfig, LoggingConfig, ResilienceConfig
from megatron_omega.config.schema.tasks import (
    ADAPTER_TARGETS,
    METRIC_PACKAGES,
    AdapterTarget,
    LoraConfig,
    Metric,
    Task,
    TrainedWhole,
)

__all__ = [
    "ADAPTER_TARGETS",
    "BRANCH_FORMS",
    "DECODER_BRANCHES",
    "ENCODER_BRANCHES",
    "LEGAL_BRANCHES",
    "METRIC_PACKAGES",
    "VOCABULARY_MULTIPLE",
    "AdapterTarget",
    "BatchConfig",
    "Branch",
    "Branches",
    "CheckpointConfig",
    "Corpus",
    "DataConfig",
    "EvaluationConfig",
    "LayerBranches",
    "LoggingConfig",
    "LoraConfig",
    "Metric",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "PrecisionConfig",
    "RampUp",
    "ResilienceConfig",
    "Reweight",
    "RunConfig",
    "ScheduleConfig",
    "Section",
    "Stack",
    "Task",
    "TrainedWhole",
    "TrainingConfig",
]


class RunConfig(Section):
    """A whole run."""

    model: ModelConfig = ModelConfig()
    """Architecture."""
    data: DataConfig = DataConfig()
    """Corpus and samples."""
    objective: ObjectiveConfig = ObjectiveConfig()
    """Objectives and losses."""
    lora: LoraConfig = LoraConfig()
    """Adapters."""
    parallel: ParallelConfig = ParallelConfig()
    """Layout."""
    batch: BatchConfig = BatchConfig()
    """Batch sizes."""
    precision: PrecisionConfig = PrecisionConfig()
    """Number formats."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """AdamW."""
    schedule: ScheduleConfig = ScheduleConfig()
    """Learning rate."""
    training: TrainingConfig = TrainingConfig()
    """Length and seed."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Validation."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Checkpoints."""
    resilience: ResilienceConfig = ResilienceConfig()
    """Stopping, failing, bad steps."""
    logging: LoggingConfig = LoggingConfig()
    """Logs and run folder."""
