"""One call of attention with its backward, as a value that tests draw, run and judge."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

import pyattn
from pyattn import reference
from pyattn._checks import accumulation_dtype
from pyattn._problem import AttentionConfig, Operands, kernel_arguments
from pyattn.masks import LoweredMask, lower


class Results(NamedTuple):
    """What a forward and a backward give; dbias is None without a bias."""

    out: Tensor
    lse: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor
    dbias: Tensor | None


@dataclass(frozen=True, repr=False)
class Problem:
    """Inputs, options, and the gradients of both outputs."""

    q: Tensor
    k: Tensor
    v: Tensor
    do: Tensor
    dlse: Tensor | None = None
    bias: Tensor | None = None
    mask: Tensor | None = None
    causal: pyattn.Causal | None = None
    scale: float | None = None
    dropout_p: float = 0.0
    seed: int = 0

    def __repr__(self) -> str:
        lines = []
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                dtype = str(value.dtype).removeprefix("torch.")
                value = f"{dtype} {tuple(value.shape)}, strides {value.stride()}, offset {value.storage_offset()}"
            lines.append(f"  {field.name}: {value}")
        return "\n".join(("Problem(", *lines, ")"))

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """Hypothesis would print a dataclass with all the numbers in its tensors."""
        printer.text(repr(self))

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments of `pyattn.attention`."""
        mask = self.causal if self.mask is None else self.mask if self.causal is None else self.causal & self.mask
        return {
            "mask": mask,
            "bias": self.bias,
            "scale": self.scale,
            "dropout_p": self.dropout_p,
            "dropout_seed": self.seed,
        }

    @property
    def kernel_arguments(self) -> dict[str, Any]:
        """The keyword arguments of `pyattn.reference`."""
        head_dim = self.q.shape[-1]
        scale = self.scale if self.scale is not None else head_dim**-0.5 if head_dim else 1.0
        causal = LoweredMask() if self.causal is None else lower(self.causal, self.q.shape[-2], self.k.shape[-2])
        config = AttentionConfig(scale, 0.0, self.dropout_p, causal.align, causal.left, causal.right, causal.prefix)
        return kernel_arguments(Operands(self.q, self.k, self.v), config)._asdict()

    @property
    def seed_tensor(self) -> Tensor:
        return torch.tensor(self.seed)

    def scores_shape(self) -> tuple[int, ...]:
        return (*self.q.shape[:-1], self.k.shape[-2])

    def attended(self) -> Tensor:
        """Which query sees which key: bool ``[*batch, q_heads, q_len, kv_len]``."""
        rule = {name: self.kernel_arguments[name] for name in ("causal", "diagonal", "prefix")}
        scores = self.q.new_zeros(()).expand(self.scores_shape())
        return reference.attended(scores, self.bias, self.mask, **rule).expand(self.scores_shape())


def make(
    batch: Sequence[int] = (2,),
    q_heads: int = 2,
    kv_heads: int = 1,
    q_len: int = 67,
    kv_len: int = 131,
    head_dim: int = 13,
    v_dim: int = 7,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    sharpness: float = 1.0,
    **options: object,
) -> Problem:
    """A problem of standard normal values: by default prime sizes, over one tile of queries and two units of keys."""
    generator = torch.Generator().manual_seed(seed)

    def values(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    return Problem(
        q=values(*batch, q_heads, q_len, head_dim) * sharpness,
        k=values(*batch, kv_heads, kv_len, head_dim),
        v=values(*batch, kv_heads, kv_len, v_dim),
        do=values(*batch, q_heads, q_len, v_dim),
        dlse=values(*batch, q_heads, q_len).to(accumulation_dtype(dtype)),
        **options,
    )


def run(problem: Problem) -> Results:
    """What pyattn gives: both outputs, and the gradients for what the problem has gradients of."""
    leaves = [x.detach().requires_grad_() for x in (problem.q, problem.k, problem.v)]
    options = problem.options
    if problem.bias is not None:
        leaves.append(problem.bias.detach().requires_grad_())
        options["bias"] = leaves[3]
    out, lse = pyattn.attention_with_lse(*leaves[:3], **options)
    if problem.dlse is None:
        gradients = torch.autograd.grad(out, leaves, problem.do)
    else:
        gradients = torch.autograd.grad((out, lse), leaves, (problem.do, problem.dlse))
    dq, dk, dv, *dbias = gradients
    return Results(out.detach(), lse.detach(), dq, dk, dv, dbias[0] if dbias else None)
