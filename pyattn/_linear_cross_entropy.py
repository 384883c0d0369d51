"""One linear layer and cross-entropy in the terms of the dispatcher op, and what runs it.

The fields of the operands stand in the order of the op's schema; csrc/bind_linear_cross_entropy-inl.h reads them by
position. The scalars are cross-entropy's.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _C, reference
from ._checks import accumulation_dtype, check_class_indices, check_linear, check_targets
from ._cross_entropy import REDUCTION_ENUM, CrossEntropyConfig, call_torch
from ._dispatch import CPU, REFERENCE, Backend, Op, TorchFunction, cpu_refusals, under_transforms


class LinearCrossEntropyOperands(NamedTuple):
    """The op's tensor arguments, in the order of its schema."""

    input: Tensor  # [features] or [tokens, features]
    linear_weight: Tensor  # [classes, features]
    target: Tensor  # indices, without the features
    linear_bias: Tensor | None  # [classes]
    weight: Tensor | None  # [classes]


class Gradients(NamedTuple):
    """Of input, linear_weight and linear_bias; or whether each is needed."""

    dinput: Tensor | None
    dlinear_weight: Tensor | None
    dlinear_bias: Tensor | None


Needed = tuple[bool, bool, bool]
ALL: Needed = (True, True, True)


def logits_shape(operands: LinearCrossEntropyOperands) -> tuple[int, ...]:
    return (*operands.input.shape[:-1], *operands.linear_weight.shape[:-1])


def check(operands: LinearCrossEntropyOperands, config: CrossEntropyConfig) -> None:
    input, linear_weight, target, linear_bias, weight = operands
    check_linear(input, linear_weight, linear_bias)
    check_targets("the logits'", logits_shape(operands), input, target, weight, *config)


def empty_loss(operands: LinearCrossEntropyOperands, reduction: str) -> Tensor:
    return operands.input.new_empty(operands.input.shape[:-1] if reduction == "none" else ())


def empty_state(operands: LinearCrossEntropyOperands) -> Tensor:
    """m or l: a number per row."""
    input = operands.input
    return input.new_empty(input.shape[:-1], dtype=accumulation_dtype(input.dtype))


def empty_gradients(operands: LinearCrossEntropyOperands, needed: Needed) -> Gradients:
    input, weight = operands.input, operands.linear_weight
    return Gradients(
        torch.empty_like(input) if needed[0] else None,
        torch.empty_like(weight) if needed[1] else None,
        weight.new_empty(weight.shape[:1]) if needed[2] else None,
    )


