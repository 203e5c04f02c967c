"""What a model costs, in plain arithmetic: parameters, FLOPs, and where to cut its layers into stages.

The pipeline's stage cuts, the MFU of a running job, the planner and the dry run all read these numbers. Knows the
shape of the model and of a sample; knows nothing of ranks, memory, time or hardware, and imports no torch.
"""

from megatron_omega.accounting.counts import (
    LayerCost,
    attention_kernel_flops,
    decoder_layer_parameters,
    encoder_layer_parameters,
    forward_flops_per_sample,
    head_parameters,
    inner_size,
    layer_costs,
    layer_kind,
    layer_names,
    parameter_count,
    routing_flops,
    stack_kinds,
    stack_of,
    table_parameters,
    tokens_per_sample,
    training_flops_per_sample,
    training_flops_per_token,
)
from megatron_omega.accounting.stages import BRIDGE_TOLERANCE, stage_boundaries

__all__ = [
    "BRIDGE_TOLERANCE",
    "LayerCost",
    "attention_kernel_flops",
    "decoder_layer_parameters",
    "encoder_layer_parameters",
    "forward_flops_per_sample",
    "head_parameters",
    "inner_size",
    "layer_costs",
    "layer_kind",
    "layer_names",
    "parameter_count",
    "routing_flops",
    "stack_kinds",
    "stack_of",
    "stage_boundaries",
    "table_parameters",
    "tokens_per_sample",
    "training_flops_per_sample",
    "training_flops_per_token",
]
