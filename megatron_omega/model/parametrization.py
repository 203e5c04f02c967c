"""How each kind of parameter is optimised, as a function of width and depth: CompleteP, for a tied table.

`docs/parametrization.md` derives these rules. With m = width_base / hidden_size and a the residual multiplier:

    kind                                      learning rate             weight decay     epsilon
    matrix                                    m                         1 / m            m a
    vector (gains, norms, biases)             1                         0                m a
    token table                               table_multiplier sqrt(m)  1 / sqrt(m)      sqrt(m)

The logits get the factor output_multiplier sqrt(m). Version 1 scales the learning rate of matrices by m, nothing else.
"""

from __future__ import annotations

from math import sqrt

from megatron_omega.config.schema import ModelConfig
from megatron_omega.parallel.parameters import Scales


def matrix_scales(model: ModelConfig, residual: float) -> Scales:
    """Return the scales of a hidden matrix in a block with the multiplier `residual` (arXiv 2505.01618, table 1)."""
    width = model.width_multiplier
    if model.parametrization == 1:
        return Scales(learning_rate=width)
    return Scales(learning_rate=width, weight_decay=1 / width, epsilon=width * residual)


def vector_scales(model: ModelConfig, residual: float) -> Scales:
    """Return the scales of a gain, norm or bias in a block with the multiplier `residual`."""
    epsilon = 1.0 if model.parametrization == 1 else model.width_multiplier * residual
    return Scales(weight_decay=0.0, epsilon=epsilon)


def table_scales(model: ModelConfig) -> Scales:
    """Return the scales of the tied token table, whose rows are drawn at 1 / sqrt(hidden_size)."""
    if model.parametrization == 1:
        return Scales(learning_rate=model.table_multiplier)
    root = sqrt(model.width_multiplier)
    return Scales(learning_rate=model.table_multiplier * root, weight_decay=1 / root, epsilon=root)


def position_scales(model: ModelConfig) -> Scales:
    """Return the scales of learned positions, which are drawn at 1 and added to the stream."""
    return Scales() if model.parametrization == 1 else Scales(epsilon=model.width_multiplier)
