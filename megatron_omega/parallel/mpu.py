"""The facade DeepSpeed asks for its process groups when there is no PipelineModule. Holds no logic of its own."""

from __future__ import annotations

import torch.distributed as dist

from megatron_omega.parallel.topology import Topology


class ModelParallelUnit:
    """`Topology` under the names DeepSpeed calls."""

    def __init__(self, topology: Topology) -> None:
        self._topology = topology

    def get_model_parallel_rank(self) -> int:
        return self._topology.model.rank

    def get_model_parallel_world_size(self) -> int:
        return self._topology.model.size

    def get_model_parallel_group(self) -> dist.ProcessGroup | None:
        return self._topology.model.handle

    def get_tensor_model_parallel_rank(self) -> int:
        return self._topology.tensor.rank

    def get_tensor_model_parallel_world_size(self) -> int:
        return self._topology.tensor.size

    def get_tensor_model_parallel_group(self) -> dist.ProcessGroup | None:
        return self._topology.tensor.handle

    def get_data_parallel_rank(self) -> int:
        return self._topology.data.rank

    def get_data_parallel_world_size(self) -> int:
        return self._topology.data.size

    def get_data_parallel_group(self) -> dist.ProcessGroup | None:
        return self._topology.data.handle

    def get_pipe_parallel_rank(self) -> int:
        return self._topology.pipeline.rank

    def get_pipe_parallel_world_size(self) -> int:
        return self._topology.pipeline.size

    def get_pipe_parallel_group(self) -> dist.ProcessGroup | None:
        return self._topology.pipeline.handle
