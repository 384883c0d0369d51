"""Losses: the public functions, and their derivative in eager mode.

As for attention: a call is checked, given to a backend, and differentiated by the backend's own backward. Where torch's
own function is the better choice, it is called as it stands, and `pyattn.explain` says why.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, TypeVar, cast

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from . import _C, _dispatch, reference
from ._cross_entropy import (
    CROSS_ENTROPY,
    REDUCTION_ENUM,
    TORCH_LOGITS,
    CrossEntropyConfig,
    CrossEntropyKernels,
    CrossEntropyOperands,
    call_torch,
    check,
    torch_cross_entropy,
)
from ._linear_cross_entropy import (
    LINEAR_CROSS_ENTROPY,
    LinearCrossEntropyKernels,
    LinearCrossEntropyOperands,
    compose,
    only_torch,
    torch_linear_cross_entropy,
)
from ._linear_cross_entropy import check as check_linear_cross_entropy
from ._types import typed

F = TypeVar("F", bound=Callable[..., Tensor])
Operands = TypeVar("Operands", CrossEntropyOperands, LinearCrossEntropyOperands)


def _torch_first(function: F) -> F:
    """`function`, but small problems that nobody asks about go to torch at once.

    torch looks at the arguments itself, and what it refuses comes back to `function` for the words. To check them
    twice, and to choose with all ceremony, takes 2.5 us, where torch's whole call on 32 x 2 logits takes 4.
    """

    def cross_entropy(
        input: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
        *,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
    ) -> Tensor:
        if not torch.compiler.is_compiling():
            try:
                if input.numel() <= TORCH_LOGITS and _dispatch.nothing_requested():
                    return call_torch(input, target, weight, REDUCTION_ENUM[reduction], ignore_index, label_smoothing)
            except (AttributeError, TypeError, ValueError, RuntimeError, LookupError):
                pass
        return function(
            input,
            target,
            weight,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
        )

    return cast(F, functools.update_wrapper(cross_entropy, function))


@_torch_first
@typed
def cross_entropy(
    input: Float[Tensor, "..."],
    target: Shaped[Tensor, "..."],
    weight: Float[Tensor, " classes"] | None = None,
    *,
    ignore_index: int = -100,
    reduction: Literal["none", "mean", "sum"] = "mean",
    label_smoothing: float | int = 0.0,
) -> Float[Tensor, "..."]:
    """`torch.nn.functional.cross_entropy`: its semantics, in one pass over the logits forward and one backward.

    A row's loss is ``sum over classes c of q_c (logsumexp(x) - x_c)`` with the shares
    ``q_c = weight_c ((1 - label_smoothing) t_c + label_smoothing / classes)``, where t is 1 at the class index and 0
    elsewhere, or the class probabilities.

    Args:
        input: the logits x, ``[classes]`` or ``[batch, classes, *positions]``; float32, bfloat16, float16 or float64,
            any strides: the class axis is read where it lies.
        target: class indices in ``[0, classes)``, int64 or uint8, of input's shape without the class axis; or class
            probabilities, floating and of input's shape.
        weight: a factor per class, in input's dtype.
        ignore_index: rows of this index have loss 0 and gradient 0, and do not count for the mean.
        reduction: "none" gives a loss per row, "sum" their sum, "mean" that divided by the sum of the weights of the
            indices (with probabilities: by the number of rows).
        label_smoothing: the part of each target, in [0, 1], that is spread over all classes.

    Returns:
        The loss in input's dtype.

    Numerics:
        Exponentials and sums within a row are float32 (float64 for float64), the sum over rows is float64; the loss
        is rounded once. On the CPU it is bitwise the same for any number of threads.

    Corner cases:
        * A mean over nothing (no rows, all ignored, all weights 0) is NaN, as torch's; ignored rows have gradient 0.
        * What an ignored row holds, be it NaN, reaches nothing.
        * A logit of -inf has probability 0; as a target it makes the loss infinite, and probabilities or smoothing,
          which multiply every class, make it infinite or NaN, as in torch.
        * An index that is neither a class nor `ignore_index` is an error on the CPU, before anything is computed. On
          a GPU, where looking at it would wait for the device, it makes the loss NaN; no memory beyond is read.
        * Gradients are those of input. Where target or weight needs one, and under torch.func's transforms and forward
          mode AD, torch's own function runs; so it does for up to 49152 logits, where it is faster.

    Raises:
        ShapeError, DtypeError, DeviceError, ValueError: an argument does not fit, or is out of its range.
        IndexError: a class index is out of range (CPU).
        NotImplementedError: the backend asked for does not take the problem.

    References:
        Label smoothing: Szegedy et al., "Rethinking the Inception architecture", 2016, section 7. Online softmax:
        Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018, algorithm 3.

    >>> logits, labels = torch.randn(8, 1000), torch.randint(1000, (8,))
    >>> cross_entropy(logits, labels, label_smoothing=0.1).shape
    torch.Size([])
    """
    operands = CrossEntropyOperands(input, target, weight)
    config = CrossEntropyConfig(reduction, ignore_index, label_smoothing)
    if torch.compiler.is_compiling():
        if target.requires_grad or (weight is not None and weight.requires_grad):
            return torch.nn.functional.cross_entropy(*operands, **config._asdict())
        return _call_op(operands, config)
    if CROSS_ENTROPY.prefers_torch(operands, config):
        return torch_cross_entropy(operands, config)

    check(operands, config)
    operands = _autocast(operands)
    if input.is_meta:
        return _call_op(operands, config)
    kernels = CROSS_ENTROPY.choose(operands, config)
    plain = _C.plain(*operands)
    if not plain or torch._C._len_torch_dispatch_stack() or torch._C._get_tracing_state() is not None:
        return _call_op(operands, config)
    if plain == _WITH_GRAD and torch.is_grad_enabled():
        return _apply_cross_entropy(operands.input, operands, config, kernels)
    return kernels.forward(operands, config, with_state=False)[0]


_WITH_GRAD = 2  # _C.plain: an operand requires grad


def _call_op(operands: CrossEntropyOperands, config: CrossEntropyConfig) -> Tensor:
    """The dispatcher's way, for everything that has no data of its own: graphs, fake tensors, subclasses, modes."""
    return torch.ops.pyattn.cross_entropy_forward(*_autocast(operands), *config)[0]  # type: ignore[no-any-return]


