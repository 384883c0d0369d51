"""What the attention kernels share on the device: tensors as arguments, tile loads, visibility, dropout.

Tiles are [BLOCK_M, BLOCK_N], queries by keys, or transposed where the caller says so; helpers that work elementwise on
a score tile take the positions as `m` and `n`, already shaped to broadcast against it (say [BLOCK_M, 1] and
[1, BLOCK_N]), and so serve both orientations.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

# The passes of a kernel over the tiles it meets: those wholly visible, those partly visible, and, only if the result
# holds NaN or infinities, all of them again (see attention_fwd.py).
OPEN = tl.constexpr(0)
PARTIAL = tl.constexpr(1)
CAREFUL = tl.constexpr(2)
PASSES = tl.constexpr(3)


class Tensor4(NamedTuple):
    """A [batch, heads, rows, columns] tensor as a kernel argument; None in its place means that it is absent.

    Triton specialises each field as it does a plain argument: a stride of 1 becomes a constant.
    """

    ptr: Any
    stride_b: Any
    stride_h: Any
    stride_r: Any
    stride_c: Any
    is_wide: Any  # constexpr: one head spans 2^31 elements or more, so that offsets within it take 64 bits


@triton.jit
def head_ptr(tensor, b, h):
    """Start of one head; b and h are int64, since a batch of heads may span more than 2^31 elements."""
    return tensor.ptr + b * tensor.stride_b + h * tensor.stride_h


@triton.jit
def tile_ptrs(base, tensor, rows, columns):
    """Addresses of elements of the head at `base`; rows and columns broadcast against each other."""
    if tensor.is_wide:
        rows = rows.to(tl.int64)
        columns = columns.to(tl.int64)
    return base + (rows * tensor.stride_r + columns * tensor.stride_c)


@triton.jit
def row_ptrs(tensor, b, h, rows):
    """Addresses in a [batch, heads, rows, 1] tensor."""
    if tensor.is_wide:
        rows = rows.to(tl.int64)
    return head_ptr(tensor, b, h) + rows * tensor.stride_r


@triton.jit
def load_tile(base, tensor, rows, columns, R, C, CHECK_R: tl.constexpr, CHECK_C: tl.constexpr):
    """The tile at rows x columns of a head of R x C elements; zeros beyond it, where CHECK_* says to look."""
    ptrs = tile_ptrs(base, tensor, rows[:, None], columns[None, :])
    if CHECK_R and CHECK_C:
        return tl.load(ptrs, mask=(rows[:, None] < R) & (columns[None, :] < C), other=0.0)
    elif CHECK_R:
        return tl.load(ptrs, mask=rows[:, None] < R, other=0.0)
    elif CHECK_C:
        return tl.load(ptrs, mask=columns[None, :] < C, other=0.0)
    else:
        return tl.load(ptrs)


@triton.jit
def store_tile(base, tensor, rows, columns, R, C, tile):
    """Rounds `tile` to the tensor's dtype and stores what lies within R x C."""
    ptrs = tile_ptrs(base, tensor, rows[:, None], columns[None, :])
    within = (rows[:, None] < R) & (columns[None, :] < C)
    tl.store(ptrs, tile.to(tensor.ptr.dtype.element_ty), mask=within)


