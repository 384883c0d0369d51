"""Backward kernels of attention. Every gradient element is summed by one program in a fixed order: no atomics.

With P = softmax(scale q k^T + bias) recomputed from lse, and Z = keep / (1 - p) of dropout (Dao, "FlashAttention-2",
2023, section 2.3.2; dlse is the gradient of lse):

    delta = rowsum(do * out) - dlse      dP = Z * (do v^T)      dS = P * (dP - delta)
    dv = (P * Z)^T do      dk = scale dS^T q      dq = scale dS k      dbias = sum of dS over what bias broadcasts

The rows kernel prepares lse and delta per query; the dk/dv kernel holds a tile of keys and passes over queries; the dq
kernel holds a tile of queries and passes over keys; the dbias kernel holds a tile of dbias and passes over all that
adds to it.
Products take operands in the inputs' dtype and accumulate in float32 (float64 for float64).

Masked positions do not exist (see attention_fwd.py). A query that attends to a NaN or infinity, or has one in do,
carries NaN in its lse, hence in its P wherever it attends and nowhere else. The CAREFUL pass therefore only has to
leave out the operand rows that would meet the zeros of P and dS.
"""

import triton
import triton.language as tl

from ._device import (
    CAREFUL,
    LOG2E,
    OPEN,
    PARTIAL,
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
    query_tiles,
    row_ptrs,
    store_tile,
)

RUNTIME = ["q_heads", "kv_heads", "group", "L", "S", "diagonal", "prefix", "keep_from"]