class LinearCrossEntropyKernels(Protocol):
    """`_dispatch.Kernels` of the op."""

    backend: Backend
    memory: str

    def refusals(self, operands: LinearCrossEntropyOperands, config: CrossEntropyConfig) -> Sequence[str]: ...

    def forward(
        self, operands: LinearCrossEntropyOperands, config: CrossEntropyConfig, with_state: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """loss, and, if asked for, m and l: see reference.py."""
        ...

    def forward_with_gradients(
        self, operands: LinearCrossEntropyOperands, config: CrossEntropyConfig, needed: Needed
    ) -> tuple[Tensor, Gradients]:
        """A loss that is reduced, and its gradients."""
        ...

    def backward(
        self,
        dloss: Tensor,
        m: Tensor,
        l: Tensor,
        operands: LinearCrossEntropyOperands,
        config: CrossEntropyConfig,
        needed: Needed,
    ) -> Gradients: ...


class CpuLinearCrossEntropy:
    """The C++ kernels of csrc/."""

    backend = CPU
    memory = "O(rows + classes), and up to 40 MB of logits"

    def refusals(self, operands: LinearCrossEntropyOperands, config: CrossEntropyConfig) -> Sequence[str]:
        return (
            *cpu_refusals("input", operands.input),
            *_no_gpu(operands.input),
            *only_torch(operands),
            *_under_transforms(),
        )

    def forward(
        self, operands: LinearCrossEntropyOperands, config: CrossEntropyConfig, with_state: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        loss, m, l = empty_loss(operands, config.reduction), None, None
        if with_state:
            m, l = empty_state(operands), empty_state(operands)
        threads = torch.get_num_threads()
        bad_row = _C.linear_cross_entropy_forward(operands, config, loss, m, l, (None, None, None), threads)
        _refuse_bad_row(bad_row, operands, config)
        return loss, m, l

    def forward_with_gradients(
        self, operands: LinearCrossEntropyOperands, config: CrossEntropyConfig, needed: Needed
    ) -> tuple[Tensor, Gradients]:
        loss, gradients = empty_loss(operands, config.reduction), empty_gradients(operands, needed)
        threads = torch.get_num_threads()
        bad_row = _C.linear_cross_entropy_forward(operands, config, loss, None, None, gradients, threads)
        _refuse_bad_row(bad_row, operands, config)
        return loss, gradients

    def backward(
        self,
        dloss: Tensor,
        m: Tensor,
        l: Tensor,
        operands: LinearCrossEntropyOperands,
        config: CrossEntropyConfig,
        needed: Needed,
    ) -> Gradients:
        gradients = empty_gradients(operands, needed)
        threads = torch.get_num_threads()
        bad_row = _C.linear_cross_entropy_backward(dloss, m, l, operands, config, gradients, threads)
        _refuse_bad_row(bad_row, operands, config)
        return gradients


class ReferenceLinearCrossEntropy:
    """The definition itself."""

    backend = REFERENCE
    memory = "O(rows * classes)"

    def refusals(self, operands: LinearCrossEntropyOperands, config: CrossEntropyConfig) -> Sequence[str]:
        positions = operands.linear_weight.dim() > 2
        return ("linear_weight has positions, which the definition leaves to torch",) if positions else ()

    def forward(
        self, operands: LinearCrossEntropyOperands, config: CrossEntropyConfig, with_state: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        check_class_indices(operands.target, operands.linear_weight.shape[0], config.ignore_index)
        return reference.linear_cross_entropy_forward(*operands, **config._asdict())

    def forward_with_gradients(
        self, operands: LinearCrossEntropyOperands, config: CrossEntropyConfig, needed: Needed
    ) -> tuple[Tensor, Gradients]:
        loss, m, l = self.forward(operands, config, with_state=True)
        assert m is not None and l is not None
        return loss, self.backward(torch.ones_like(loss), m, l, operands, config, needed)

    def backward(
        self,
        dloss: Tensor,
        m: Tensor,
        l: Tensor,
        operands: LinearCrossEntropyOperands,
        config: CrossEntropyConfig,
        needed: Needed,
    ) -> Gradients:
        gradients = reference.linear_cross_entropy_backward(dloss, *operands, **config._asdict())
        filled = zip(empty_gradients(operands, needed), gradients, strict=True)
        return Gradients(*(None if to is None else to.copy_(x) for to, x in filled))


def torch_linear_cross_entropy(operands: LinearCrossEntropyOperands, config: CrossEntropyConfig) -> Tensor:
    """torch's own two functions; errors are pyattn's, where pyattn has one."""
    check(operands, config)
    try:
        return compose(operands, config)
    except LookupError:
        check_class_indices(operands.target, operands.linear_weight.shape[0], config.ignore_index)
        raise


def compose(operands: LinearCrossEntropyOperands, config: CrossEntropyConfig) -> Tensor:
    """torch.nn.functional.linear_cross_entropy, which came with torch 2.13, in the terms of older ones; but here too
    what an ignored row holds reaches nothing, where torch's product of its zero gradient with a NaN is NaN."""
    input, linear_weight, target, linear_bias, weight = operands
    positions = linear_weight.dim() > 2
    if not target.is_floating_point() and torch.is_grad_enabled():
        ignored = target == config.ignore_index
        if positions:  # at all of them
            ignored = ignored.flatten(1).all(dim=1)
        input = input.masked_fill(ignored.unsqueeze(-1), 0.0)
    if positions:
        bias = None if linear_bias is None else linear_bias.flatten()
        logits = F.linear(input, linear_weight.flatten(0, -2), bias).reshape(logits_shape(operands))
    else:
        logits = F.linear(input, linear_weight, linear_bias)
    reduction, ignore_index, label_smoothing = config
    return call_torch(logits, target, weight, REDUCTION_ENUM[reduction], ignore_index, label_smoothing)


def only_torch(operands: LinearCrossEntropyOperands) -> list[str]:
    """What torch's functions do and no kernel."""
    target, weight = operands.target, operands.weight
    reasons = []
    if target.is_floating_point():
        reasons.append("the target holds class probabilities, which are as many numbers as the logits to be saved")
    if operands.linear_weight.dim() > 2:
        reasons.append("linear_weight has positions, and kernels take (classes, features)")
    if target.requires_grad or (weight is not None and weight.requires_grad):
        reasons.append("the target's or the weight's gradient is asked for, which kernels do not compute")
    return reasons


def _no_gpu(input: Tensor) -> list[str]:
    way_out = "pyattn.use_backend('torch') runs torch's linear and cross_entropy, which hold the logits"
    return [f"this op has no Triton kernels; {way_out}"] if input.is_cuda else []


def _under_transforms() -> list[str]:
    return ["kernels are not differentiable by torch.func or forward-mode AD"] if under_transforms() else []


def _torch_preferred(operands: LinearCrossEntropyOperands, config: CrossEntropyConfig) -> str | None:
    """Not where a problem is small: with the ignored rows taken out, torch's calls were no faster (Zen 3)."""
    reasons = [*only_torch(operands), *_under_transforms()]
    return "; ".join(reasons) if reasons else None


def _refuse_bad_row(bad_row: int, operands: LinearCrossEntropyOperands, config: CrossEntropyConfig) -> None:
    if bad_row >= 0:
        check_class_indices(operands.target, operands.linear_weight.shape[0], config.ignore_index)


LINEAR_CROSS_ENTROPY: Op[LinearCrossEntropyKernels] = Op(
    "linear_cross_entropy",
    (CpuLinearCrossEntropy(), ReferenceLinearCrossEntropy()),
    TorchFunction("O(rows * classes)", _torch_preferred),
)
