from __future__ import annotations

import time
from pathlib import Path

from megatron_omega.host.exclusions import choose, exclude, excluded


def test_a_host_is_left_out_for_a_while(tmp_path: Path) -> None:
    assert excluded(tmp_path) == []
    exclude(tmp_path, ["n1", "n2.site"], "hang")
    exclude(tmp_path, ["n2"], "silent fault")
    with (tmp_path / "excluded.jsonl").open("a") as file:
        file.write("no line of ours\n")
    found = excluded(tmp_path)
    assert [(one.host, one.reason) for one in found] == [("n2", "silent fault"), ("n1", "hang")]
    assert "n2 (silent fault; 0 hours ago)" in str(found[0])
    assert excluded(tmp_path, now=time.time() + 8 * 86400) == []


def test_faulty_hosts_are_replaced_while_others_are_left(tmp_path: Path) -> None:
    exclude(tmp_path, ["n1"], "hang")
    exclude(tmp_path, ["n3.site"], "device error")
    left_out = excluded(tmp_path)
    assert choose(["n1", "n2", "n3", "n4"], left_out, 2) == (["n2", "n4"], [])
    used, back = choose(["n1", "n2", "n3"], left_out, 2)
    assert used == ["n1", "n2"] and [one.host for one in back] == ["n1"], "the one that was blamed first comes back"
    assert choose(["n1", "n3"], left_out, 2)[0] == ["n1", "n3"]
    assert choose(["n5"], left_out, 2) == (["n5"], [])
