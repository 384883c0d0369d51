"""Embeddings: the public functions, and their derivative in eager mode."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from . import _C, _dispatch, reference
from ._checks import check_seed
from ._embedding_bag import (
    EMBEDDING_BAG,
    EmbeddingBagConfig,
    EmbeddingBagKernels,
    EmbeddingBagOperands,
    check,
    empty_largest,
)
from ._seed import seed_for
from ._types import typed


@typed
def embedding_bag(
    input: Int[Tensor, "..."],
    weight: Float[Tensor, "vocabulary features"],
    offsets: Int[Tensor, " starts"] | None = None,
    *,
    max_norm: float | int | None = None,
    norm_type: float | int = 2.0,
    scale_grad_by_freq: bool = False,
    mode: Literal["sum", "mean", "max"] = "mean",
    sparse: bool = False,
    per_sample_weights: Float[Tensor, "..."] | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
    mask: Bool[Tensor, "..."] | None = None,
    lengths: Int[Tensor, " bags"] | None = None,
    dropout_p: float | int = 0.0,
    dropout_seed: int | Int[Tensor, ""] | None = None,
) -> Float[Tensor, "bags features"]:
    """`torch.nn.functional.embedding_bag`, padding skipped in every form it comes in, and with word dropout.

    A bag is a list of tokens, whose ids name rows of weight. With w_t the per-sample weights, or 1, and sums over the
    tokens that count, a bag's output is ``sum_t w_t weight[id_t]``, or that over ``sum_t w_t``, or the largest number
    of each column.

    Args:
        input: the ids, int64 or int32: ``[bags, tokens]``, or, with offsets, ``[tokens]``.
        weight: the table; float32, bfloat16, float16 or float64, any strides.
        offsets: the first token of each bag in a 1-D input; the first is 0, none is less than the one before.
        max_norm, norm_type: torch's renormalisation of weight in place is not supported; see Raises.
        scale_grad_by_freq: divide the gradient of each row by the number of tokens that name it.
        mode: "sum", "mean" or "max".
        sparse: give weight a sparse gradient, coalesced: the rows that a token names and no others.
        per_sample_weights: w, in weight's dtype and input's shape; in "sum" and "mean".
        include_last_offset: offsets has one element more than there are bags, the end of the last one.
        padding_idx: tokens of this id do not count; negative, it is counted from the end of the table.
        mask: True where a token counts, of input's shape.
        lengths: how many tokens of each row of a 2-D input there are; the rest is padding.
        dropout_p: the probability with which a token is dropped, as if its bag did not have it; a sum is divided by
            1 - dropout_p, so that its expectation stays.
        dropout_seed: determines what is dropped; an int or a 0-d int64 tensor on weight's device. None draws one from
            torch's generator of that device.

    Returns:
        A row per bag, in weight's dtype.

    Numerics:
        Sums are float32 (float64 for float64), over the tokens in their order, in blocks of 64; rounded once. So are
        gradients, over the tokens that name a row. On the CPU it is bitwise the same for any number of threads.

    Corner cases:
        * A bag without tokens that count, or a mean whose weights add up to 0, gives zeros and gradients 0.
        * What a token that does not count has for an id, and what the row of that id holds, reaches nothing.
        * Of equal maxima the first token's gets the gradient; NaN counts as largest.
        * Token t of a bag is dropped as `dropout_mask` drops key t of query 0 and head 0 in that sample, whether the
          bags are rows or lie between offsets.
        * Ids, offsets and lengths are looked at before the table is read or a gradient is written.
        * Second derivatives are composites of the definition; a sparse gradient has none. torch.func's transforms and
          forward-mode AD are for ``use_backend("reference")``.

    Raises:
        ShapeError, DtypeError, DeviceError, ValueError: an argument does not fit, or is out of its range.
        IndexError: the id of a token that counts is no row of weight.
        NotImplementedError: max_norm is given; sparse under torch.compile; no backend takes the problem (on a GPU none
            does yet).

    References:
        Word dropout: Iyyer et al., "Deep unordered composition rivals syntactic methods for text classification", 2015,
        section 3.1. Per-sample weights and offsets: `torch.nn.EmbeddingBag`.

    >>> ids, table = torch.tensor([[3, 1, 0, 0], [2, 0, 0, 0]]), torch.randn(5, 7)
    >>> embedding_bag(ids, table, padding_idx=0).shape
    torch.Size([2, 7])
    """
    if max_norm is not None:
        raise NotImplementedError(
            f"max_norm: torch's renormalisation changes weight in place inside the forward, got {max_norm}; "
            "torch.renorm before the call does the same for the whole table"
        )
    if padding_idx is not None and padding_idx < 0:
        padding_idx += weight.shape[0]
    operands = EmbeddingBagOperands(weight, input, offsets, per_sample_weights, mask, lengths)
    config = EmbeddingBagConfig(mode, padding_idx, include_last_offset, scale_grad_by_freq, dropout_p)
    if dropout_seed is not None:
        check_seed(dropout_seed, weight.device)
    if torch.compiler.is_compiling():
        return _call_op(operands, config, sparse, dropout_seed)

    # As for attention, the checks are made in C++, and made again where the answer is no, to find the words.
    ready = _C.embedding_bag_ready(operands, config)
    if not ready:
        check(operands, config)
        if weight.is_meta:
            return _call_op(operands, config, sparse, dropout_seed)
    kernels = EMBEDDING_BAG.choose(operands, config)
    if _dispatch.under_transforms():  # only the definition lets itself be chosen here, and it is differentiable
        return kernels.forward(_with_seed(operands, config, dropout_seed), config, with_largest=False)[0]
    if not ready or torch._C._len_torch_dispatch_stack() or torch._C._get_tracing_state() is not None:
        return _call_op(operands, config, sparse, dropout_seed)
    if dropout_p > 0.0:
        operands = _with_seed(operands, config, dropout_seed)
    if ready == _WITH_GRAD and torch.is_grad_enabled():
        return _apply_embedding_bag(weight, per_sample_weights, operands, config, kernels, sparse)
    return kernels.forward(operands, config, with_largest=False)[0]


_WITH_GRAD = 2  # _C.embedding_bag_ready: an operand requires grad


def _with_seed(
    operands: EmbeddingBagOperands, config: EmbeddingBagConfig, dropout_seed: int | Tensor | None
) -> EmbeddingBagOperands:
    return operands._replace(seed=seed_for(config.dropout_p, dropout_seed, operands.weight.device))


def _call_op(
    operands: EmbeddingBagOperands, config: EmbeddingBagConfig, sparse: bool, dropout_seed: int | Tensor | None
) -> Tensor:
    """The dispatcher's way, for everything that has no data of its own: graphs, fake tensors, subclasses, modes."""
    if sparse and operands.weight.requires_grad and torch.is_grad_enabled():
        raise NotImplementedError(
            "sparse: a graph cannot hold a gradient whose number of rows depends on data; sparse=False, or call "
            "outside torch.compile on plain tensors"
        )
    operands = _with_seed(operands, config, dropout_seed)
    return torch.ops.pyattn.embedding_bag_forward(*operands, *config)[0]  # type: ignore[no-any-return]


