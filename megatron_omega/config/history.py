"""What a stored configuration means: settings that came later, with the values that its version acted by.

A run stores its whole configuration, so a section that states every setting of the first version, but lacks a later
one, was written before that one existed. Such a setting gets the value that describes what was done then; anywhere
else a setting that is left out has its default. Knows names and values, nothing of what they do.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

_FIRST: Final[Mapping[str, frozenset[str]]] = {
    "model": frozenset(
        {
            "hidden_size",
            "ffn_hidden_size",
            "num_attention_heads",
            "head_dim",
            "encoder_layers",
            "decoder_layers",
            "encoder_branches",
            "decoder_branches",
            "vocab_size",
            "local_window",
            "axial_width",
            "positions",
            "rotary_base",
            "norm_epsilon",
            "depth_base",
            "width_base",
            "output_multiplier",
            "mlm_head",
        }
    ),
    "objective": frozenset(
        {
            "prefix_lm",
            "span_corruption",
            "masked_prefix",
            "empty_prefix_fraction",
            "span_rate",
            "span_mean_length",
            "extreme_span_fraction",
            "mask_rate",
            "mlm_weight",
            "z_loss_weight",
            "loss_chunk_tokens",
        }
    ),
}
"""Settings of the first version, of the sections that changed their meaning since."""

_MEANT: Final[Mapping[str, Mapping[str, Any]]] = {
    "model": {
        "parametrization": 1,
        "table_multiplier": 1.0,
        "decoder_start": "begin",
        "decoder_overlap": 1,
        "shared_mode_token": False,
    },
    "objective": {"mlm_weighing": "means", "mask_span_length": 1.0, "overlap_labels": False},
}
"""What the first version did where a later setting now decides."""


def with_earlier_meaning(section: str, values: Any) -> Any:
    """Return the values of `section`, with what they meant when they were stored by an earlier version."""
    if not isinstance(values, Mapping) or not _FIRST[section] <= values.keys():
        return values
    return {**_MEANT[section], **values}