@triton.jit(do_not_specialize=["q_heads", "L", "padded_L"])
def attention_bwd_rows_kernel(
    out, do, lse, dlse, lse2, delta, q_heads, L, padded_L,
    Dv: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """delta, and lse in base 2: 0 for rows that attend to nothing, NaN for rows whose gradient is.

    Both have room for whole tiles, so that the other kernels read them unmasked (a mask there cost a 4-byte copy for
    every element of a tile's row, and spills for the addresses). Queries beyond L get lse = inf, so P = 0.
    """
    ACC: tl.constexpr = delta.ptr.dtype.element_ty
    num_m = tl.cdiv(padded_L, BLOCK_M)
    tile_m = tl.program_id(0) % num_m
    head = (tl.program_id(0) // num_m).to(tl.int64)
    b = head // q_heads
    h = head % q_heads
    offs_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < L

    products = tl.zeros([BLOCK_M, BLOCK_DV], ACC)
    for c in range(0, Dv, BLOCK_DV):
        offs_dv = c + tl.arange(0, BLOCK_DV)
        out_tile = load_tile(head_ptr(out, b, h), out, offs_m, offs_dv, L, Dv, True, True)
        do_tile = load_tile(head_ptr(do, b, h), do, offs_m, offs_dv, L, Dv, True, True)
        products += out_tile.to(ACC) * do_tile.to(ACC)
    row_sum = tl.sum(products, 1)

    lse_row = tl.load(row_ptrs(lse, b, h, offs_m), mask=mask_m, other=float("inf"))
    lse_row = tl.where(lse_row == float("-inf"), 0.0, lse_row) * LOG2E
    tl.store(row_ptrs(lse2, b, h, offs_m), lse_row + row_sum * 0)
    if dlse is not None:
        row_sum -= tl.load(row_ptrs(dlse, b, h, offs_m), mask=mask_m, other=0.0)
    tl.store(row_ptrs(delta, b, h, offs_m), row_sum)


@triton.jit
def weights_and_gradient(
    s, dp, lse2_row, delta_row, bias, mask, seed_ptr, scale, keep_from, keep_scale,
    b, h, m0, n0, L, S, diagonal, prefix,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    IS_CAUSAL: tl.constexpr, PASS: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """From the products s = q k^T and dp = do v^T of one tile: the weights after dropout (short of the factor
    keep_scale) and dS. Tiles are [BLOCK_M, BLOCK_N], or the other way round if TRANSPOSED."""
    offs_m = m0 + tl.arange(0, BLOCK_M)
    offs_n = n0 + tl.arange(0, BLOCK_N)
    if TRANSPOSED:
        m, n = offs_m[None, :], offs_n[:, None]
        lse2_row, delta_row = lse2_row[None, :], delta_row[None, :]
    else:
        m, n = offs_m[:, None], offs_n[None, :]
        lse2_row, delta_row = lse2_row[:, None], delta_row[:, None]

    s2 = s * (scale * LOG2E).to(s.dtype)
    if PASS != OPEN or bias is not None:
        # In a transposed pass the ragged last keys meet open tiles too.
        s2, visible = bias_and_mask(
            s2, bias, mask, b, h, m, n, L, S, diagonal, prefix, IS_CAUSAL, PASS, CHECK_N=PASS != OPEN or TRANSPOSED
        )
    p = tl.exp2(s2 - lse2_row)
    if PASS != OPEN or bias is not None:
        p = tl.where(visible, p, 0.0)

    p_kept = p
    if seed_ptr is not None:
        kept = kept_tile(seed_ptr, b, h, offs_m, n0, keep_from, BLOCK_M, BLOCK_N)
        if TRANSPOSED:
            kept = tl.trans(kept)
        p_kept = tl.where(kept, p, p * 0.0)  # a NaN stays one
        dp = tl.where(kept, dp * keep_scale.to(dp.dtype), 0.0)
    ds = p * (dp - delta_row)
    if PASS != OPEN or bias is not None:
        ds = tl.where(visible, ds, 0.0)
    return p_kept, ds


@triton.jit(do_not_specialize=RUNTIME)
def attention_bwd_dkdv_kernel(
    q, k, v, do, dk, dv, lse2, delta, bias, mask, mask_tiles, seed_ptr,
    scale: tl.float64, keep_from: tl.uint32, keep_scale: tl.float64,
    kv_heads, group, L, S, diagonal, prefix,
    D: tl.constexpr, Dv: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    IS_CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of BLOCK_N keys, summed over the group's query heads. Score tiles are transposed, [BLOCK_N, BLOCK_M]:
    so P and dS are left operands, which tensor cores take from registers."""
    ACC: tl.constexpr = delta.ptr.dtype.element_ty
    CHECK_D: tl.constexpr = D == 0 or D % BLOCK_D != 0
    CHECK_DV: tl.constexpr = Dv == 0 or Dv % BLOCK_DV != 0
    num_n = tl.cdiv(S, BLOCK_N)
    tile_n = tl.program_id(0) % num_n
    head = (tl.program_id(0) // num_n).to(tl.int64)
    b = head // kv_heads
    kv_h = head % kv_heads
    # Number 0, unless D or Dv is too wide for one program; if only one is, only number 0 stores the other's gradient.
    chunk = tl.program_id(1)
    chunk_d = chunk if D > BLOCK_D else 0
    chunk_dv = chunk if Dv > BLOCK_DV else 0

    n0 = tile_n * BLOCK_N
    offs_n = n0 + tl.arange(0, BLOCK_N)
    offs_d = chunk_d * BLOCK_D + tl.arange(0, BLOCK_D)
    offs_dv = chunk_dv * BLOCK_DV + tl.arange(0, BLOCK_DV)
    k_head = head_ptr(k, b, kv_h)
    v_head = head_ptr(v, b, kv_h)

    k_tile = load_tile(k_head, k, offs_n, offs_d, S, D, True, CHECK_D)
    v_tile = load_tile(v_head, v, offs_n, offs_dv, S, Dv, True, CHECK_DV)
    dk_tile = tl.zeros([BLOCK_N, BLOCK_D], ACC)
    dv_tile = tl.zeros([BLOCK_N, BLOCK_DV], ACC)

    for PASS in tl.static_range(PASSES):
        heads = group
        if PASS == CAREFUL:
            # Keys beyond S may hold anything: their weights exp2(0 - lse) can overflow.
            bad = tl.where(offs_n < S, poison(dk_tile) + poison(dv_tile), 0.0)
            again = tl.max((bad != 0).to(tl.int32)) != 0
            dk_tile = tl.where(again, 0.0, dk_tile)
            dv_tile = tl.where(again, 0.0, dv_tile)
            heads = tl.where(again, group, 0)

        for g in range(heads):
            h = kv_h * group + g
            q_head = head_ptr(q, b, h)
            do_head = head_ptr(do, b, h)
            if PASS == CAREFUL:
                first, last = 0, tl.cdiv(L, BLOCK_M)
            elif mask is not None:
                tile_list = head_ptr(mask_tiles, b, h) + tile_n * mask_tiles.stride_r
                first, last = listed_tiles(tile_list, tl.cdiv(L, BLOCK_M), PASS)
            else:
                first, last = query_tiles(n0, L, S, diagonal, prefix, BLOCK_M, BLOCK_N, IS_CAUSAL, PASS)

            for t in tl.range(first, last, num_stages=1 if PASS == CAREFUL else None):
                m0 = (tl.load(tile_list + t) if mask is not None and PASS != CAREFUL else t) * BLOCK_M
                offs_m = m0 + tl.arange(0, BLOCK_M)
                q_rows = offs_m
                do_rows = offs_m
                if PASS == CAREFUL:
                    q_rows = tl.where(load_poison(q_head, q, offs_m, L, D) == 0, offs_m, L)
                    do_rows = tl.where(load_poison(do_head, do, offs_m, L, Dv) == 0, offs_m, L)
                q_tile = load_tile(q_head, q, q_rows, offs_d, L, D, True, CHECK_D)
                do_tile = load_tile(do_head, do, do_rows, offs_dv, L, Dv, True, CHECK_DV)
                lse2_row = tl.load(row_ptrs(lse2, b, h, offs_m))
                delta_row = tl.load(row_ptrs(delta, b, h, offs_m))

                # [BLOCK_N, BLOCK_M]
                if D > BLOCK_D:
                    s = dot_rows(k_head, k, offs_n, S, q_head, q, offs_m, L, D, BLOCK_D, ACC, PRECISION)
                else:
                    s = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION, out_dtype=ACC)
                if Dv > BLOCK_DV:
                    dp = dot_rows(v_head, v, offs_n, S, do_head, do, offs_m, L, Dv, BLOCK_DV, ACC, PRECISION)
                else:
                    dp = tl.dot(v_tile, tl.trans(do_tile), input_precision=PRECISION, out_dtype=ACC)
                p_kept, ds = weights_and_gradient(
                    s, dp, lse2_row, delta_row, bias, mask, seed_ptr, scale, keep_from, keep_scale,
                    b, h, m0, n0, L, S, diagonal, prefix, BLOCK_M, BLOCK_N, IS_CAUSAL, PASS, TRANSPOSED=True,
                )  # fmt: skip

                dv_tile = tl.dot(p_kept.to(do_tile.dtype), do_tile, dv_tile, input_precision=PRECISION, out_dtype=ACC)
                dk_tile = tl.dot(ds.to(q_tile.dtype), q_tile, dk_tile, input_precision=PRECISION, out_dtype=ACC)

    if chunk_d == chunk:
        store_tile(head_ptr(dk, b, kv_h), dk, offs_n, offs_d, S, D, dk_tile * scale.to(ACC))
    if chunk_dv == chunk:
        store_tile(head_ptr(dv, b, kv_h), dv, offs_n, offs_dv, S, Dv, dv_tile * keep_scale.to(ACC))


@triton.jit(do_not_specialize=RUNTIME)
def attention_bwd_dq_kernel(
    q, k, v, do, dq, lse2, delta, bias, mask, mask_tiles, seed_ptr,
    scale: tl.float64, keep_from: tl.uint32, keep_scale: tl.float64,
    q_heads, group, L, S, diagonal, prefix,
    D: tl.constexpr, Dv: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    IS_CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of BLOCK_M queries of one head."""
    ACC: tl.constexpr = delta.ptr.dtype.element_ty
    CHECK_D: tl.constexpr = D == 0 or D % BLOCK_D != 0
    CHECK_DV: tl.constexpr = Dv == 0 or Dv % BLOCK_DV != 0
    num_m = tl.cdiv(L, BLOCK_M)
    tile_m = num_m - 1 - tl.program_id(0) % num_m  # the longest first, as in the forward
    head = (tl.program_id(0) // num_m).to(tl.int64)
    b = head // q_heads
    h = head % q_heads
    chunk = tl.program_id(1)  # 0, unless D is too wide for one program

    m0 = tile_m * BLOCK_M
    offs_m = m0 + tl.arange(0, BLOCK_M)
    offs_d = chunk * BLOCK_D + tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    q_head = head_ptr(q, b, h)
    k_head = head_ptr(k, b, h // group)
    v_head = head_ptr(v, b, h // group)
    do_head = head_ptr(do, b, h)

    q_tile = load_tile(q_head, q, offs_m, offs_d, L, D, True, CHECK_D)
    do_tile = load_tile(do_head, do, offs_m, offs_dv, L, Dv, True, CHECK_DV)
    lse2_row = tl.load(row_ptrs(lse2, b, h, offs_m))
    delta_row = tl.load(row_ptrs(delta, b, h, offs_m))
    dq_tile = tl.zeros([BLOCK_M, BLOCK_D], ACC)

    for PASS in tl.static_range(PASSES):
        if PASS == CAREFUL:
            again = tl.max((poison(dq_tile) != 0).to(tl.int32)) != 0
            dq_tile = tl.where(again, 0.0, dq_tile)
            first, last = 0, tl.where(again, tl.cdiv(S, BLOCK_N), 0)
        elif mask is not None:
            tile_list = head_ptr(mask_tiles, b, h) + tile_m * mask_tiles.stride_r
            first, last = listed_tiles(tile_list, tl.cdiv(S, BLOCK_N), PASS)
        else:
            first, last = key_tiles(m0, S, diagonal, prefix, BLOCK_M, BLOCK_N, IS_CAUSAL, PASS)

        for t in tl.range(first, last, num_stages=1 if PASS == CAREFUL else None):
            n0 = (tl.load(tile_list + t) if mask is not None and PASS != CAREFUL else t) * BLOCK_N
            offs_n = n0 + tl.arange(0, BLOCK_N)
            k_rows = offs_n
            if PASS == CAREFUL:
                k_rows = tl.where(load_poison(k_head, k, offs_n, S, D) == 0, offs_n, S)
            k_tile = load_tile(k_head, k, k_rows, offs_d, S, D, PASS != OPEN, CHECK_D)

            # [BLOCK_M, BLOCK_N]
            if D > BLOCK_D:
                s = dot_rows(q_head, q, offs_m, L, k_head, k, offs_n, S, D, BLOCK_D, ACC, PRECISION)
            else:
                s = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION, out_dtype=ACC)
            if Dv > BLOCK_DV:
                dp = dot_rows(do_head, do, offs_m, L, v_head, v, offs_n, S, Dv, BLOCK_DV, ACC, PRECISION)
            else:
                v_tile = load_tile(v_head, v, offs_n, offs_dv, S, Dv, PASS != OPEN, CHECK_DV)
                dp = tl.dot(do_tile, tl.trans(v_tile), input_precision=PRECISION, out_dtype=ACC)
            _, ds = weights_and_gradient(
                s, dp, lse2_row, delta_row, bias, mask, seed_ptr, scale, keep_from, keep_scale,
                b, h, m0, n0, L, S, diagonal, prefix, BLOCK_M, BLOCK_N, IS_CAUSAL, PASS, TRANSPOSED=False,
            )  # fmt: skip
            dq_tile = tl.dot(ds.to(k_tile.dtype), k_tile, dq_tile, input_precision=PRECISION, out_dtype=ACC)

    store_tile(head_ptr(dq, b, h), dq, offs_m, offs_d, L, D, dq_tile * scale.to(ACC))


@triton.jit(do_not_specialize=[*RUNTIME, "batch", "bias_batch", "bias_heads"])
def attention_bwd_dbias_kernel(
    q, k, v, do, dbias, lse2, delta, bias, mask, seed_ptr,
    scale: tl.float64, keep_from: tl.uint32, keep_scale: tl.float64,
    batch, bias_batch, q_heads, bias_heads, group, L, S, diagonal, prefix,
    D: tl.constexpr, Dv: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    IS_CAUSAL: tl.constexpr, PRECISION: tl.constexpr, SUM_M: tl.constexpr, SUM_N: tl.constexpr,
):  # fmt: skip
    """One tile of dbias, summed over the axes that the bias broadcasts (SUM_M: queries, SUM_N: keys).

    Recomputing dS here, at two of the five products of a backward, needs no room for it. program_id(1) takes one of
    several equal parts of the sum, and then dbias has as many parts, along its batch axis.
    """
    ACC: tl.constexpr = delta.ptr.dtype.element_ty
    CHECK_D: tl.constexpr = D == 0 or D % BLOCK_D != 0
    CHECK_DV: tl.constexpr = Dv == 0 or Dv % BLOCK_DV != 0
    num_m = tl.cdiv(L, BLOCK_M)
    num_n = tl.cdiv(S, BLOCK_N)
    tiles_m = 1 if SUM_M else num_m
    tiles_n = 1 if SUM_N else num_n
    first_n = tl.program_id(0) % tiles_n
    first_m = tl.program_id(0) // tiles_n % tiles_m
    bias_head = (tl.program_id(0) // (tiles_n * tiles_m)).to(tl.int64)
    bias_b = bias_head // bias_heads
    bias_h = bias_head % bias_heads
    part = tl.program_id(1).to(tl.int64)

    # A term of the sum is one tile of one head; keys run fastest, then queries, heads, batch.
    terms_n = num_n // tiles_n
    terms_m = num_m // tiles_m
    terms_h = q_heads // bias_heads
    terms = (batch // bias_batch).to(tl.int64) * terms_h * terms_m * terms_n
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    dbias_tile = tl.zeros([BLOCK_M, BLOCK_N], ACC)

    for term in range(terms * part // tl.num_programs(1), terms * (part + 1) // tl.num_programs(1)):
        n0 = (first_n + (term % terms_n).to(tl.int32)) * BLOCK_N
        m0 = (first_m + (term // terms_n % terms_m).to(tl.int32)) * BLOCK_M
        h = bias_h + term // (terms_n * terms_m) % terms_h
        b = bias_b + term // (terms_n * terms_m) // terms_h
        offs_m = m0 + tl.arange(0, BLOCK_M)
        offs_n = n0 + tl.arange(0, BLOCK_N)
        q_head = head_ptr(q, b, h)
        k_head = head_ptr(k, b, h // group)
        v_head = head_ptr(v, b, h // group)
        do_head = head_ptr(do, b, h)
        lse2_row = tl.load(row_ptrs(lse2, b, h, offs_m))
        delta_row = tl.load(row_ptrs(delta, b, h, offs_m))

        # [BLOCK_M, BLOCK_N]
        if D > BLOCK_D:
            s = dot_rows(q_head, q, offs_m, L, k_head, k, offs_n, S, D, BLOCK_D, ACC, PRECISION)
        else:
            q_tile = load_tile(q_head, q, offs_m, offs_d, L, D, True, CHECK_D)
            k_tile = load_tile(k_head, k, offs_n, offs_d, S, D, True, CHECK_D)
            s = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION, out_dtype=ACC)
        if Dv > BLOCK_DV:
            dp = dot_rows(do_head, do, offs_m, L, v_head, v, offs_n, S, Dv, BLOCK_DV, ACC, PRECISION)
        else:
            do_tile = load_tile(do_head, do, offs_m, offs_dv, L, Dv, True, CHECK_DV)
            v_tile = load_tile(v_head, v, offs_n, offs_dv, S, Dv, True, CHECK_DV)
            dp = tl.dot(do_tile, tl.trans(v_tile), input_precision=PRECISION, out_dtype=ACC)
        _, ds = weights_and_gradient(
            s, dp, lse2_row, delta_row, bias, mask, seed_ptr, scale, keep_from, keep_scale,
            b, h, m0, n0, L, S, diagonal, prefix, BLOCK_M, BLOCK_N, IS_CAUSAL, PARTIAL, TRANSPOSED=False,
        )  # fmt: skip
        dbias_tile += ds

    rows = first_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = first_n * BLOCK_N + tl.arange(0, BLOCK_N)
    if SUM_M:
        dbias_tile = tl.sum(dbias_tile, 0, keep_dims=True)
        rows = tl.arange(0, 1)
    if SUM_N:
        dbias_tile = tl.sum(dbias_tile, 1, keep_dims=True)
        columns = tl.arange(0, 1)
    dbias_head = head_ptr(dbias, part * bias_batch + bias_b, bias_h)
    store_tile(dbias_head, dbias, rows, columns, 1 if SUM_M else L, 1 if SUM_N else S, dbias_tile)


@triton.jit
def sum_parts_kernel(parts_ptr, total_ptr, numel, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """total = parts[0] + parts[1] + ..., in this order; parts is [PARTS, numel]."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], parts_ptr.dtype.element_ty)
    for part in range(PARTS):
        total += tl.load(parts_ptr + part * numel + offs, mask=offs < numel, other=0.0)
    tl.store(total_ptr + offs, total.to(total_ptr.dtype.element_ty), mask=offs < numel)
