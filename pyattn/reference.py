"""The definition of every op, in plain PyTorch.

Tests, documentation and benchmarks all mean this file. It is written to be read and differentiated, not to be fast: it
holds whole score matrices, computes in float32 (float64 for float64) and rounds once, at the end. A backend of the
name "reference" runs it on request; it also serves as the composite behind forward-mode and second derivatives.

All functions take the canonical form of a problem, the one the C++ and Triton kernels take: ``causal`` with
``diagonal`` and ``prefix`` means that query i sees key j iff ``j <= i + diagonal`` or ``j < prefix``.
"""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")

# Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011, section 5.3).
PHILOX_M0, PHILOX_M1 = 0xD2511F53, 0xCD9E8D57
PHILOX_W0, PHILOX_W1 = 0x9E3779B9, 0xBB67AE85
PHILOX_ROUNDS = 10
WORD = 0xFFFFFFFF


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four 32-bit words per counter, held in int64 tensors of one broadcast shape."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed & WORD, (seed >> 32) & WORD
    for _ in range(PHILOX_ROUNDS):
        # int64 products wrap modulo 2^64, which leaves the bits of the unsigned 32 x 32 -> 64 product.
        product0, product1 = c0 * PHILOX_M0, c2 * PHILOX_M1
        c0, c2 = ((product1 >> 32) & WORD) ^ c1 ^ k0, ((product0 >> 32) & WORD) ^ c3 ^ k1
        c1, c3 = product1 & WORD, product0 & WORD
        k0, k1 = (k0 + PHILOX_W0) & WORD, (k1 + PHILOX_W1) & WORD
    return c0, c1, c2, c3


def dropout_mask(seed: Tensor, dropout_p: float, batch: int, q_heads: int, q_len: int, kv_len: int) -> Tensor:
    """The attention weights that dropout keeps: bool ``[batch, q_heads, q_len, kv_len]``.

    A function of (seed, batch, head, query, key) alone: counter = (key // 4, query, head, batch), the word is key % 4,
    and a weight is kept iff its word is at least floor(p * 2^32). So it does not depend on tiling, layout, device or
    the rest of the batch.
    """
    device = seed.device
    quads = (kv_len + 3) // 4
    counter = (
        torch.arange(quads, device=device).view(1, 1, 1, -1),
        torch.arange(q_len, device=device).view(1, 1, -1, 1),
        torch.arange(q_heads, device=device).view(1, -1, 1, 1),
        torch.arange(batch, device=device).view(-1, 1, 1, 1),
    )
    words = torch.stack(philox(counter, seed), dim=-1).expand(batch, q_heads, q_len, quads, 4)
    threshold = int(dropout_p * 2**32)
    return (words >= threshold).reshape(batch, q_heads, q_len, quads * 4)[..., :kv_len]


def attended(
    scores: Tensor, bias: Tensor | None, mask: Tensor | None, causal: bool, diagonal: int, prefix: int
) -> Tensor:
    """Which scores exist: bool, broadcastable to `scores`. A -inf in the bias masks like False in the mask."""
    q_len, kv_len = scores.shape[-2:]
    attend = torch.ones((), dtype=torch.bool, device=scores.device).expand(q_len, kv_len)
    if causal:
        key = torch.arange(kv_len, device=scores.device)
        query = torch.arange(q_len, device=scores.device).unsqueeze(-1)
        attend = (key <= query + diagonal) | (key < prefix)
    if mask is not None:
        attend = attend & mask
    if bias is not None:
        attend = attend & (bias != -torch.inf)
    return attend


