"""The cache of compiled layers after good and bad ends, and the word about what is compiled late."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from megatron_omega.config.schema import RunConfig
from megatron_omega.errors import ConfigError
from megatron_omega.host.environment import ProcessPlace
from megatron_omega.run import compilation
from megatron_omega.run.compilation import CompiledLayers, compilation_hooks, share_cache


def start(folder: Path, local_rank: int = 0) -> tuple[Path, dict[str, str]]:
    environ: dict[str, str] = {}
    return share_cache(folder, ProcessPlace(local_rank, local_rank, 2), environ), environ


def test_all_ranks_of_a_host_compile_into_one_folder_of_the_run(tmp_path: Path) -> None:
    (first, environ), (second, other) = start(tmp_path), start(tmp_path, local_rank=1)
    assert first == second and environ == other
    assert Path(environ["TORCHINDUCTOR_CACHE_DIR"]).parent == first and first.is_relative_to(tmp_path)
    chosen = {"TORCHINDUCTOR_CACHE_DIR": "elsewhere"}
    share_cache(tmp_path, ProcessPlace(1, 1, 2), chosen)
    assert chosen["TORCHINDUCTOR_CACHE_DIR"] == "elsewhere"


@pytest.mark.parametrize("is_good", [True, False])
def test_the_cache_survives_a_good_end_only(tmp_path: Path, *, is_good: bool) -> None:
    folder, _ = start(tmp_path)
    (folder / "code").touch()
    hook = CompiledLayers(folder)
    if not is_good:
        hook.on_error(RuntimeError("a rank was killed"))
    hook.on_close()
    start(tmp_path)
    assert (folder / "code").exists() == is_good


def test_late_compilations_are_warnings_and_early_ones_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    causes: list[str] = []
    monkeypatch.setattr(compilation, "Compilations", lambda: SimpleNamespace(new=lambda: [*causes]))
    hook = CompiledLayers(tmp_path)
    causes.append("tensor 'hidden' size mismatch")
    report = lambda step: cast(Any, SimpleNamespace(step=step))  # noqa: E731
    hook.on_step_end(report(101))
    hook.on_step_end(report(102))
    hook.on_evaluate(report(102))
    assert not caplog.records
    hook.on_step_end(report(103))
    hook.on_evaluate(report(103))
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2
    assert "step 103" in caplog.text and "size mismatch" in caplog.text


def test_a_run_without_compiled_layers_has_no_hook_and_swiglu_beside_them_is_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert compilation_hooks(RunConfig()) == []
    wanted = {"training": {"compile": "layers"}, "parallel": {"recompute": "swiglu"}}
    assert len(compilation_hooks(RunConfig.model_validate(wanted))) == 1
    assert "swiglu" in caplog.text


@pytest.mark.parametrize("open_to_others", ["link", "writable", "named"])
def test_code_that_others_could_have_put_there_is_not_run(tmp_path: Path, open_to_others: str) -> None:
    folder, _ = start(tmp_path)
    environ: dict[str, str] = {}
    if open_to_others == "link":
        folder.rename(tmp_path / "elsewhere")
        folder.symlink_to(tmp_path / "elsewhere")
    elif open_to_others == "writable":
        folder.chmod(0o770)
    else:
        (shared := tmp_path / "shared").mkdir()
        shared.chmod(0o777)
        environ["TORCH_EXTENSIONS_DIR"] = str(shared)
    with pytest.raises(ConfigError, match="open to changes by others"):
        share_cache(tmp_path, ProcessPlace(1, 1, 2), environ)
