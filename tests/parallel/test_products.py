"""Products by oneDNN: equal to torch's, whatever the strides; where they are not taken; and how they are counted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from megatron_omega.parallel import products
from megatron_omega.parallel.lean import gated_linear, linear
from megatron_omega.parallel.products import SMALLEST, by_onednn, is_for_onednn, pack, product

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
BOUND = 1e-5


class Names(TorchDispatchMode):
    """Remembers what is called."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def away(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


def laid_out(rows: int, columns: int, how: str) -> Tensor:
    if how == "rows":
        return torch.randn(rows, columns)
    if how == "columns":
        return torch.randn(columns, rows).t()
    if how == "part":  # neither it nor its transpose is dense
        return torch.randn(rows, 2 * columns + 16)[:, 16 : 16 + columns]
    return torch.randn(1, columns).expand(rows, columns)


@pytest.mark.parametrize("left", ["rows", "columns", "part", "expanded"])
@pytest.mark.parametrize("right", ["rows", "columns", "part"])
def test_a_product_is_torchs_whatever_the_strides(left: str, right: str) -> None:
    torch.manual_seed(1)
    a, b = laid_out(96, 128, left), laid_out(160, 128, right)
    assert b.numel() >= SMALLEST
    assert away(product(a, b), a.double() @ b.double().t()) < BOUND


@pytest.fixture
def processor(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Stand on a processor whose training products MKL computes, or not."""
    monkeypatch.setattr(products, "MKL_IS_FASTER", request.param == "Intel")


@needs_onednn
@pytest.mark.parametrize("processor", ["AMD"], indirect=True)
@pytest.mark.usefixtures("processor")
def test_small_products_and_other_formats_stay_with_torch() -> None:
    big, small = torch.randn(1024, 1024), torch.randn(2, 2)
    assert is_for_onednn(big, big)
    assert not is_for_onednn(small, small)
    assert not is_for_onednn(big.double(), big.double())
    assert not is_for_onednn(big.bfloat16(), big.bfloat16())
    assert not is_for_onednn(big.to("meta"), big.to("meta"))


@needs_onednn
@pytest.mark.parametrize(("processor", "calls"), [("AMD", 6), ("Intel", 0)], indirect=["processor"])
@pytest.mark.usefixtures("processor")
def test_layers_use_it_forward_and_backward_with_right_gradients(calls: int) -> None:
    torch.manual_seed(2)
    hidden = torch.randn(4, 96, 64, requires_grad=True)
    up, down = torch.randn(512, 64, requires_grad=True), torch.randn(64, 256, requires_grad=True)
    weighting = torch.randn(4, 96, 64)
    with Names() as names:
        (gated_linear(linear(hidden, up, 512), down) * weighting).sum().backward()
    assert names.found.count("_linear_pointwise") == calls
    exact = [one.detach().double().requires_grad_() for one in (hidden, up, down)]
    gate, value = (exact[0] @ exact[1].t()).chunk(2, dim=-1)
    ((torch.nn.functional.silu(gate) * value @ exact[2].t()) * weighting).sum().backward()
    for ours, its in zip((hidden, up, down), exact, strict=True):
        assert ours.grad is not None
        assert its.grad is not None
        assert away(ours.grad, its.grad) < BOUND


@pytest.mark.parametrize(
    ("maker", "flags", "is_mkl"),
    [
        ("GenuineIntel", "fma avx2 avx512f", True),
        ("GenuineIntel", "fma avx2", True),
        ("AuthenticAMD", "fma avx2", True),
        ("AuthenticAMD", "fma avx2 avx512f avx512vl", False),
    ],
)
def test_mkl_trains_unless_it_leaves_half_of_the_processor_idle(maker: str, flags: str, is_mkl: bool) -> None:
    one = f"processor\t: 0\nvendor_id\t: {maker}\nflags\t\t: fpu {flags} vaes\nbugs\t\t: none\n"
    assert products.mkl_is_faster(f"{one}\n{one}") is is_mkl


@needs_onednn
@pytest.mark.parametrize("processor", ["AMD", "Intel"], indirect=True)
@pytest.mark.usefixtures("processor")
def test_it_is_onednn_in_inference_mode_whatever_the_processor() -> None:
    torch.manual_seed(4)
    rows, weight = torch.randn(64, 1024), torch.randn(512, 1024)
    with torch.inference_mode(), Names() as names:
        whole = product(rows, weight)
        parts = [product(rows[first : first + 8], weight) for first in range(0, 64, 8)]
    assert names.found.count("_linear_pointwise") == 9
    assert torch.equal(torch.cat(parts), whole)


@needs_onednn
@pytest.mark.parametrize("shape", [(768, 512), (512, 2304), (360, 1024)])
def test_a_row_does_not_feel_how_many_there_are(shape: tuple[int, int]) -> None:
    """Texts that are generated together rely on it, from two rows on."""
    torch.manual_seed(3)
    weight, rows = pack(torch.randn(shape)), torch.randn(64, shape[1])
    whole = by_onednn(rows, weight)
    for count in (2, 4, 5, 12, 16, 20, 33):
        assert torch.equal(by_onednn(rows[:count].clone(), weight), whole[:count])


@needs_onednn
def test_torch_counts_its_operations() -> None:
    left, right = torch.randn(128, 128), torch.randn(256, 128)
    with FlopCounterMode(display=False) as counter:
        product(left, right)
    assert counter.get_total_flops() == 2 * 128 * 128 * 256
