"""Tile sizes of the attention kernels, as data.

No configuration here has run on a GPU yet: each is known to compile, with the bounds on registers and shared memory
that tests/aot states. Measured speeds are to replace these guesses.
"""

from dataclasses import dataclass

import torch
import triton

FORWARD, DKDV, DQ, DBIAS = "forward", "dkdv", "dq", "dbias"

# The interpreter runs the same launchers on CPU tensors (TRITON_INTERPRET=1).
INTERPRETER = 0


@dataclass(frozen=True)
class TileConfig:
    block_m: int  # queries per tile
    block_n: int  # keys per tile
    num_warps: int = 4
    num_stages: int = 2
    precision: str = "ieee"  # of float32 products


def architecture(device: torch.device) -> int:
    """Which rows of the table serve the device: 80, 90, 100 or INTERPRETER. The one place that asks the hardware."""
    if device.type == "cpu":
        return INTERPRETER
    major, _ = torch.cuda.get_device_capability(device)
    # sm_120 has no wgmma or tcgen05 and 99 KiB of shared memory: it is served like sm_86 and sm_89, by rows for 80.
    return {9: 90, 10: 100}.get(major, 80)


def dtype_class(dtype: torch.dtype) -> str:
    return {torch.float32: "float32", torch.float64: "float64"}.get(dtype, "half")


# Head dims above the last bucket, and all of float64, are cut into chunks that kernels loop over.
BUCKETS = (64, 128, 256)
WIDE = 0
CHUNK = {"half": 64, "float32": 64, "float64": 32}


def bucket(dtype: torch.dtype, head_dim: int, v_dim: int) -> int:
    if dtype == torch.float64:
        return WIDE
    return next((width for width in BUCKETS if max(head_dim, v_dim) <= width), WIDE)


def launch_options(
    kernel: str, device: torch.device, dtype: torch.dtype, head_dim: int, v_dim: int
) -> dict[str, int | str]:
    """The keyword arguments with which `kernel` is launched."""
    width = bucket(dtype, head_dim, v_dim)
    config = TABLE[architecture(device), dtype_class(dtype), width, kernel]
    block_d, block_dv = (max(16, triton.next_power_of_2(d)) for d in (head_dim, v_dim))
    if width == WIDE:
        chunk = CHUNK[dtype_class(dtype)]
        block_d, block_dv = min(block_d, chunk), min(block_dv, chunk)
    return {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_D": block_d,
        "BLOCK_DV": block_dv,
        "PRECISION": config.precision,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }


TABLE: dict[tuple[int, str, int, str], TileConfig] = {
    (INTERPRETER, dtype, width, kernel): TileConfig(*tile)
    for dtype in ("half", "float32", "float64")
    for width in (*BUCKETS, WIDE)
    for kernel, tile in {FORWARD: (32, 16), DKDV: (16, 32), DQ: (32, 16), DBIAS: (32, 16)}.items()
}
