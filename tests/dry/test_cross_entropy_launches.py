"""The launchers of cross-entropy, on meta tensors: which kernels they launch, with which blocks and programs."""

from typing import Any

import pytest
import torch
from dry_launch import Launch, dry_launches
from meta_problems import launch_cross_entropy


def launches(shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16, **options: Any) -> list[Launch]:
    with dry_launches(90) as launched:
        launch_cross_entropy(dtype, shape, **options)
    return launched


FORWARD, BACKWARD, WEIGHTS = "cross_entropy_fwd_kernel", "cross_entropy_bwd_kernel", "target_weights_kernel"


def test_kernels_of_each_option() -> None:
    def names(**options: Any) -> list[str]:
        return [launch.kernel for launch in launches((64, 1000), **options)]

    assert names() == names(weighted=True, label_smoothing=0.1) == [FORWARD, WEIGHTS, WEIGHTS, BACKWARD]
    assert names(reduction="sum") == names(reduction="none") == names(probabilities=True) == [FORWARD, BACKWARD]


@pytest.mark.parametrize("shape", [(7, 5), (2048, 30522), (2, 21, 64, 48), (0, 5), (3, 5, 0)], ids=str)
def test_a_program_per_row(shape: tuple[int, ...]) -> None:
    rows = shape[0] * torch.Size(shape[2:]).numel()
    grids = {launch.kernel: launch.grid for launch in launches(shape)}
    if rows:
        assert grids == {FORWARD: (rows,), BACKWARD: (rows,), WEIGHTS: (-(-rows // 1024),)}
    else:
        assert not grids


@pytest.mark.parametrize("classes, block", [(1, 1), (5, 8), (1000, 1024), (4096, 4096), (30522, 4096)])
def test_blocks_of_classes(classes: int, block: int) -> None:
    assert {x.constants["BLOCK_V"] for x in launches((64, classes), reduction="sum")} == {block}


def test_sizes_reuse_a_kernel() -> None:
    """Sizes are no part of what a kernel is compiled for, but the unit stride of classes is."""
    first, *_ = launches((64, 30522))
    other, *_ = launches((96, 50000))
    moved, *_ = launches((2, 30000, 8))
    assert first.source.signature["x"].stride_v == other.source.signature["x"].stride_v == "constexpr"
    assert moved.source.signature["x"].stride_v != "constexpr"
    assert "V" not in first.constants and first.source.signature["V"] == other.source.signature["V"] == "i32"
