"""Every configuration of the table compiles for its architecture, within that architecture's means.

By default the rows that most problems meet, and each feature once; PYATTN_LADDER=full compiles every row and every
feature on each architecture. What passes here "compiles": whether it works, and how fast it is, takes a GPU.
"""

import os
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
import torch
from dry_launch import Launch, Resources, dry_launches, resources
from meta_problems import launch

from pyattn.kernels._configs import INTERPRETER, TABLE, WIDE

FULL = os.environ.get("PYATTN_LADDER") == "full"

# Bytes of shared memory that one block may have; for 80 that of sm_86, sm_89 and sm_120, which run the same rows.
SHARED_BYTES = {80: 101376, 90: 232448, 100: 232448}
TENSOR_MEMORY_COLUMNS = 512
TENSOR_CORE = ("HMMA", "HGMMA", "UTCHMMA", "DMMA")
OWN_TENSOR_CORE = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}

DTYPES = {"half": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}
DBIAS = "attention_bwd_dbias_kernel"
ATTENTION = ["attention_fwd_kernel", "attention_bwd_dkdv_kernel", "attention_bwd_dq_kernel", DBIAS]

ROWS = [key for key in TABLE if key[0] != INTERPRETER and (FULL or (key[1] == "half" and key[2] in (64, 128)))]
if not FULL:
    ROWS += [(90, "float32", 64), (90, "float64", WIDE)]

# Beside the causal rows above; several at a time, since each kernel takes seconds.
FEATURES: dict[str, dict[str, Any]] = {
    "mask, dropout": {"mask": (2, 1, 1024, 1024), "dropout_p": 0.1},
    "bias along keys, gradient of lse, float16": {"bias": (1024,), "dlse": True, "dtype": torch.float16},
    "not causal, transposed, odd widths": {
        "causal": False, "layout": lambda x: x.mT.contiguous().mT, "head_dim": 40, "v_dim": 24
    },
}  # fmt: skip
FEATURE_ARCHITECTURES = [80, 90, 100] if FULL else [90]

# Stack of kernels that spill registers: what they need today, to be lowered, never raised. All others need none.
# (In float64 it is not spills but the stack of a division that is called.)
SPILLED_BYTES = {
    (90, "float32", 64, "attention_bwd_dkdv_kernel"): 8,
    (100, "half", 256, "attention_bwd_dkdv_kernel"): 200,
    **{(arch, "float64", WIDE, "attention_fwd_kernel"): 32 for arch in (80, 90, 100)},
}

PASSES = 3  # copies of the tile's code in a kernel: open, partial, careful

pool = ThreadPoolExecutor(os.cpu_count())


def compiled(launched: Launch) -> tuple[Any, Resources]:
    kernel = launched.compile()
    return kernel, resources(kernel)


def launches(arch: int, dtype: torch.dtype, head_dim: int, v_dim: int | None = None, **options: Any) -> list[Launch]:
    with dry_launches(arch) as launched:
        launch(dtype, head_dim, v_dim, **options)
    return launched


def row_launches(arch: int, kind: str, width: int) -> dict[str, Launch]:
    """The attention kernels of one row, causal, with the bias only where its gradient is asked for."""
    head_dim = width or (40 if kind == "float64" else 300)
    plain = launches(arch, DTYPES[kind], head_dim)
    biased = launches(arch, DTYPES[kind], head_dim, bias=(4, 1024, 1024))
    kernels = [x for x in plain if x.kernel in ATTENTION] + [x for x in biased if x.kernel == DBIAS]
    return {x.kernel: x for x in kernels}


def feature_launches(arch: int, feature: str) -> list[Launch]:
    options = {"dtype": torch.bfloat16, "head_dim": 64} | FEATURES[feature]
    return launches(arch, **options)


@pytest.fixture(scope="module")
def row_futures() -> dict[tuple[int, str, int, str], Future]:
    """Compilation of all that is to be tested, begun at once on every core."""
    return {
        (*row, kernel): pool.submit(compiled, launched)
        for row in ROWS
        for kernel, launched in row_launches(*row).items()
    }


@pytest.mark.parametrize("kernel", ATTENTION)
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_row(row: tuple[int, str, int], kernel: str, row_futures: dict[Any, Future]) -> None:
    arch, kind, width = row
    binary, used = row_futures[*row, kernel].result()
    check_means(arch, binary, used)
    assert used.stack_bytes <= SPILLED_BYTES.get((*row, kernel), 0)
    assert any(used.instructions[opcode] for opcode in TENSOR_CORE)
    if kind == "half" and width in (64, 128):
        assert used.instructions[OWN_TENSOR_CORE[arch]], "the architecture's own tensor instructions"


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("arch", FEATURE_ARCHITECTURES)
def test_feature(arch: int, feature: str) -> None:
    for binary, used in pool.map(compiled, feature_launches(arch, feature)):
        check_means(arch, binary, used)


def check_means(arch: int, binary: Any, used: Resources) -> None:
    assert used.shared_bytes <= SHARED_BYTES[arch]
    # Beyond 512 columns the compiler succeeds, with a kernel that only traps.
    assert used.tensor_memory_columns <= TENSOR_MEMORY_COLUMNS
    assert "llvm.trap" not in binary.asm["llir"]


def test_dropout_draws_four_words_at_once() -> None:
    """Dropout adds 24 instructions for each weight on sm_90; a draw for each would run four times the rounds."""
    (_, used), (_, used_without) = (compiled(launches(90, torch.bfloat16, 64, dropout_p=p)[0]) for p in (0.1, 0.0))
    tile = TABLE[90, "half", 64].forward
    weights = PASSES * tile.block_m * tile.block_n / (32 * tile.num_warps)
    assert used.instructions.total() - used_without.instructions.total() < 30 * weights
