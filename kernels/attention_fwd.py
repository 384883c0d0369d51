"""Forward kernel of attention: out = dropout(softmax(scale q k^T + bias)) v, and the log-sum-exp of the scores.

One program computes BLOCK_M queries of one head. It keeps their q rows, the running maximum m, the running sum l and
the unnormalised output acc on chip, and passes once over the key tiles that any of its queries sees (Dao,
"FlashAttention-2", 2023, algorithm 1): first the wholly visible tiles, whose elements are not tested, then the partly
visible ones. Scores are kept in base 2. Products accumulate in float32 (float64 for float64); the weights are rounded
to v's dtype for their product with v; out is rounded once, at the end.

Masked positions do not exist, so a NaN or infinity there must not reach the output, though 0 * NaN is NaN; and one
that is attended makes the whole row NaN. To test values on the way would burden every tile that is masked in part
(cleaning v there doubled the instructions of such a tile on sm_80 and made it spill). Instead a non-finite acc says,
at the end, that something is there, and then a third, CAREFUL pass starts again: it leaves out v's bad rows and poisons
the weights of those who attend to them. Only an infinite key with scores of -inf would leave no trace: s2 * 0 does.
"""

import triton
import triton.language as tl

from ._device import (
    CAREFUL,
    LN2,
    LOG2E,
    OPEN,
    PASSES,
    bias_and_mask,
    dot_rows,
    head_ptr,
    kept_tile,
    key_tiles,
    listed_tiles,
    load_poison,
    load_tile,
    poison,
    row_ptrs,
    store_tile,
)


@triton.jit(do_not_specialize=["q_heads", "group", "L", "S", "diagonal", "prefix", "keep_from"])
def attention_fwd_kernel(
    q, k, v, out, lse, bias, mask, mask_tiles, seed_ptr,
    scale: tl.float64, keep_from: tl.uint32, keep_scale: tl.float64,
    q_heads, group, L, S, diagonal, prefix,
    D: tl.constexpr, Dv: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    IS_CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = lse.ptr.dtype.element_ty
    CHECK_D: tl.constexpr = D != BLOCK_D
    CHECK_DV: tl.constexpr = Dv == 0 or Dv % BLOCK_DV != 0
    # Neighbouring programs share a head's keys in L2; the last queries go first, since under causal they see most.
    num_m = tl.cdiv(L, BLOCK_M)
    tile_m = num_m - 1 - tl.program_id(0) % num_m
    head = (tl.program_id(0) // num_m).to(tl.int64)
    b = head // q_heads
    h = head % q_heads
    chunk_v = tl.program_id(1)  # 0, unless Dv is too wide for one program

    m0 = tile_m * BLOCK_M
    offs_m = m0 + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = chunk_v * BLOCK_DV + tl.arange(0, BLOCK_DV)
    q_head = head_ptr(q, b, h)
    k_head = head_ptr(k, b, h // group)
    v_head = head_ptr(v, b, h // group)

    scale_log2 = (scale * LOG2E).to(ACC)
    q_tile = load_tile(q_head, q, offs_m, offs_d, L, D, True, CHECK_D)
    m = tl.full([BLOCK_M], float("-inf"), ACC)
    l = tl.zeros([BLOCK_M], ACC)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], ACC)

    for PASS in tl.static_range(PASSES):
        if PASS == CAREFUL:
            again = tl.max((poison(acc) != 0).to(tl.int32)) != 0
            m = tl.where(again, float("-inf"), m)
            l = tl.where(again, 0.0, l)
            acc = tl.where(again, 0.0, acc)
            first, last = 0, tl.where(again, tl.cdiv(S, BLOCK_N), 0)
        elif mask is not None:
            tile_list = head_ptr(mask_tiles, b, h) + tile_m * mask_tiles.stride_r
            first, last = listed_tiles(tile_list, tl.cdiv(S, BLOCK_N), PASS)
        else:
            first, last = key_tiles(m0, S, diagonal, prefix, BLOCK_M, BLOCK_N, IS_CAUSAL, PASS)

        for t in tl.range(first, last, num_stages=1 if PASS == CAREFUL else None):
            n0 = (tl.load(tile_list + t) if mask is not None and PASS != CAREFUL else t) * BLOCK_N
            offs_n = n0 + tl.arange(0, BLOCK_N)

            # [BLOCK_M, BLOCK_N]
            if D > BLOCK_D:
                s = dot_rows(q_head, q, offs_m, L, k_head, k, offs_n, S, D, BLOCK_D, ACC, PRECISION)
            else:
                k_tile = load_tile(k_head, k, offs_n, offs_d, S, D, PASS != OPEN, CHECK_D)
                s = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION, out_dtype=ACC)
            s2 = s * scale_log2
            if PASS != OPEN or bias is not None:
                s2, visible = bias_and_mask(
                    s2, bias, mask, b, h, offs_m[:, None], offs_n[None, :], L, S, diagonal, prefix,
                    IS_CAUSAL, PASS, CHECK_N=PASS != OPEN,
                )  # fmt: skip

            # A finite pivot keeps exp2(-inf - pivot) at 0 while a row has seen nothing.
            m_new = tl.maximum(m, tl.max(s2, 1))
            pivot = tl.where(m_new == float("-inf"), 0.0, m_new)
            decay = tl.exp2(m - pivot)
            s2 -= pivot[:, None]
            p = tl.exp2(s2) + s2 * 0
            if PASS != OPEN or bias is not None:
                p = tl.where(visible, p, 0.0)
            m = m_new
            l = l * decay + tl.sum(p, 1)
            acc = acc * decay[:, None]

            if seed_ptr is not None:
                p = tl.where(kept_tile(seed_ptr, b, h, offs_m, n0, keep_from, BLOCK_M, BLOCK_N), p, 0.0)
            v_rows = offs_n
            if PASS == CAREFUL:
                bad_v = load_poison(v_head, v, offs_n, S, Dv)
                p += tl.where(visible, bad_v[None, :], 0.0)
                v_rows = tl.where(bad_v == 0, offs_n, S)
            v_tile = load_tile(v_head, v, v_rows, offs_dv, S, Dv, PASS != OPEN, CHECK_DV)
            acc = tl.dot(p.to(v_tile.dtype), v_tile, acc, input_precision=PRECISION, out_dtype=ACC)

    bad = poison(acc)
    l_safe = tl.where(l == 0, 1.0, l)
    out_tile = acc * (keep_scale.to(ACC) / l_safe)[:, None] + bad[:, None]
    store_tile(head_ptr(out, b, h), out, offs_m, offs_dv, L, Dv, out_tile)
    lse_row = tl.where(l == 0, float("-inf"), (m + tl.log2(l_safe)) * LN2) + bad
    tl.store(row_ptrs(lse, b, h, offs_m), lse_row, mask=(offs_m < L) & (chunk_v == 0))