def _exact(function: Callable[P, R]) -> Callable[P, R]:
    """Autocast would round the products of the definition."""

    @functools.wraps(function)
    def exact(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return function(*args, **kwargs)

    return exact


class _Scores:
    """What forward and backward share: the weights before normalisation, and the operands they came from.

    Masked positions do not exist. Selecting the scores is not enough for that, since 0 * NaN is NaN in the products
    with V, and, in the backward, with K, Q and dO. So rows with a non-finite element are taken as zeros, and the
    queries that do attend to one (or are one) are poisoned as a whole.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        mask: Tensor | None,
        scale: float,
        causal: bool,
        diagonal: int,
        prefix: int,
    ) -> None:
        dtype = torch.promote_types(q.dtype, torch.float32)
        self.group = q.shape[-3] // k.shape[-3] if k.shape[-3] else 1
        k, v = (x.to(dtype).repeat_interleave(self.group, dim=-3) for x in (k, v))
        (q, bad_q), (k, bad_k), (v, bad_v) = (_finite_rows(x) for x in (q.to(dtype), k, v))
        self.q, self.k, self.v = q, k, v

        scores = scale * (q @ k.mT)
        if bias is not None:
            scores = scores + bias.to(dtype)
        self.attend = attended(scores, bias, mask, causal, diagonal, prefix).expand(scores.shape)
        scores = torch.where(self.attend, scores, -torch.inf)
        bad = bad_q.unsqueeze(-1) | (bad_k | bad_v).unsqueeze(-2)
        self.poisoned = (self.attend & bad).any(dim=-1)

        # A row with nothing to attend to has maximum -inf: 0 as pivot keeps its weights exp(-inf) = 0.
        maximum = scores.detach().amax(dim=-1) if scores.shape[-1] else scores.detach().sum(dim=-1) - torch.inf
        pivot = torch.where(maximum == -torch.inf, 0.0, maximum)
        weights = torch.where(self.attend, torch.exp(scores - pivot.unsqueeze(-1)), 0.0)
        total = weights.sum(dim=-1)
        empty = total == 0
        total = torch.where(empty, 1.0, total)
        # Selected once more: where the total is NaN, so would be the quotient at a key that is not attended to.
        self.weights = torch.where(self.attend, weights / total.unsqueeze(-1), 0.0)
        self.lse = torch.where(empty, -torch.inf, pivot + torch.log(total))

    def poison(self, rows: Tensor) -> Tensor:
        """`rows` with the poisoned queries' rows NaN; `rows` is per query, with or without a trailing axis."""
        poisoned = self.poisoned if rows.dim() == self.poisoned.dim() else self.poisoned.unsqueeze(-1)
        return torch.where(poisoned, torch.nan, rows)


def _finite_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """`x` with every row that holds a NaN or an infinity replaced by zeros, and which rows those are."""
    bad = ~torch.isfinite(x).all(dim=-1)
    return torch.where(bad.unsqueeze(-1), 0.0, x), bad


def _keep(weights: Tensor, seed: Tensor | None, dropout_p: float) -> Tensor | None:
    """keep / (1 - p), the factor of dropout, in the weights' dtype; None without dropout."""
    if dropout_p == 0.0:
        return None
    assert seed is not None
    *batch, q_heads, q_len, kv_len = weights.shape
    kept = dropout_mask(seed, dropout_p, torch.Size(batch).numel(), q_heads, q_len, kv_len).reshape(weights.shape)
    return kept.to(weights.dtype) * (1.0 / (1.0 - dropout_p) if dropout_p < 1.0 else 0.0)


@_exact
def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    seed: Tensor | None = None,
    *,
    scale: float,
    dropout_p: float = 0.0,
    causal: bool = False,
    diagonal: int = 0,
    prefix: int = 0,
) -> tuple[Tensor, Tensor]:
    """out = dropout(softmax(scale * q k^T + bias, over what is attended)) v, and the log-sum-exp of the scores.

    Shapes: q ``[*batch, q_heads, q_len, head_dim]``, k ``[*batch, kv_heads, kv_len, head_dim]``,
    v ``[*batch, kv_heads, kv_len, v_dim]``; bias and mask broadcast to ``[*batch, q_heads, q_len, kv_len]``. Query head
    h reads key/value head ``h // (q_heads // kv_heads)``. out has q's dtype; lse is float32 (float64 for float64).
    """
    s = _Scores(q, k, v, bias, mask, scale, causal, diagonal, prefix)
    keep = _keep(s.weights, seed, dropout_p)
    dropped = s.weights if keep is None else s.weights * keep
    return s.poison(dropped @ s.v).to(q.dtype), s.poison(s.lse)


