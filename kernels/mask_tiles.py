"""Summary of a bool mask, so that the attention kernels visit only tiles with something to see.

For every row of tiles (the key tiles of one query tile or, for the dk/dv kernel, the query tiles of one key tile) it
lists which tiles are partly visible and which wholly, causality included. Lists, and not a state per tile to branch on,
because a load under a branch is not prefetched: with a list every iteration does the same loads. Where the mask is
broadcast, so is its summary.
"""

import triton
import triton.language as tl

from ._device import head_ptr, tile_ptrs


@triton.jit(do_not_specialize=["heads", "num_rows", "num_tiles", "L", "S", "diagonal", "prefix"])
def mask_tiles_kernel(
    mask, mask_tiles, heads, num_rows, num_tiles, L, S, diagonal, prefix,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, IS_CAUSAL: tl.constexpr, BY_KEYS: tl.constexpr,
):  # fmt: skip
    """One program writes one list: [partial count, open count, partial tiles ascending ..., open tiles descending]."""
    row = tl.program_id(0) % num_rows
    head = (tl.program_id(0) // num_rows).to(tl.int64)
    b = head // heads
    h = head % heads
    mask_head = head_ptr(mask, b, h)
    tile_list = head_ptr(mask_tiles, b, h) + row * mask_tiles.stride_r

    num_partial = 0
    num_open = 0
    for t in range(num_tiles):
        m = (t if BY_KEYS else row) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
        n = (row if BY_KEYS else t) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        within = (m < L) & (n < S)
        # [BLOCK_M, BLOCK_N]
        visible = tl.load(tile_ptrs(mask_head, mask, m, n), mask=within, other=0) != 0
        if IS_CAUSAL:
            visible = visible & ((n <= m + diagonal) | (n < prefix))
        # Keys beyond S weigh in the softmax of queries, so a tile that has some is not open; queries beyond L weigh
        # nowhere, nor do keys beyond S in their own gradients.
        harmless = (~within) if BY_KEYS else m >= L
        some = tl.max(visible.to(tl.int32))
        is_open = some * tl.min((visible | harmless).to(tl.int32))
        is_partial = some - is_open
        tl.store(tile_list + 2 + num_partial, t, mask=is_partial != 0)
        tl.store(tile_list + 1 + num_tiles - num_open, t, mask=is_open != 0)
        num_partial += is_partial
        num_open += is_open
    tl.store(tile_list, num_partial)
    tl.store(tile_list + 1, num_open)
