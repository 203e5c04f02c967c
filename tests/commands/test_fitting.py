"""A start chooses its hosts, and a layout that fits them, with the same global batch."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
from tiny import ROOT

from megatron_omega.commands.fitting import fit
from megatron_omega.config.arguments import parse_arguments
from megatron_omega.config.load import resolve_run
from megatron_omega.errors import ConfigError
from megatron_omega.host.exclusions import exclude

HOSTS = ["n1", "n2", "n3", "n4"]
RUN = ["--config", str(ROOT / "examples/omega-tiny/run.yaml"), "--batch.global_batch_size", "24",
       "--batch.micro_batch_size", "2", "--parallel.tensor_parallel_size", "1", "--parallel.pipeline_parallel_size", "1",
       "--parallel.sequence_parallel", "false"]  # fmt: skip


def wish(least: int, most: int, each: int = 2) -> argparse.Namespace:
    return argparse.Namespace(nodes=(least, most), ranks_per_node=each, gpu="cpu")


def test_a_faulty_host_is_replaced_by_a_spare(tmp_path: Path) -> None:
    start = fit(RUN, HOSTS, tmp_path, wish(3, 3))
    assert start.hosts == ("n1", "n2", "n3") and start.words == ()
    exclude(tmp_path, ["n2"], "silent fault")
    assert fit(RUN, HOSTS, tmp_path, wish(3, 3)).hosts == ("n1", "n3", "n4")
    assert start.for_shell(Path("/r/a b")) == "codes='/r/a b' nodes=3 hosts=n1,n2,n3 layout=()"


def test_with_fewer_hosts_the_layout_changes_and_the_batch_stays(tmp_path: Path) -> None:
    run = [*RUN, "--parallel.pipeline_parallel_size", "3"]
    start = fit(run, HOSTS[:2], tmp_path, wish(1, 3))
    assert len(start.hosts) == 2
    config = resolve_run(parse_arguments([*run, *start.words]), 4).config
    assert config.batch.global_batch_size == 24 and config.parallel.pipeline_parallel_size != 3


def test_without_hosts_it_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="0 hosts are left of 1-1"):
        fit(RUN, [], tmp_path, wish(1, 1))