@_exact
def attention_backward(
    do: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    seed: Tensor | None = None,
    *,
    scale: float,
    dropout_p: float = 0.0,
    causal: bool = False,
    diagonal: int = 0,
    prefix: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of `attention_forward` for q, k, v and bias, from those of out and lse.

    With P the weights and Z = keep / (1 - p): dV = (P Z)^T dO, dP = Z (dO V^T), delta = rowsum(dO out) - dlse,
    dS = P (dP - delta), dQ = scale dS K, dK = scale dS^T Q, dbias = dS summed over what the bias broadcasts.
    (Dao, "FlashAttention-2", 2023, section 2.3.2; the term in dlse from d lse / dS = P.)
    """
    s = _Scores(q, k, v, bias, mask, scale, causal, diagonal, prefix)
    do, bad_do = _finite_rows(do.to(s.weights.dtype))
    # A poisoned query, or one with a non-finite dO, has NaN weights wherever it attends, and nowhere else.
    poisoned = (s.poisoned | bad_do).unsqueeze(-1) & s.attend
    weights = torch.where(poisoned, torch.nan, s.weights)

    keep = _keep(weights, seed, dropout_p)
    dropped = weights if keep is None else weights * keep
    dv = dropped.mT @ do
    dp = do @ s.v.mT
    dp = dp if keep is None else dp * keep
    delta = (torch.where(s.attend, weights * dp, 0.0)).sum(dim=-1)
    delta = delta if dlse is None else delta - dlse
    ds = torch.where(s.attend, weights * (dp - delta.unsqueeze(-1)), 0.0)
    dq = scale * (ds @ s.k)
    dk = scale * (ds.mT @ s.q)
    dbias = None if bias is None else ds.sum_to_size(bias.shape).to(bias.dtype)
    return dq.to(q.dtype), _sum_group(dk, s.group).to(k.dtype), _sum_group(dv, s.group).to(v.dtype), dbias


def _sum_group(grad: Tensor, group: int) -> Tensor:
    """The gradient of repeat_interleave over heads: the sum over each kv head's query heads."""
    return grad if group == 1 else grad.unflatten(-3, (-1, group)).sum(dim=-3)


# ---- cross-entropy ---------------------------------------------------------------------------------------------------


class _CrossEntropy:
    """What forward and backward of cross-entropy share; the class axis is last."""

    def __init__(
        self, input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, label_smoothing: float
    ) -> None:
        self.class_axis = min(input.dim() - 1, 1)
        dtype = torch.promote_types(input.dtype, torch.float32)
        self.x = input.to(dtype).movedim(self.class_axis, -1)
        classes = self.x.shape[-1]
        w = torch.ones(classes, dtype=dtype, device=input.device) if weight is None else weight.to(dtype)
        smooth = label_smoothing / max(classes, 1)
        if target.is_floating_point():
            t = target.to(dtype).movedim(self.class_axis, -1)
            self.valid = torch.ones(self.x.shape[:-1], dtype=torch.bool, device=input.device)
            self.counts = torch.ones((), dtype=torch.bool, device=input.device)
            self.total_weight = self.valid.sum() * min(classes, 1)
        else:
            self.valid = target != ignore_index
            one_hot = target.unsqueeze(-1) == torch.arange(classes, device=input.device)
            t = one_hot.to(dtype)
            # A class without a share takes no part, even if its logit is -inf.
            self.counts = one_hot | (smooth != 0.0)
            self.total_weight = torch.where(self.valid, (t * w).sum(dim=-1), 0.0).sum()
        self.q = w * ((1.0 - label_smoothing) * t + smooth)
        self.x = torch.where(self.valid.unsqueeze(-1), self.x, 0.0)  # an ignored row does not exist, whatever it holds
        m = self.x.detach().amax(dim=-1) if classes else torch.zeros_like(self.valid, dtype=dtype)
        self.m = torch.where(m == -torch.inf, 0.0, m)
        self.l = torch.where(self.valid, torch.exp(self.x - self.m.unsqueeze(-1)).sum(dim=-1), 1.0)


@_exact
def cross_entropy_forward(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, and the softmax's state m, the maximum of a row, and l, the sum of exp(x - m) over its classes.

    With shares q_c = w_c ((1 - smoothing) t_c + smoothing / C), t being the class probabilities or 1 at the class
    index, a row's loss is the sum over c of q_c (log sum_d exp(x_d) - x_c); 0 if its index is ignored (then m = 0 and
    l = 1). "mean" divides the sum of all by the sum of the indices' weights, or by the number of rows if the target
    holds probabilities. Shapes: input ``[classes]`` or ``[batch, classes, *positions]``; target without the class axis
    (indices) or of input's shape (probabilities). The loss has input's dtype; m and l are float32 (float64).
    """
    s = _CrossEntropy(input, target, weight, ignore_index, label_smoothing)
    terms = s.q * (torch.log(s.l).unsqueeze(-1) + (s.m.unsqueeze(-1) - s.x))
    rows = torch.where(s.counts & s.valid.unsqueeze(-1), terms, 0.0).sum(dim=-1)
    loss = rows if reduction == "none" else rows.sum()
    loss = loss / s.total_weight if reduction == "mean" else loss
    return loss.to(input.dtype), s.m, s.l


@_exact
def cross_entropy_backward(
    dloss: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Tensor:
    """The gradient for input from that of the loss: dloss (sum(q) softmax(x) - q), 0 in ignored rows."""
    s = _CrossEntropy(input, target, weight, ignore_index, label_smoothing)
    g = dloss.to(s.x.dtype)
    g = g / s.total_weight if reduction == "mean" else g
    p = torch.exp(s.x - s.m.unsqueeze(-1)) / s.l.unsqueeze(-1)
    gradient = g.unsqueeze(-1) * (s.q.sum(dim=-1, keepdim=True) * p - s.q)
    gradient = torch.where(s.valid.unsqueeze(-1), gradient, 0.0)
    return gradient.movedim(-1, s.class_axis).to(input.dtype)


# ---- embedding bag ---------------------------------------------------------------------------------------------------


class _Bags:
    """The tokens of all bags in one row, those that count, and what each weighs in its bag."""

    def __init__(
        self,
        weight: Tensor,
        input: Tensor,
        offsets: Tensor | None,
        per_sample_weights: Tensor | None,
        mask: Tensor | None,
        lengths: Tensor | None,
        seed: Tensor | None,
        mode: str,
        padding_idx: int | None,
        include_last_offset: bool,
        dropout_p: float,
    ) -> None:
        dtype = torch.promote_types(weight.dtype, torch.float32)
        device, tokens = weight.device, input.shape[-1]
        self.ids = input.reshape(-1).long()
        if offsets is None:
            self.bags, place = input.shape[0], torch.arange(tokens, device=device)
            self.bag = torch.arange(self.bags, device=device).repeat_interleave(tokens)
            counts = torch.ones_like(input, dtype=torch.bool)
            counts = counts if lengths is None else counts & (place < lengths.unsqueeze(-1))
            counts, place = counts.reshape(-1), place.repeat(self.bags)
        else:
            self.bags, place = offsets.shape[0] - int(include_last_offset), torch.arange(tokens, device=device)
            starts = offsets.long()[: self.bags]
            self.bag = torch.searchsorted(starts.contiguous(), place, right=True) - 1
            counts = place < offsets[-1] if include_last_offset else torch.full_like(place, self.bags > 0).bool()
            self.bag = torch.where(counts, self.bag, 0)
            place = place - starts[self.bag] if self.bags else place
        if mask is not None:
            counts = counts & mask.reshape(-1)
        if padding_idx is not None:
            counts = counts & (self.ids != padding_idx)
        if dropout_p > 0.0:
            assert seed is not None
            kept = dropout_mask(seed, dropout_p, self.bags, 1, 1, tokens).view(self.bags, tokens)
            counts = counts & kept[self.bag, place] if self.bags else counts
        self.counts = counts
        self.ids = torch.where(counts, self.ids, 0)
        self.bag = torch.where(counts, self.bag, 0)

        w = torch.ones_like(self.ids, dtype=dtype)
        w = w if per_sample_weights is None else per_sample_weights.reshape(-1).to(dtype)
        self.w = torch.where(counts, w, 0.0)
        self.divisor = torch.full((self.bags,), 1.0 - dropout_p, dtype=dtype, device=device)
        if mode == "max":
            self.divisor = torch.ones_like(self.divisor)
        if mode == "mean":
            self.divisor = self.sum(self.w)
        self.empty = self.sum(counts.to(dtype)) == 0
        self.empty = self.empty | (self.divisor == 0)
        self.divisor = torch.where(self.empty, 1.0, self.divisor)

    def sum(self, tokens: Tensor) -> Tensor:
        """What each bag's tokens add up to."""
        if self.bags == 0:
            return tokens.new_zeros((0, *tokens.shape[1:]))
        return tokens.new_zeros((self.bags, *tokens.shape[1:])).index_add(0, self.bag, tokens)

    def rows(self, table: Tensor) -> Tensor:
        """The row of each token that counts; zeros for the others, whose rows may hold anything."""
        if table.shape[0] == 0:
            return table.new_zeros((self.ids.shape[0], table.shape[1]))
        return torch.where(self.counts.unsqueeze(-1), table[self.ids], 0.0)

    def of_bags(self, x: Tensor) -> Tensor:
        """`x`, which is per bag, for each token that counts."""
        if self.bags == 0:
            return x.new_zeros((self.ids.shape[0], *x.shape[1:]))
        return torch.where(self.counts.view(-1, *[1] * (x.dim() - 1)), x[self.bag], 0.0)

    def largest(self, rows: Tensor) -> Tensor:
        """The id of the first token with the largest number, per bag and feature; -1 in empty bags. NaN is largest."""
        tokens, features = rows.shape
        rows = torch.where(self.counts.unsqueeze(-1), rows.detach(), -torch.inf)
        bag = self.bag.unsqueeze(-1).expand(-1, features)
        maximum = rows.new_full((self.bags, features), -torch.inf)
        first = torch.full((self.bags, features), tokens, device=rows.device)
        if self.bags and tokens:
            maximum = maximum.scatter_reduce(0, bag, rows, "amax")
            is_it = self.counts.unsqueeze(-1) & ((rows == maximum[self.bag]) | rows.isnan())
            place = torch.arange(tokens, device=rows.device).unsqueeze(-1)
            first = first.scatter_reduce(0, bag, torch.where(is_it, place, tokens), "amin")
        return torch.where(first < tokens, torch.cat([self.ids, self.ids.new_full((1,), -1)])[first], -1)


@_exact
def embedding_bag_forward(
    weight: Tensor,
    input: Tensor,
    offsets: Tensor | None = None,
    per_sample_weights: Tensor | None = None,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    seed: Tensor | None = None,
    *,
    mode: str = "mean",
    padding_idx: int | None = None,
    include_last_offset: bool = False,
    scale_grad_by_freq: bool = False,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The sum, the weighted mean or the maximum of each bag's rows of `weight`, and, for the maximum, whose it is.

    A token counts if it is within its bag's `lengths`, its `mask` is True, its id is not `padding_idx`, and dropout
    keeps it: token t of bag b as `dropout_mask` keeps the weight of key t in sample b. With w the per-sample weights,
    or 1, of the tokens that count:
        sum: out_b = sum_t w_t weight[id_t] / (1 - dropout_p),
        mean: out_b = sum_t w_t weight[id_t] / sum_t w_t,
        max: out_b = max_t weight[id_t], of equal ones the first.
    A bag without such tokens, or whose mean would divide by 0, is zeros. Shapes: weight ``[vocabulary, features]``;
    input ``[bags, tokens]``, or ``[tokens]`` with offsets ``[bags]``, the bags' starts. out has weight's dtype; the ids
    of the maxima, -1 in empty bags, are int32 (for other modes: empty).
    """
    options = (mode, padding_idx, include_last_offset, dropout_p)
    b = _Bags(weight, input, offsets, per_sample_weights, mask, lengths, seed, *options)
    table = weight.to(torch.promote_types(weight.dtype, torch.float32))
    if mode == "max":
        largest = b.largest(b.rows(table))
        columns = torch.arange(table.shape[1], device=table.device)
        out = torch.where(largest < 0, 0.0, table[largest.clamp(min=0), columns]) if len(table) else largest * 0.0
        return out.to(weight.dtype), largest.int()
    out = b.sum(b.rows(table) * b.w.unsqueeze(-1)) / b.divisor.unsqueeze(-1)
    out = torch.where(b.empty.unsqueeze(-1), 0.0, out)
    return out.to(weight.dtype), weight.new_empty(0, dtype=torch.int32)


@_exact
def embedding_bag_backward(
    dout: Tensor,
    largest: Tensor,
    weight: Tensor,
    input: Tensor,
    offsets: Tensor | None = None,
    per_sample_weights: Tensor | None = None,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    seed: Tensor | None = None,
    *,
    mode: str = "mean",
    padding_idx: int | None = None,
    include_last_offset: bool = False,
    scale_grad_by_freq: bool = False,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor | None]:
    """The gradients for weight and per_sample_weights, from that of out and the ids of the maxima.

    With g_b = dout_b over the divisor of bag b: dweight_r is the sum of w_t g_b over the tokens t with id r, divided by
    their number under scale_grad_by_freq, and dw_t = g_b . weight[id_t], in the mean - g_b . out_b.
    """
    options = (mode, padding_idx, include_last_offset, dropout_p)
    b = _Bags(weight, input, offsets, per_sample_weights, mask, lengths, seed, *options)
    table = weight.to(torch.promote_types(weight.dtype, torch.float32))
    g = dout.to(table.dtype)
    dweight = torch.zeros_like(table)
    if len(table) == 0:
        return weight.new_zeros(weight.shape), _zeros_like_optional(per_sample_weights)
    if mode == "max":
        g = torch.where(largest < 0, 0.0, g)
        return dweight.scatter_add(0, largest.long().clamp(min=0), g).to(weight.dtype), None
    g = torch.where(b.empty.unsqueeze(-1), 0.0, g / b.divisor.unsqueeze(-1))
    dweight = dweight.index_add(0, b.ids, b.of_bags(g) * b.w.unsqueeze(-1))
    if scale_grad_by_freq:
        frequency = table.new_zeros(len(table))
        frequency = frequency.index_add(0, b.ids, b.counts.to(table.dtype))
        dweight = dweight / frequency.clamp(min=1.0).unsqueeze(-1)
    if per_sample_weights is None:
        return dweight.to(weight.dtype), None
    dw = (b.of_bags(g) * b.rows(table)).sum(dim=-1)
    if mode == "mean":
        dw = dw - b.of_bags(b.sum(b.w * dw) / b.divisor)
    return dweight.to(weight.dtype), dw.reshape(input.shape).to(per_sample_weights.dtype)


def _zeros_like_optional(x: Tensor | None) -> Tensor | None:
    return None if x is None else torch.zeros_like(x)


# ---- linear layer and cross-entropy in one ---------------------------------------------------------------------------


class _Linear:
    """The logits of cross-entropy, and what they come from; rows that are ignored do not exist, whatever they hold."""

    def __init__(
        self, input: Tensor, linear_weight: Tensor, target: Tensor, linear_bias: Tensor | None, ignore_index: int
    ) -> None:
        dtype = torch.promote_types(input.dtype, torch.float32)
        ignored = torch.zeros((), dtype=torch.bool, device=input.device)
        if not target.is_floating_point():
            ignored = (target == ignore_index).unsqueeze(-1)
        self.x = torch.where(ignored, 0.0, input.to(dtype))
        self.w = linear_weight.to(dtype)
        self.logits = self.x @ self.w.mT
        if linear_bias is not None:
            self.logits = self.logits + linear_bias.to(dtype)
        self.target = target.to(dtype) if target.is_floating_point() else target


@_exact
def linear_cross_entropy_forward(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    *,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """`cross_entropy_forward` of the logits input @ linear_weight.T + linear_bias, which are never rounded to a half
    type. Shapes: input ``[features]`` or ``[tokens, features]``, linear_weight ``[classes, features]``, linear_bias
    ``[classes]``. The loss has input's dtype; m and l are float32 (float64)."""
    s = _Linear(input, linear_weight, target, linear_bias, ignore_index)
    options: dict[str, Any] = {"reduction": reduction, "ignore_index": ignore_index, "label_smoothing": label_smoothing}
    loss, m, l = cross_entropy_forward(s.logits, s.target, weight, **options)
    return loss.to(input.dtype), m, l


@_exact
def linear_cross_entropy_backward(
    dloss: Tensor,
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    *,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients for input, linear_weight and a linear_bias ``[classes]``, whether there is one or not: with g that
    of the logits, g @ linear_weight, g.T @ input and the sum of g over the rows."""
    s = _Linear(input, linear_weight, target, linear_bias, ignore_index)
    options: dict[str, Any] = {"reduction": reduction, "ignore_index": ignore_index, "label_smoothing": label_smoothing}
    g = cross_entropy_backward(dloss, s.logits, s.target, weight, **options)
    rows, x = torch.atleast_2d(g), torch.atleast_2d(s.x)
    dinput, dweight, dbias = g @ s.w, rows.mT @ x, rows.sum(dim=0)
    return dinput.to(input.dtype), dweight.to(linear_weight.dtype), dbias.to(linear_weight.dtype)


# ---- LSTM ------------------------------------------------------------------------------------------------------------


@_exact
def lstm_forward(
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    lengths: Tensor | None = None,
    *,
    reverse: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """One layer in one direction: the hidden states of all steps, and the last hidden and cell state.

    At each step below a sample's length (all steps without `lengths`), in order or, with `reverse`, from the last one
    back, with the gates i, f, g, o in this order along the rows of the weights,

        i, f, g, o = weight_ih x + bias_ih + weight_hh h + bias_hh
        c <- sigmoid(f) c + sigmoid(i) tanh(g),    h <- sigmoid(o) tanh(c).

    A step beyond the length does not exist: it leaves the state, its output is 0, and what its input holds reaches
    nothing. Shapes: input ``[batch, seq, features]``, states ``[batch, hidden]`` (None is zeros), weights
    ``[4 hidden, features]`` and ``[4 hidden, hidden]``. Results have input's dtype; the state is carried unrounded.
    """
    dtype, (batch, seq, _), hidden = torch.promote_types(input.dtype, torch.float32), input.shape, weight_hh.shape[1]
    h, c = (input.new_zeros(batch, hidden, dtype=dtype) if x is None else x.to(dtype) for x in (h0, c0))
    bias = sum(x.to(dtype) for x in (bias_ih, bias_hh) if x is not None)
    steps = torch.arange(seq, device=input.device)
    valid = (steps < (seq if lengths is None else lengths.unsqueeze(-1))).expand(batch, seq).unsqueeze(-1)
    x = torch.where(valid, input.to(dtype), 0.0)
    outputs = [torch.empty(0)] * seq
    for t in reversed(range(seq)) if reverse else range(seq):
        i, f, g, o = (x[:, t] @ weight_ih.to(dtype).T + h @ weight_hh.to(dtype).T + bias).chunk(4, dim=-1)
        next_c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        next_h = torch.sigmoid(o) * torch.tanh(next_c)
        h, c = torch.where(valid[:, t], next_h, h), torch.where(valid[:, t], next_c, c)
        outputs[t] = torch.where(valid[:, t], h, 0.0)
    output = torch.stack(outputs, dim=1) if seq else input.new_zeros(batch, 0, hidden, dtype=dtype)
    return output.to(input.dtype), h.to(input.dtype), c.to(input.dtype)


@_exact
def lstm_backward(
    doutput: Tensor,
    dh_n: Tensor,
    dc_n: Tensor,
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    lengths: Tensor | None = None,
    *,
    reverse: bool = False,
) -> tuple[Tensor | None, ...]:
    """Gradients of `lstm_forward` for its first seven arguments, by autograd, in float32 (float64) and rounded once."""
    dtype = torch.promote_types(input.dtype, torch.float32)
    tensors = (input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh)
    present = [x for x in tensors if x is not None]

    def forward(*values: Tensor) -> tuple[Tensor, ...]:
        rest = iter(values)
        operands: list[Any] = [*(None if x is None else next(rest) for x in tensors), lengths]
        return lstm_forward(*operands, reverse=reverse)

    pullback = torch.func.vjp(forward, *(x.to(dtype) for x in present))[1]
    gradients = iter(pullback(tuple(x.to(dtype) for x in (doutput, dh_n, dc_n))))
    return tuple(None if x is None else next(gradients).to(x.dtype) for x in tensors)
