"""The launchers, on meta tensors: which kernels they launch, with which tiles and how many programs."""

import math

import pytest
import torch
from dry_launch import Launch, dry_launches
from meta_problems import launch

from pyattn.kernels import _configs

ARCHITECTURES = [80, 90, 100]
KERNELS = {
    "attention_fwd_kernel": "forward",
    "attention_bwd_dkdv_kernel": "dkdv",
    "attention_bwd_dq_kernel": "dq",
    "attention_bwd_dbias_kernel": "dbias",
}
DTYPES = {"half": (torch.float16, torch.bfloat16), "float32": (torch.float32,), "float64": (torch.float64,)}


def by_kernel(launches: list[Launch]) -> dict[str, Launch]:
    return {launch.kernel: launch for launch in launches}


@pytest.mark.parametrize("arch, kind, width", [key for key in _configs.TABLE if key[0] != _configs.INTERPRETER])
def test_every_row_is_launched_as_it_stands(arch: int, kind: str, width: int) -> None:
    """At the bucket's upper end, below it, and with a v_dim of another size."""
    row = _configs.TABLE[arch, kind, width]
    for dtype in DTYPES[kind]:
        for head_dim, v_dim in ((width or 300, width or 300), (max(1, width - 15), 16), (16, width or 257)):
            if kind == "float64" or _configs.bucket(dtype, head_dim, v_dim) == width:
                with dry_launches(arch) as launches:
                    launch(dtype, head_dim, v_dim, bias=(4, 1024, 1024))
                launched = by_kernel(launches)
                assert launched.keys() == {*KERNELS, "attention_bwd_rows_kernel"}
                for kernel, name in KERNELS.items():
                    check_tile(launched[kernel], getattr(row, name), head_dim, v_dim)


def check_tile(launch: Launch, tile: _configs.Tile, head_dim: int, v_dim: int) -> None:
    constants, options = launch.constants, launch.options
    assert (constants["BLOCK_M"], constants["BLOCK_N"]) == (tile.block_m, tile.block_n)
    assert (options["num_warps"], options["num_stages"]) == (tile.num_warps, tile.num_stages)
    assert constants["PRECISION"] == tile.precision
    for dim, name in ((head_dim, "BLOCK_D"), (v_dim, "BLOCK_DV")):
        assert constants[name] >= 16, "tensor cores take no less"
        assert constants[name] >= dim or constants[name] in _configs.CHUNK.values()


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_kernels_of_each_feature(arch: int) -> None:
    def names(**options: object) -> list[str]:
        with dry_launches(arch) as launches:
            launch(torch.bfloat16, 64, **options)
        return [launch.kernel for launch in launches]

    plain = [
        "attention_fwd_kernel",
        "attention_bwd_rows_kernel",
        "attention_bwd_dkdv_kernel",
        "attention_bwd_dq_kernel",
    ]
    assert names() == names(dropout_p=0.1) == names(dlse=True) == plain
    assert names(bias=(1024, 1024)) == [*plain, "attention_bwd_dbias_kernel"]
    assert names(bias=(1024,)) == [*plain, "attention_bwd_dbias_kernel", "sum_parts_kernel"]
    summarised = [
        name for kernel in plain for name in (["mask_tiles_kernel"] if "rows" not in kernel else []) + [kernel]
    ]
    assert names(mask=(1024,)) == summarised


@pytest.mark.parametrize("lengths", [(0, 5), (5, 0), (1, 1), (1000, 77)], ids=str)
@pytest.mark.parametrize("batch", [(), (0,), (2, 3)], ids=str)
def test_grids(lengths: tuple[int, int], batch: tuple[int, ...]) -> None:
    """One program per tile of a head; nothing is launched for nothing."""
    (L, S), B = lengths, math.prod(batch)
    with dry_launches(90) as launches:
        launch(torch.bfloat16, 64, 320, batch=batch, heads=(6, 3), lengths=lengths, bias=(L, S))
    launched = by_kernel(launches)
    row = _configs.TABLE[90, "half", _configs.WIDE]
    chunks = 320 // _configs.CHUNK["half"]

    def tiles(length: int, block: int) -> int:
        return -(-length // block)

    expected = {
        "attention_fwd_kernel": (B * 6 * tiles(L, row.forward.block_m), chunks),
        "attention_bwd_dkdv_kernel": (B * 3 * tiles(S, row.dkdv.block_n), chunks),
        "attention_bwd_dq_kernel": (B * 6 * tiles(L, row.dq.block_m), 1),
        "attention_bwd_dbias_kernel": (tiles(L, row.dbias.block_m) * tiles(S, row.dbias.block_n), launched_parts(L, S)),
    }
    for kernel, grid in expected.items():
        assert (launched[kernel].grid if kernel in launched else None) == (grid if grid[0] else None), kernel


def launched_parts(L: int, S: int) -> int:
    return 16 if 1 in (L, S) else 1


def test_workspace_of_a_bias_gradient() -> None:
    """No temporary grows with batch x heads x q_len x kv_len, unless the bias does."""
    allocated = []
    empty = torch.empty

    def recording_empty(*args: object, **kwargs: object) -> torch.Tensor:
        allocated.append(empty(*args, **kwargs))
        return allocated[-1]

    for bias in ((1024, 1024), (2, 1, 1, 1024), (4, 1024, 1), (1,)):
        with pytest.MonkeyPatch.context() as patch, dry_launches(90):
            patch.setattr("pyattn.kernels.attention.torch.empty", recording_empty)
            launch(torch.bfloat16, 64, bias=bias)
    assert max(x.numel() for x in allocated) == 1024 * 1024, "the bias itself"


def test_specialisation_follows_strides() -> None:
    """A unit stride is a constant, lengths are not: new lengths reuse a kernel, new layouts make another."""
    with dry_launches(90) as launches:
        launch(torch.bfloat16, 64)
        launch(torch.bfloat16, 64, lengths=(1000, 77))
        launch(torch.bfloat16, 64, layout=lambda x: x.mT.contiguous().mT)
    first, longer, transposed = (launch.source for launch in launches if launch.kernel == "attention_fwd_kernel")
    assert first.signature["q"].stride_c == longer.signature["q"].stride_c == "constexpr"
    assert transposed.signature["q"].stride_r == "constexpr" != transposed.signature["q"].stride_c
    assert "L" not in first.constants and first.signature["L"] == "i32"


def test_heads_beyond_32_bits_take_wide_offsets() -> None:
    for rows, wide in ((2**20, False), (2**25, True)):
        with dry_launches(90) as launches:
            launch(torch.bfloat16, 64, lengths=(128, rows))
        forward = by_kernel(launches)["attention_fwd_kernel"].source
        position = forward.fn.arg_names.index("k")
        assert forward.constants[position, 5].value is wide
