from __future__ import annotations

import logging
from pathlib import Path

import pytest

from megatron_omega.log import configure_logging, get_logger, keep_log


def test_a_rank_keeps_what_the_common_log_leaves_out(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    logger = get_logger()
    before = logger.handlers[:], logger.level, logger.propagate
    try:
        configure_logging(rank=3)
        keep_log(tmp_path / "logs/rank-00003.log")
        get_logger("x").info("a step")
        get_logger("x").warning("something, with HF_TOKEN=hf_abcdefghijklmnopqrstuvwxyz0123456789")
        own, common = (tmp_path / "logs/rank-00003.log").read_text(), capfd.readouterr().err
        assert "I a step" in own and "something" in own and "hf_abc" not in own
        assert "a step" not in common and "[rank 3] W something" in common
        for number in range(3000):
            get_logger("x").info("line %d %s", number, "." * 4000)
        sizes = [path.stat().st_size for path in (tmp_path / "logs").iterdir()]
        assert len(sizes) == 3 and max(sizes) <= 4 << 20, "the oldest lines go"
    finally:
        for handler in logger.handlers:
            handler.close()
        logger.handlers[:] = before[0]
        logger.setLevel(before[1])
        logger.propagate = before[2]
        logging.captureWarnings(capture=False)
