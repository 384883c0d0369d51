"""The kernels of cross-entropy compile for every architecture without spills. What passes here "compiles"."""

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from dry_launch import Launch, dry_launches, resources
from meta_problems import launch_cross_entropy

FULL = os.environ.get("PYATTN_LADDER") == "full"
TARGETS = [(80, torch.bfloat16), (90, torch.bfloat16), (90, torch.float32), (90, torch.float64), (100, torch.bfloat16)]
if FULL:
    TARGETS = [(arch, dtype) for arch in (80, 90, 100) for dtype in (torch.bfloat16, torch.float32, torch.float64)]

OPTIONS: dict[str, dict[str, Any]] = {
    "indices": {},
    "weighted, smoothed": {"weighted": True, "label_smoothing": 0.1},
    "probabilities": {"probabilities": True, "weighted": True, "label_smoothing": 0.1},
}
SHAPES = [(64, 30522), (64, 1000), (64, 2), (2, 21, 512, 512)] if FULL else [(64, 30522)]

# Of float64: a division is a call, whose frame is no spill.
STACK_BYTES = {torch.float64: 32}


def compiled(launch: Launch) -> tuple[Launch, Any, Any]:
    kernel = launch.compile()
    return launch, kernel, resources(kernel)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("arch, dtype", TARGETS, ids=str)
def test_every_kernel(arch: int, dtype: torch.dtype, option: str) -> None:
    with dry_launches(arch) as launches:
        for shape in SHAPES:
            launch_cross_entropy(dtype, shape, **OPTIONS[option])
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for launch, kernel, used in pool.map(compiled, launches):
            assert used.stack_bytes <= STACK_BYTES.get(dtype, 0), (launch.kernel, used)
            assert "llvm.trap" not in kernel.asm["llir"]
