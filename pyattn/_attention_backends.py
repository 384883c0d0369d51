"""What runs attention: the C++ kernels, the Triton kernels, the reference."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from . import _C, reference
from ._dispatch import CPU, REFERENCE, TRITON, Backend, Op, cpu_refusals, triton_refusals
from ._problem import AttentionConfig, Gradients, Operands, empty_gradients, empty_lse, empty_out, kernel_arguments


class AttentionKernels(Protocol):
    """`_dispatch.Kernels` of attention."""

    backend: Backend
    memory: str

    def refusals(self, operands: Operands, config: AttentionConfig) -> Sequence[str]: ...

    def forward(self, operands: Operands, config: AttentionConfig, with_lse: bool) -> tuple[Tensor, Tensor | None]:
        """out, and lse if asked for: inference has no use for it."""
        ...

    def backward(
        self,
        do: Tensor,
        dlse: Tensor | None,
        out: Tensor,
        lse: Tensor,
        operands: Operands,
        config: AttentionConfig,
        bias_grad: bool,
    ) -> Gradients: ...


class CpuAttention:
    """The C++ kernels of csrc/."""

    backend = CPU
    memory = "O(q_len + kv_len)"

    def refusals(self, operands: Operands, config: AttentionConfig) -> Sequence[str]:
        return cpu_refusals("query", operands.q)

    def forward(self, operands: Operands, config: AttentionConfig, with_lse: bool) -> tuple[Tensor, Tensor | None]:
        out = empty_out(operands.q, operands.v.shape[-1])
        lse = _C.empty_rows(operands.q) if with_lse else None
        _C.attention_forward(operands, config, out, lse, torch.get_num_threads())
        return out, lse

    def backward(
        self,
        do: Tensor,
        dlse: Tensor | None,
        out: Tensor,
        lse: Tensor,
        operands: Operands,
        config: AttentionConfig,
        bias_grad: bool,
    ) -> Gradients:
        gradients = empty_gradients(operands, bias_grad)
        _C.attention_backward(do, dlse, out, lse, operands, config, gradients, torch.get_num_threads())
        return gradients


class TritonAttention:
    """The Triton kernels of kernels/, imported on first use: `import pyattn` works without triton."""

    backend = TRITON
    memory = "O(q_len + kv_len)"

    def refusals(self, operands: Operands, config: AttentionConfig) -> Sequence[str]:
        return triton_refusals("query", operands.q)

    def forward(self, operands: Operands, config: AttentionConfig, with_lse: bool) -> tuple[Tensor, Tensor | None]:
        from .kernels import attention as kernels

        out, lse = empty_out(operands.q, operands.v.shape[-1]), empty_lse(operands.q)
        arguments = kernel_arguments(operands, config)._asdict()
        kernels.attention_forward(*operands.kernel_tensors(), out, lse, **arguments)
        return out, lse

    def backward(
        self,
        do: Tensor,
        dlse: Tensor | None,
        out: Tensor,
        lse: Tensor,
        operands: Operands,
        config: AttentionConfig,
        bias_grad: bool,
    ) -> Gradients:
        from .kernels import attention as kernels

        q, k, v, bias, mask, seed = operands.kernel_tensors()
        gradients = empty_gradients(operands, bias_grad)
        kernels.attention_backward(
            do, dlse, q, k, v, out, lse, bias, mask, seed, *gradients, **kernel_arguments(operands, config)._asdict()
        )
        return gradients


class ReferenceAttention:
    """The definition itself."""

    backend = REFERENCE
    memory = "O(q_len * kv_len)"

    def refusals(self, operands: Operands, config: AttentionConfig) -> Sequence[str]:
        return ()

    def forward(self, operands: Operands, config: AttentionConfig, with_lse: bool) -> tuple[Tensor, Tensor | None]:
        arguments = kernel_arguments(operands, config)._asdict()
        result, lse = reference.attention_forward(*operands.kernel_tensors(), **arguments)
        out = empty_out(operands.q, operands.v.shape[-1])
        return out.copy_(result), lse

    def backward(
        self,
        do: Tensor,
        dlse: Tensor | None,
        out: Tensor,
        lse: Tensor,
        operands: Operands,
        config: AttentionConfig,
        bias_grad: bool,
    ) -> Gradients:
        arguments = kernel_arguments(operands, config)._asdict()
        gradients = empty_gradients(operands, bias_grad)
        results = reference.attention_backward(do, dlse, *operands.kernel_tensors(), **arguments)
        for gradient, computed in zip(gradients, results, strict=True):
            if gradient is not None and computed is not None:
                gradient.copy_(computed)
        return gradients


ATTENTION: Op[AttentionKernels] = Op("attention", (CpuAttention(), TritonAttention(), ReferenceAttention()))


def forward_with_lse(operands: Operands, config: AttentionConfig) -> tuple[Tensor, Tensor]:
    out, lse = ATTENTION.choose(operands, config).forward(operands, config, with_lse=True)
    assert lse is not None
    return out, lse
