"""Seeing a run: files, a bar, TensorBoard, Weights & Biases, a plot. All of it hooks, all of it on rank 0.

Knows reports and the run folder; knows nothing of models, data or engines.
"""

from __future__ import annotations

from megatron_omega.config.schema import LoggingConfig
from megatron_omega.monitoring.epochs import EpochLog, EpochsAt
from megatron_omega.monitoring.files import DocumentsOf, EventsFile, MetricsFile
from megatron_omega.monitoring.plot import LossPlot
from megatron_omega.monitoring.progress import ProgressBar
from megatron_omega.monitoring.trackers import TensorBoard, Wandb
from megatron_omega.training.hooks import Hook

__all__ = ["EventsFile", "LossPlot", "MetricsFile", "ProgressBar", "TensorBoard", "Wandb", "monitoring_hooks"]


def monitoring_hooks(
    config: LoggingConfig,
    *,
    is_main: bool,
    documents_of: DocumentsOf | None = None,
    epochs_at: EpochsAt | None = None,
) -> list[Hook]:
    """Return the hooks that `config` asks for; none on ranks other than the main one.

    `documents_of` names the documents of bad batches for events.jsonl; `epochs_at` counts passes through the text.
    """
    if not is_main:
        return []
    hooks: list[Hook] = [EventsFile(documents_of), MetricsFile(epochs_at), ProgressBar(config)]
    if epochs_at is not None:
        hooks.append(EpochLog(epochs_at))
    if config.tensorboard:
        hooks.append(TensorBoard())
    if config.wandb != "off":
        hooks.append(Wandb(config))
    return [*hooks, LossPlot()]