class _EmbeddingBag(torch.autograd.Function):
    """The derivative in eager mode, `ctx` in `forward` as in attention.py."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        per_sample_weights: Tensor | None,
        operands: EmbeddingBagOperands,  # holds the two before it, which stand alone because autograd looks no deeper
        config: EmbeddingBagConfig,
        kernels: EmbeddingBagKernels,
        sparse: bool,
    ) -> Tensor:
        out, largest = kernels.forward(operands, config, with_largest=True)
        ctx.save_for_backward(*operands, largest)
        ctx.config, ctx.kernels, ctx.sparse = config, kernels, sparse
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dout,) = grads
        *tensors, largest = ctx.saved_tensors
        operands, config, kernels = EmbeddingBagOperands(*tensors), ctx.config, ctx.kernels
        weight_grad, weights_grad = ctx.needs_input_grad[:2]
        direct = _C.plain(dout, *operands) and not (
            torch.is_grad_enabled() or torch._C._len_torch_dispatch_stack() or _dispatch.under_transforms()
        )
        dweight = dw = None
        if not direct:
            if ctx.sparse:
                raise NotImplementedError("sparse: a sparse gradient cannot be differentiated or mapped; sparse=False")
            largest = empty_largest(operands, config) if largest is None else largest
            dweight, dw = reference.embedding_bag_backward(dout, largest, *operands, **config._asdict())
            return dweight if weight_grad else None, dw if weights_grad else None, None, None, None, None
        if weight_grad:
            backward = kernels.sparse_backward if ctx.sparse else kernels.backward
            dweight = backward(dout, largest, operands, config)
        if weights_grad:
            dw = kernels.weights_backward(dout, operands, config)
        return dweight, dw, None, None, None, None


# Past Function.apply's own look for torch.func's transforms, as in attention.py: kernels refuse to run under them.
_function_base: Any = super(torch.autograd.Function, _EmbeddingBag)
_apply_embedding_bag: Callable[..., Tensor] = _function_base.apply
