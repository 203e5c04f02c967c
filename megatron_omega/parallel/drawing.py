"""Normal numbers by place: any slice of a parameter drawn alone, bit-equal to the slice of the whole.

Element i of a parameter is a function of (seed, name, i) and nothing else: a counter goes through splitmix64 (Steele,
Lea and Flood, doi 10.1145/2714064.2660195), and 32 of its bits through a table of the normal quantile with linear
interpolation. The arithmetic is integers, one multiplication and one addition in fp32, so every machine, every length
and every order of drawing gives the same bits; library functions like log and cos do not promise that.
"""

from __future__ import annotations

import hashlib
import math
from functools import cache
from itertools import pairwise
from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor

DRAWING_VERSION = 2
"""Version 1 drew every parameter whole with torch's generator and then sliced it."""
_TABLE_BITS = 14
_FRACTION_BITS = 32 - _TABLE_BITS
_CHUNK_ELEMENTS = {"cpu": 1 << 16}  # a chunk and its temporaries stay in the second-level cache
_DEVICE_CHUNK_ELEMENTS = 1 << 24
_STEP, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB  # constants of splitmix64


def normal_slice(
    seed: int,
    name: str,
    shape: tuple[int, ...],
    axis: int | None = None,
    start: int = 0,
    stop: int = 0,
    *,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Draw elements [start, stop) along `axis` of a tensor of `shape` that is N(0, 1) everywhere: fp32, on `device`.

    The cost is that of the slice. Without `axis` the whole tensor is drawn. Every device gives the same bits.
    """
    device = torch.device(device)
    chunk = _CHUNK_ELEMENTS.get(device.type, _DEVICE_CHUNK_ELEMENTS)
    if axis is None:
        shape, axis, start, stop, whole = (1, *shape), 0, 0, 1, shape
    else:
        whole = (*shape[:axis], stop - start, *shape[axis + 1 :])
    inner, outer = math.prod(shape[axis + 1 :]), math.prod(shape[:axis])
    stride, run = shape[axis] * inner, (stop - start) * inner  # the slice is `outer` runs, a stride apart
    values = torch.empty(outer, run, device=device).float()  # what makes tensors may be told to make narrow ones
    key, num_rows = _key(seed, name), max(1, chunk // max(run, 1))
    for row in range(0, outer, num_rows):
        firsts = torch.arange(row, min(row + num_rows, outer), device=device).mul_(stride).add_(start * inner)
        for column in range(0, run, chunk):
            offsets = torch.arange(column, min(column + chunk, run), device=device)
            places = firsts[:, None] + offsets
            drawn = _quantile(_hash(places.view(-1), key)).view(places.shape)
            values[row : row + num_rows, column : column + chunk] = drawn
    return values.view(whole)


def _key(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest(), "little", signed=True)


def _hash(places: Tensor, key: int) -> Tensor:
    """Turn places (int64, overwritten) into 32 random bits each, in the low half of an int64."""
    z = places.add_(1).mul_(_signed(_STEP)).add_(key)
    z.bitwise_xor_(_shifted(z, 30)).mul_(_signed(_FIRST))
    z.bitwise_xor_(_shifted(z, 27)).mul_(_signed(_SECOND))
    return _shifted(z, 32)


def _shifted(z: Tensor, bits: int) -> Tensor:
    """Return the logical right shift of a 64-bit word; torch's own keeps the sign."""
    return (z >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word


def _quantile(bits: Tensor) -> Tensor:
    bases, slopes = _table(bits.device)
    fraction = (bits & ((1 << _FRACTION_BITS) - 1)).float().mul_(2.0**-_FRACTION_BITS)
    cell = bits >> _FRACTION_BITS
    return slopes.take(cell).mul_(fraction).add_(bases.take(cell))


@cache
def _table(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return value and slope of each cell of the quantile, scaled so that the variance is exactly 1.

    The outermost cells end where the normal distribution has half of their probability left: at 4.2 deviations.
    """
    cells = 1 << _TABLE_BITS
    probabilities = [0.25 / cells, *(i / cells for i in range(1, cells)), 1 - 0.25 / cells]
    points = [NormalDist().inv_cdf(probability) for probability in probabilities]
    variance = sum(a * a + a * b + b * b for a, b in pairwise(points)) / 3 / cells
    points = [point / math.sqrt(variance) for point in points]
    bases, ends = np.array(points[:-1], np.float32), np.array(points[1:])
    slopes = (ends - np.array(points[:-1])).astype(np.float32)
    return torch.from_numpy(bases).to(device), torch.from_numpy(slopes).to(device)
