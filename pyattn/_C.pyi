from collections.abc import Callable
from typing import Any

from torch import Tensor

def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    seed: Tensor | None,
    out: Tensor,
    lse: Tensor | None,
    scale: float,
    dropout_p: float,
    causal: bool,
    diagonal: int,
    prefix: int,
    threads: int,
) -> None: ...
def attention_backward(
    do: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    seed: Tensor | None,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    dbias: Tensor | None,
    scale: float,
    dropout_p: float,
    causal: bool,
    diagonal: int,
    prefix: int,
    threads: int,
) -> None: ...
def isa() -> str: ...
def compiled_isas() -> list[str]: ...
def available_isas() -> list[str]: ...
def compile_signature(parameters: Any) -> Callable[..., bool]: ...
def plain(*tensors: Tensor | None) -> int: ...
def attention_operands(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None) -> int: ...
