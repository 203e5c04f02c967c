"""What a driver calls a GPU, and which entry of the hardware file it is."""

from __future__ import annotations

import pytest

from megatron_omega.planner.hardware import read_hardware
from megatron_omega.planner.machine import name_in


@pytest.mark.parametrize(
    ("called", "entry"),
    [
        ("NVIDIA A100-SXM4-40GB", "a100-40g"),
        ("NVIDIA A100-SXM4-80GB", "a100-80g"),
        ("NVIDIA A100 80GB PCIe", "a100-80g"),
        ("NVIDIA H100 80GB HBM3", "h100-80g"),
        ("NVIDIA H100 PCIe", "h100-pcie-80g"),
        ("NVIDIA H100 NVL", "h100-nvl-94g"),
        ("NVIDIA H200", "h200-141g"),
        ("NVIDIA B200", "b200-180g"),
        ("NVIDIA L40S", "l40s-48g"),
        ("NVIDIA GeForce RTX 4090", "rtx4090-24g"),
        ("Tesla V100-SXM2-32GB", "v100-32g"),
        ("cpu", "cpu"),
        ("NVIDIA T4", None),
    ],
)
def test_gpus_are_told_apart(called: str, entry: str | None) -> None:
    assert name_in(read_hardware(), called) == entry
