from collections.abc import Callable
from typing import Any

from torch import Tensor

def attention_forward(
    operands: tuple[Tensor | None, ...],
    config: tuple[float | None, ...],
    out: Tensor,
    lse: Tensor | None,
    threads: int,
) -> None: ...
def attention_backward(
    do: Tensor,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    operands: tuple[Tensor | None, ...],
    config: tuple[float | None, ...],
    gradients: tuple[Tensor | None, ...],
    threads: int,
) -> None: ...
def cross_entropy_forward(
    operands: tuple[Tensor | None, ...],
    config: tuple[str | int | float, ...],
    loss: Tensor,
    m: Tensor | None,
    l: Tensor | None,
    threads: int,
) -> int: ...
def cross_entropy_backward(
    dloss: Tensor,
    m: Tensor,
    l: Tensor,
    operands: tuple[Tensor | None, ...],
    config: tuple[str | int | float, ...],
    dinput: Tensor,
    threads: int,
) -> int: ...
def embedding_bag_forward(
    operands: tuple[Tensor | None, ...],
    config: tuple[str | int | float | None, ...],
    out: Tensor,
    largest: Tensor | None,
    threads: int,
) -> int: ...

class BagTerms:
    bad_bag: int
    rows: int
    def __init__(self, operands: tuple[Tensor | None, ...], config: tuple[str | int | float | None, ...]) -> None: ...

def embedding_bag_backward(
    terms: BagTerms,
    dout: Tensor,
    largest: Tensor | None,
    operands: tuple[Tensor | None, ...],
    config: tuple[str | int | float | None, ...],
    dweight: Tensor,
    row_ids: Tensor | None,
    threads: int,
) -> None: ...
def embedding_bag_weights_backward(
    dout: Tensor,
    operands: tuple[Tensor | None, ...],
    config: tuple[str | int | float | None, ...],
    dw: Tensor,
    threads: int,
) -> int: ...
def linear_cross_entropy_forward(
    operands: tuple[Tensor | None, ...],
    config: tuple[str | int | float, ...],
    loss: Tensor,
    m: Tensor | None,
    l: Tensor | None,
    gradients: tuple[Tensor | None, ...],
    threads: int,
) -> int: ...
def linear_cross_entropy_backward(
    dloss: Tensor,
    m: Tensor,
    l: Tensor,
    operands: tuple[Tensor | None, ...],
    config: tuple[str | int | float, ...],
    gradients: tuple[Tensor | None, ...],
    threads: int,
) -> int: ...
def lstm_forward(
    operands: tuple[Tensor | None, ...],
    reverse: bool,
    output: Tensor,
    h_n: Tensor,
    c_n: Tensor,
    saved: Tensor | None,
    threads: int,
) -> int: ...
def lstm_backward(
    doutput: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    saved: Tensor,
    operands: tuple[Tensor | None, ...],
    reverse: bool,
    gradients: tuple[Tensor | None, ...],
    threads: int,
) -> int: ...
def isa() -> str: ...
def compiled_isas() -> list[str]: ...
def available_isas() -> list[str]: ...
def compile_signature(parameters: Any) -> Callable[..., bool]: ...
def plain(*tensors: Tensor | None) -> int: ...
def attention_ready(operands: tuple[Tensor | None, ...], config: tuple[float | None, ...]) -> int: ...
def embedding_bag_ready(operands: tuple[Tensor | None, ...], config: tuple[str | int | float | None, ...]) -> int: ...
def empty_matrix(like: Tensor, rows: int, columns: int) -> Tensor: ...
def empty_rows(q: Tensor) -> Tensor: ...
