"""Seeing a run: files, a bar, TensorBoard, Weights & Biases, a plot. All of it hooks, all of it on rank 0.

Knows reports and the run folder; knows nothing of models, data or engines.
"""

from __future__ import annotations

from megatron_omega.config.schema import LoggingConfig
from megatron_omega.monitoring.files import EventsFile, MetricsFile
from megatron_omega.monitoring.plot import LossPlot
from megatron_omega.monitoring.progress import ProgressBar
from megatron_omega.monitoring.trackers import TensorBoard, Wandb
from megatron_omega.training.hooks import Hook

__all__ = ["EventsFile", "LossPlot", "MetricsFile", "ProgressBar", "TensorBoard", "Wandb", "monitoring_hooks"]


def monitoring_hooks(config: LoggingConfig, *, is_main: bool) -> list[Hook]:
    """Return the hooks that `config` asks for; none on ranks other than the main one."""
    if not is_main:
        return []
    hooks: list[Hook] = [MetricsFile(), EventsFile(), ProgressBar(config)]
    if config.tensorboard:
        hooks.append(TensorBoard())
    if config.wandb != "off":
        hooks.append(Wandb(config))
    return [*hooks, LossPlot()]
