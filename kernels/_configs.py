"""Tile sizes of the attention kernels, as data.

No configuration here has run on a GPU yet: each is known to compile, within the bounds on shared memory, tensor memory
and spills that tests/aot states. Measured speeds are to replace these guesses.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton

FORWARD, DKDV, DQ, DBIAS = "forward", "dkdv", "dq", "dbias"

# The interpreter runs the same launchers on CPU tensors (TRITON_INTERPRET=1).
INTERPRETER = 0

# The table's tiles are the largest tried that compile without spills, or nearly. On sm_90 that can mean less than the
# 64 rows of wgmma (float32, and the backward at 256): such tiles run on the tensor cores by mma.sync.
#
# Head dims up to which a tile holds whole rows. Wider ones, and all of float64, are cut into chunks that the kernels
# loop over: their rows would not fit the registers.
BUCKETS = {"half": (64, 128, 256), "float32": (64, 128), "float64": ()}
WIDE = 0
CHUNK = {"half": 64, "float32": 64, "float64": 32}

MAX_BLOCK_M = 128


@dataclass(frozen=True)
class Tile:
    block_m: int  # queries; divides MAX_BLOCK_M
    block_n: int  # keys
    num_warps: int = 4
    num_stages: int = 2
    # Of float32 products: tf32x3 runs on tensor cores with three products for each one and an error near float32's.
    precision: str = "tf32x3"


@dataclass(frozen=True)
class Row:
    """The tiles of one (architecture, dtype class, bucket of head dim)."""

    forward: Tile
    dkdv: Tile
    dq: Tile
    dbias: Tile


def architecture(device: torch.device) -> int:
    """Which rows of the table serve the device: 80, 90, 100 or INTERPRETER. The one place that asks the hardware."""
    if device.type == "cpu":
        return INTERPRETER
    major, _ = torch.cuda.get_device_capability(device)
    # sm_86, sm_89 and sm_120 have the tensor cores of sm_80 and 99 KiB of shared memory: the rows of 80 fit them all.
    return {9: 90, 10: 100}.get(major, 80)


def dtype_class(dtype: torch.dtype) -> str:
    return {torch.float32: "float32", torch.float64: "float64"}.get(dtype, "half")


def bucket(dtype: torch.dtype, head_dim: int, v_dim: int) -> int:
    return next((width for width in BUCKETS[dtype_class(dtype)] if max(head_dim, v_dim) <= width), WIDE)


def launch_options(kernel: str, device: torch.device, dtype: torch.dtype, head_dim: int, v_dim: int) -> dict[str, Any]:
    """The keyword arguments with which `kernel` is launched."""
    width = bucket(dtype, head_dim, v_dim)
    tile: Tile = getattr(TABLE[architecture(device), dtype_class(dtype), width], kernel)
    block_d, block_dv = (max(16, triton.next_power_of_2(d)) for d in (head_dim, v_dim))
    if width == WIDE:
        chunk = CHUNK[dtype_class(dtype)]
        block_d, block_dv = min(block_d, chunk), min(block_dv, chunk)
    return {
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_D": block_d,
        "BLOCK_DV": block_dv,
        "PRECISION": tile.precision,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }


_INTERPRETED = Row(forward=Tile(32, 16), dkdv=Tile(16, 32), dq=Tile(32, 16), dbias=Tile(32, 16))
_DOUBLE = Row(*(Tile(32, 32, 8, 1, "ieee") for _ in range(4)))

TABLE: dict[tuple[int, str, int], Row] = {
    (80, "half", 64): Row(Tile(128, 64, 8, 3), Tile(32, 64, 8, 2), Tile(64, 64, 4, 2), Tile(32, 64, 4, 2)),
    (80, "half", 128): Row(Tile(128, 32, 8, 2), Tile(32, 64, 8, 2), Tile(64, 64, 8, 2), Tile(32, 64, 8, 2)),
    (80, "half", 256): Row(Tile(64, 32, 8, 2), Tile(32, 32, 8, 1), Tile(64, 32, 8, 1), Tile(32, 16, 8, 1)),
    (80, "half", WIDE): Row(Tile(64, 64, 8, 2), Tile(32, 64, 8, 1), Tile(64, 64, 8, 1), Tile(32, 64, 8, 1)),
    (80, "float32", 64): Row(Tile(64, 32, 4, 2), Tile(32, 32, 8, 1), Tile(64, 32, 8, 1), Tile(32, 16, 8, 1)),
    (80, "float32", 128): Row(Tile(64, 32, 8, 1), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1), Tile(32, 16, 8, 1)),
    (80, "float32", WIDE): Row(Tile(32, 32, 8, 1), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1), Tile(32, 16, 8, 1)),
    (90, "half", 64): Row(Tile(128, 128, 8, 2), Tile(32, 128, 8, 2), Tile(128, 64, 8, 2), Tile(64, 32, 4, 2)),
    (90, "half", 128): Row(Tile(128, 128, 8, 2), Tile(16, 64, 8, 2), Tile(128, 64, 8, 2), Tile(64, 32, 4, 2)),
    (90, "half", 256): Row(Tile(64, 64, 8, 2), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1), Tile(64, 32, 8, 1)),
    (90, "half", WIDE): Row(Tile(64, 64, 4, 2), Tile(32, 64, 4, 1), Tile(64, 64, 4, 1), Tile(64, 32, 4, 1)),
    (90, "float32", 64): Row(Tile(64, 64, 4, 2), Tile(32, 16, 8, 1), Tile(64, 32, 4, 1), Tile(32, 16, 8, 1)),
    (90, "float32", 128): Row(Tile(64, 32, 8, 1), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1), Tile(32, 16, 8, 1)),
    (90, "float32", WIDE): Row(Tile(32, 32, 8, 1), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1), Tile(32, 16, 8, 1)),
    (100, "half", 64): Row(Tile(128, 64, 8, 2), Tile(32, 128, 8, 2), Tile(128, 64, 8, 2), Tile(64, 32, 4, 2)),
    (100, "half", 128): Row(Tile(128, 64, 8, 2), Tile(32, 128, 8, 1), Tile(128, 64, 8, 2), Tile(64, 32, 4, 2)),
    (100, "half", 256): Row(Tile(64, 64, 8, 1), Tile(32, 64, 8, 1), Tile(64, 64, 8, 1), Tile(64, 32, 8, 1)),
    (100, "half", WIDE): Row(Tile(64, 64, 4, 1), Tile(32, 64, 8, 1), Tile(64, 64, 4, 1), Tile(64, 32, 4, 1)),
    (100, "float32", 64): Row(Tile(64, 32, 4, 2), Tile(32, 64, 8, 1), Tile(64, 32, 8, 1), Tile(64, 32, 8, 1)),
    (100, "float32", 128): Row(Tile(64, 32, 8, 1), Tile(32, 64, 8, 1), Tile(64, 32, 8, 1), Tile(64, 32, 8, 1)),
    (100, "float32", WIDE): Row(Tile(64, 32, 8, 1), Tile(32, 64, 8, 1), Tile(64, 32, 8, 1), Tile(64, 32, 8, 1)),
}
TABLE |= {(arch, "float64", WIDE): _DOUBLE for arch in (80, 90, 100)}
TABLE |= {(INTERPRETER, kind, width): _INTERPRETED for kind, widths in BUCKETS.items() for width in (*widths, WIDE)}