@triton.jit
def dot_rows(x_base, x, x_rows, X, y_base, y, y_rows, Y, C: tl.constexpr, BLOCK_C: tl.constexpr,
             ACC: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """x y^T over C columns in blocks of BLOCK_C: the slow path for rows too long to keep on chip. [x_rows, y_rows]"""
    product = tl.zeros([x_rows.shape[0], y_rows.shape[0]], ACC)
    for c in range(0, C, BLOCK_C):
        columns = c + tl.arange(0, BLOCK_C)
        x_tile = load_tile(x_base, x, x_rows, columns, X, C, True, True)
        y_tile = load_tile(y_base, y, y_rows, columns, Y, C, True, True)
        product = tl.dot(x_tile, tl.trans(y_tile), product, input_precision=PRECISION, out_dtype=ACC)
    return product


@triton.jit
def poison(x):
    """Per row of x: NaN if the row holds a NaN or an infinity, else 0."""
    return tl.sum(x * 0, 1)


@triton.jit
def load_poison(base, tensor, rows, R, C: tl.constexpr):
    """`poison` of rows in memory, read in narrow blocks: it is for passes that are hardly ever made."""
    bad = tl.zeros([rows.shape[0]], tl.float32)
    for c in tl.range(0, C, 16, num_stages=1):
        bad += poison(load_tile(base, tensor, rows, c + tl.arange(0, 16), R, C, True, True)).to(tl.float32)
    return bad


@triton.jit
def bias_and_mask(s2, bias, mask, b, h, m, n, L, S, diagonal, prefix,
                  IS_CAUSAL: tl.constexpr, PASS: tl.constexpr, CHECK_N: tl.constexpr):  # fmt: skip
    """Base-2 scores with the bias added, -inf where query m may not see key n; and whether it may.

    In OPEN tiles, causality and mask need no asking; a -inf of the bias masks anywhere.
    """
    visible = m < L
    if CHECK_N:
        visible = visible & (n < S)
    within = visible
    if PASS != OPEN and IS_CAUSAL:
        visible = visible & ((n <= m + diagonal) | (n < prefix))
    if PASS != OPEN and mask is not None:
        ptrs = tile_ptrs(head_ptr(mask, b, h), mask, m, n)
        visible = visible & (tl.load(ptrs, mask=within, other=0) != 0)
    if bias is not None:
        ptrs = tile_ptrs(head_ptr(bias, b, h), bias, m, n)
        bias_tile = tl.load(ptrs, mask=within, other=0.0).to(s2.dtype)
        visible = visible & (bias_tile != float("-inf"))
        s2 += bias_tile * LOG2E
    return tl.where(visible, s2, float("-inf")), visible


@triton.jit
def key_tiles(m0, S, diagonal, prefix, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
              IS_CAUSAL: tl.constexpr, PASS: tl.constexpr):  # fmt: skip
    """Range of the key tiles that queries [m0, m0 + BLOCK_M) see wholly (OPEN) or partly (PARTIAL)."""
    seen_by_all = S
    seen_by_one = S
    if IS_CAUSAL:
        seen_by_all = tl.minimum(S, tl.maximum(0, tl.maximum(m0 + 1 + diagonal, prefix)))
        seen_by_one = tl.minimum(S, tl.maximum(0, tl.maximum(m0 + BLOCK_M + diagonal, prefix)))
    num_open = seen_by_all // BLOCK_N
    if PASS == PARTIAL:
        return num_open, tl.cdiv(seen_by_one, BLOCK_N)
    else:
        return 0, num_open


@triton.jit
def query_tiles(n0, L, S, diagonal, prefix, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                IS_CAUSAL: tl.constexpr, PASS: tl.constexpr):  # fmt: skip
    """Range of the query tiles that see keys [n0, n0 + BLOCK_N) wholly (OPEN) or partly (PARTIAL)."""
    end = tl.cdiv(L, BLOCK_M)
    begin = 0
    first_open = 0
    if IS_CAUSAL:
        n1 = tl.minimum(n0 + BLOCK_N, S)
        first_to_see_one = tl.where(n0 < prefix, 0, tl.maximum(0, n0 - diagonal))
        first_to_see_all = tl.where(n1 <= prefix, 0, tl.maximum(0, n1 - 1 - diagonal))
        begin = tl.minimum(end, first_to_see_one // BLOCK_M)
        first_open = tl.minimum(end, tl.cdiv(first_to_see_all, BLOCK_M))
    if PASS == PARTIAL:
        return begin, first_open
    else:
        return first_open, end


@triton.jit
def listed_tiles(tile_list, num_tiles, PASS: tl.constexpr):
    """Range of positions in a list of `mask_tiles_kernel`: those of OPEN or of PARTIAL tiles."""
    if PASS == PARTIAL:
        return 2, 2 + tl.load(tile_list)
    else:
        return 2 + num_tiles - tl.load(tile_list + 1), 2 + num_tiles


@triton.jit
def kept_tile(seed_ptr, b, h, m, n0, keep_from, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Whether dropout keeps the weights of queries m and keys [n0, n0 + BLOCK_N), [BLOCK_M, BLOCK_N].

    Philox4x32-10 with key = seed and counter = (key // 4, query, head, batch) draws four words at a time, one for each
    of four neighbouring keys. Drawing [BLOCK_M, BLOCK_N / 4] counters and interleaving their words takes a quarter of
    the rounds that a draw per weight would: 24 instructions per weight in all (counted in sm_90's machine code).
    """
    quads = n0 // 4 + tl.arange(0, BLOCK_N // 4)
    # [BLOCK_M, BLOCK_N / 4]
    w0, w1, w2, w3 = tl.philox(tl.load(seed_ptr), quads[None, :], m[:, None], h.to(tl.int32), b.to(tl.int32))
    # The last axis of a join is the newest: words in the order of (high, low) bit of their number.
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    return words.reshape(BLOCK_M, BLOCK_N) >= keep_from