def _autocast(operands: Operands) -> Operands:
    """As torch does for losses under autocast: half types are computed, and returned, in float32, inside autograd."""
    if operands.input.is_meta or not torch.is_autocast_enabled(operands.input.device.type):
        return operands
    return type(operands)(*(None if x is None else _widen(x) for x in operands))  # type: ignore[arg-type]


def _widen(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


class _CrossEntropy(torch.autograd.Function):
    """The derivative in eager mode, `ctx` in `forward` as in attention.py."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        operands: CrossEntropyOperands,  # holds the input, which stands alone because autograd looks no deeper
        config: CrossEntropyConfig,
        kernels: CrossEntropyKernels,
    ) -> Tensor:
        loss, m, l = kernels.forward(operands, config, with_state=True)
        ctx.save_for_backward(*operands, m, l)
        ctx.config, ctx.kernels = config, kernels
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dloss,) = grads
        *tensors, m, l = ctx.saved_tensors
        operands = CrossEntropyOperands(*tensors)
        direct = _C.plain(dloss, m, l, *operands) and not (
            torch.is_grad_enabled() or torch._C._len_torch_dispatch_stack() or _dispatch.under_transforms()
        )
        if direct:
            dinput = ctx.kernels.backward(dloss, m, l, operands, ctx.config)
        else:  # the backward is itself differentiated, mapped or traced: its definition can be, in O(rows * classes)
            dinput = reference.cross_entropy_backward(dloss, *operands, **ctx.config._asdict())
        return dinput, None, None, None


# Past Function.apply's own look for torch.func's transforms, as in attention.py: kernels refuse to run under them.
_function_base: Any = super(torch.autograd.Function, _CrossEntropy)
_apply_cross_entropy: Callable[..., Tensor] = _function_base.apply


# ---- linear layer and cross-entropy in one ---------------------------------------------------------------------------


@typed
def linear_cross_entropy(
    input: Float[Tensor, "..."],
    linear_weight: Float[Tensor, "..."],
    target: Shaped[Tensor, "..."],
    *,
    linear_bias: Float[Tensor, "..."] | None = None,
    weight: Float[Tensor, " classes"] | None = None,
    reduction: Literal["none", "mean", "sum"] = "mean",
    ignore_index: int | None = None,
    label_smoothing: float | int = 0.0,
    options: None = None,
) -> Float[Tensor, "..."]:
    """`torch.nn.functional.linear_cross_entropy`: the logits of a linear layer and their cross-entropy, in chunks.

    The loss is ``cross_entropy(input @ linear_weight.T + linear_bias, target, ...)``, but the logits never exist as a
    whole. Where a gradient is needed, a chunk's logits turn into their gradient as soon as the loss is known, and that
    into the chunk's part of the gradients of input, linear_weight and linear_bias: training takes three products of
    the logits' size, as it would if they were stored.

    Args:
        input: ``[features]`` or ``[tokens, features]``; float32, bfloat16, float16 or float64, any strides.
        linear_weight: ``[classes, features]``, in input's dtype; or ``[classes, *positions, features]``.
        target: class indices in ``[0, classes)``, int64 or uint8, ``[]`` or ``[tokens, *positions]``; or class
            probabilities, of the logits' shape ``[classes]`` or ``[tokens, classes, *positions]``.
        linear_bias: of linear_weight's shape without features, in input's dtype.
        weight: a factor per class, in input's dtype.
        reduction: "none" gives a loss per row, "sum" their sum, "mean" that divided by the sum of the weights of the
            indices (with probabilities: by the number of rows).
        ignore_index: rows of this index have loss 0 and gradient 0, and do not count for the mean; None is -100. Not
            to be given with class probabilities.
        label_smoothing: the part of each target, in [0, 1], that is spread over all classes.
        options: torch's choice of chunks. None, since pyattn always works in chunks, of its own choice.

    Returns:
        The loss in input's dtype.

    Numerics:
        Products, exponentials and sums are float32 (float64 for float64): logits of half types are not rounded. The
        loss is rounded once. A gradient made in the forward is rounded for a loss gradient of 1 and again when it is
        multiplied by another; not so in float16, whose range is too small for that. On the CPU everything is bitwise
        the same for any number of threads.

    Corner cases:
        * Ignored rows are skipped: they cost nothing, and what they hold, be it NaN, reaches nothing.
        * The gradients are made in the forward, so a loss that is never differentiated is best computed under
          `torch.no_grad`, for a third of the time. They are handed to the first backward; another backward (with
          ``retain_graph``), one of ``reduction="none"``, float16, and compiled graphs make the logits again: four
          products in all.
        * Beside the gradients it takes up to 40 MB for logits, and what a block of 384 classes needs; for half types
          the gradient of linear_weight in float32 as well.
        * Means over nothing, logits of -inf and wrong indices are as in `cross_entropy`. Under autocast, half types
          are computed, and the loss returned, in float32.
        * With positions or class probabilities, for gradients of target or weight, and under torch.func's transforms
          and forward mode AD, torch's linear and cross_entropy run, which hold the logits.

    Raises:
        ShapeError, DtypeError, DeviceError, ValueError: an argument does not fit, or is out of its range.
        IndexError: a class index is out of range (CPU).
        NotImplementedError: options is not None, or no backend takes the problem.

    References:
        Gradients in the forward: Hsu et al., "Liger Kernel", 2024, section 3.2. No logits in memory: Wijmans et al.,
        "Cut your losses in large-vocabulary language models", 2024.

    >>> hidden, classifier, labels = torch.randn(8, 64), torch.randn(1000, 64), torch.randint(1000, (8,))
    >>> linear_cross_entropy(hidden, classifier, labels, label_smoothing=0.1).shape
    torch.Size([])
    """
    if ignore_index is not None and target.is_floating_point():
        raise ValueError(f"ignore_index: does not apply to class probabilities, got {ignore_index}")
    operands = LinearCrossEntropyOperands(input, linear_weight, target, linear_bias, weight)
    config = CrossEntropyConfig(reduction, -100 if ignore_index is None else ignore_index, label_smoothing)
    if torch.compiler.is_compiling():
        run = compose if only_torch(operands) else _call_linear_op
        return run(operands, config)
    if LINEAR_CROSS_ENTROPY.prefers_torch(operands, config):
        return torch_linear_cross_entropy(operands, config)

    operands = _autocast(operands)
    check_linear_cross_entropy(operands, config)
    if input.is_meta:
        return _call_linear_op(operands, config)
    kernels = LINEAR_CROSS_ENTROPY.choose(operands, config)
    plain = _C.plain(*operands)
    if not plain or torch._C._len_torch_dispatch_stack() or torch._C._get_tracing_state() is not None:
        return _call_linear_op(operands, config)
    if plain == _WITH_GRAD and torch.is_grad_enabled():
        input, linear_weight, _, linear_bias, _ = operands
        return _apply_linear_cross_entropy(input, linear_weight, linear_bias, operands, config, kernels)
    return kernels.forward(operands, config, with_state=False)[0]


def _call_linear_op(operands: LinearCrossEntropyOperands, config: CrossEntropyConfig) -> Tensor:
    return torch.ops.pyattn.linear_cross_entropy_forward(*_autocast(operands), *config)[0]  # type: ignore[no-any-return]


class _LinearCrossEntropy(torch.autograd.Function):
    """The derivative in eager mode, `ctx` in `forward` as in attention.py."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        linear_weight: Tensor,
        linear_bias: Tensor | None,
        operands: LinearCrossEntropyOperands,  # holds these three, which stand alone because autograd looks no deeper
        config: CrossEntropyConfig,
        kernels: LinearCrossEntropyKernels,
    ) -> Tensor:
        ctx.gradients = m = l = None
        # float16: a gradient of 1 is divided by the tokens of a batch and spread over the classes, where the range
        # ends. Loss scaling is there to prevent that, and comes with dloss.
        if config.reduction == "none" or input.dtype == torch.float16:
            loss, m, l = kernels.forward(operands, config, with_state=True)
        else:
            loss, ctx.gradients = kernels.forward_with_gradients(operands, config, ctx.needs_input_grad[:3])
        ctx.save_for_backward(*operands, m, l)
        ctx.config, ctx.kernels = config, kernels
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dloss,) = grads
        *tensors, m, l = ctx.saved_tensors
        operands, needed = LinearCrossEntropyOperands(*tensors), ctx.needs_input_grad[:3]
        direct = _C.plain(dloss, *operands) and not (
            torch.is_grad_enabled() or torch._C._len_torch_dispatch_stack() or _dispatch.under_transforms()
        )
        if not direct:  # as for cross-entropy
            options = ctx.config._asdict()
            gradients = reference.linear_cross_entropy_backward(dloss, *operands, **options)
            return *(x if need else None for x, need in zip(gradients, needed, strict=True)), None, None, None
        if m is not None:
            return *ctx.kernels.backward(dloss, m, l, operands, ctx.config, needed), None, None, None
        # Given away: if autograd made its own copy of gradients that are kept here, they would be there twice.
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:  # another backward, of a graph that was retained
            _, m, l = ctx.kernels.forward(operands, ctx.config, with_state=True)
            gradients = ctx.kernels.backward(torch.ones_like(dloss), m, l, operands, ctx.config, needed)
        if dloss.item() != 1.0:
            for x in gradients:
                if x is not None:
                    x.mul_(dloss)
        return *gradients, None, None, None


_linear_function_base: Any = super(torch.autograd.Function, _LinearCrossEntropy)
_apply_linear_cross_entropy: Callable[..., Tensor] = _linear_function_base.apply
