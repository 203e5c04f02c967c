"""What every part of the model is built from: configuration, the tensor-parallel handle, the seed, the kernels."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from megatron_omega.config.schema import LoraConfig, ModelConfig, ObjectiveConfig, RunConfig
from megatron_omega.model import parametrization
from megatron_omega.model.kernels import PORTABLE, Kernels
from megatron_omega.parallel.parameters import Scales
from megatron_omega.parallel.tensor_parallel import SERIAL, TensorParallel

Recompute = Literal["none", "swiglu", "ffn", "full"]


@dataclass(frozen=True)
class ModelContext:
    """Arguments shared by all modules of one model."""

    model: ModelConfig
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    parallel: TensorParallel = SERIAL
    seed: int = 0
    encoder_seq_length: int = 0
    """Longest encoder stream; sizes the learned positions."""
    decoder_seq_length: int = 0
    """Longest decoder stream; sizes the learned positions."""
    recompute: Recompute = "none"
    kernels: Kernels = PORTABLE
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Adapters beside the products of every layer; none if its rank is 0."""
    residual: float = 1.0
    """Factor on what a layer adds to the residual stream; 1 outside of the stacks."""

    @classmethod
    def of(cls, config: RunConfig, parallel: TensorParallel = SERIAL, kernels: Kernels = PORTABLE) -> ModelContext:
        """Take from a run's configuration what the model needs."""
        return cls(
            model=config.model,
            objective=config.objective,
            parallel=parallel,
            seed=config.training.seed,
            encoder_seq_length=config.data.encoder_seq_length,
            decoder_seq_length=config.data.decoder_seq_length,
            recompute=config.parallel.recompute,
            kernels=kernels,
            lora=config.lora,
        )

    @property
    def local_heads(self) -> tuple[int, int]:
        """Half-open range of the global attention heads this rank computes."""
        return self.parallel.shard(self.model.num_attention_heads)

    def in_stack(self, layers: int) -> ModelContext:
        """Return the context for layers of a stack of so many."""
        return replace(self, residual=self.model.residual_multiplier(layers))

    @property
    def matrix_scales(self) -> Scales:
        """How a matrix that reads features of the model's width is optimised."""
        return parametrization.matrix_scales(self.model, self.residual)

    @property
    def vector_scales(self) -> Scales:
        """How gains, norms and biases are optimised."""
        return parametrization.vector_scales(self.model, self.residual)
