"""One call of the LSTM with its backward, as a value that tests draw, run and judge."""

from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

import pyattn
from pyattn import reference


class Results(NamedTuple):
    output: Tensor
    h_n: Tensor
    c_n: Tensor
    dinput: Tensor
    dh0: Tensor | None
    dc0: Tensor | None
    dweight_ih: Tensor
    dweight_hh: Tensor
    dbias_ih: Tensor | None
    dbias_hh: Tensor | None


PER_SAMPLE = ("output", "h_n", "c_n", "dinput", "dh0", "dc0")


@dataclass(frozen=True, repr=False)
class LstmProblem:
    """Operands in the order of the op, the direction, and the gradients of the results."""

    input: Tensor
    h0: Tensor | None
    c0: Tensor | None
    weight_ih: Tensor
    weight_hh: Tensor
    bias_ih: Tensor | None
    bias_hh: Tensor | None
    lengths: Tensor | None
    doutput: Tensor
    dh_n: Tensor
    dc_n: Tensor
    reverse: bool = False

    def __repr__(self) -> str:
        lines = []
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor) and field.name != "lengths":
                dtype = str(value.dtype).removeprefix("torch.")
                value = f"{dtype} {tuple(value.shape)}, strides {value.stride()}, offset {value.storage_offset()}"
            lines.append(f"  {field.name}: {value}")
        return "\n".join(("LstmProblem(", *lines, ")"))

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """Hypothesis would print a dataclass with all the numbers in its tensors."""
        printer.text(repr(self))

    @property
    def floating(self) -> tuple[Tensor | None, ...]:
        """The operands that have gradients."""
        return (self.input, self.h0, self.c0, self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)

    @property
    def cotangents(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.doutput, self.dh_n, self.dc_n

    def valid(self) -> Tensor:
        """Which steps there are: bool [batch, seq, 1]."""
        batch, seq, _ = self.input.shape
        lengths = torch.full((batch,), seq) if self.lengths is None else self.lengths
        return (torch.arange(seq) < lengths.unsqueeze(-1)).unsqueeze(-1)

    def map(self, function: Any) -> "LstmProblem":
        """`function` of every floating tensor that is there."""
        names = [f.name for f in fields(self) if f.name not in ("lengths", "reverse")]
        tensors = {name: getattr(self, name) for name in names}
        return replace(self, **{name: None if x is None else function(x) for name, x in tensors.items()})


def make(
    batch: int = 5,
    seq: int = 7,
    features: int = 13,
    hidden: int = 11,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    sharpness: float = 1.0,
    state: bool = True,
    biases: tuple[bool, bool] = (True, True),
    lengths: str | None = "random",
    reverse: bool = False,
) -> LstmProblem:
    """Standard normal inputs, and weights that give the gates a deviation of about `sharpness`."""
    generator = torch.Generator().manual_seed(seed)

    def values(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(dtype)

    gates = 4 * hidden
    drawn = {
        None: None,
        "random": torch.randint(0, seq + 1, (batch,), generator=generator),
        "empty": torch.zeros(batch, dtype=torch.int64),
        "full": torch.full((batch,), seq),
    }
    return LstmProblem(
        input=values(batch, seq, features),
        h0=values(batch, hidden) if state else None,
        c0=values(batch, hidden) if state else None,
        weight_ih=values(gates, features, scale=sharpness / max(features, 1) ** 0.5),
        weight_hh=values(gates, hidden, scale=sharpness / hidden**0.5),
        bias_ih=values(gates) if biases[0] else None,
        bias_hh=values(gates) if biases[1] else None,
        lengths=drawn[lengths],
        doutput=values(batch, seq, hidden),
        dh_n=values(batch, hidden),
        dc_n=values(batch, hidden),
        reverse=reverse,
    )


def call(problem: LstmProblem, operands: tuple[Tensor | None, ...]) -> tuple[Tensor, Tensor, Tensor]:
    input, h0, c0, *weights = operands
    return pyattn.lstm(input, *weights, h0=h0, c0=c0, lengths=problem.lengths, reverse=problem.reverse)


def run(problem: LstmProblem) -> Results:
    """What pyattn gives."""
    leaves = tuple(None if x is None else x.detach().requires_grad_() for x in problem.floating)
    return _with_gradients(call(problem, leaves), leaves, problem.cotangents)


def _with_gradients(
    outputs: tuple[Tensor, ...], leaves: tuple[Tensor | None, ...], cotangents: tuple[Tensor, ...]
) -> Results:
    present = [x for x in leaves if x is not None]
    gradients = iter(torch.autograd.grad(outputs, present, cotangents, allow_unused=True, materialize_grads=True))
    return Results(*(x.detach() for x in outputs), *(None if x is None else next(gradients) for x in leaves))


def truth(problem: LstmProblem) -> Results:
    """The definition, in float64."""
    exact = problem.map(lambda x: x.detach().double())
    operands = (*exact.floating, exact.lengths)
    states = reference.lstm_forward(*operands, reverse=problem.reverse)
    return Results(*states, *reference.lstm_backward(*exact.cotangents, *operands, reverse=problem.reverse))


def yardstick(problem: LstmProblem) -> Results:
    """The loop as one writes it in eager mode, in the problem's dtype: x and h side by side in one product."""
    leaves = tuple(None if x is None else x.detach().requires_grad_() for x in problem.floating)
    input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh = leaves
    zeros = input.new_zeros(input.shape[0], weight_hh.shape[1])
    h, c = (zeros if x is None else x for x in (h0, c0))
    weight = torch.cat([weight_hh, weight_ih], dim=1)
    valid = problem.valid()
    x = torch.where(valid, input, 0.0)
    seq = input.shape[1]
    outputs = [zeros] * seq
    for t in reversed(range(seq)) if problem.reverse else range(seq):
        gates = torch.cat([h, x[:, t]], dim=1) @ weight.mT
        for bias in (bias_hh, bias_ih):
            gates = gates if bias is None else gates + bias
        i, f, g, o = gates.chunk(4, dim=1)
        next_c = torch.sigmoid(i) * torch.tanh(g) + torch.sigmoid(f) * c
        next_h = torch.tanh(next_c) * torch.sigmoid(o)
        h, c = torch.where(valid[:, t], next_h, h), torch.where(valid[:, t], next_c, c)
        outputs[t] = torch.where(valid[:, t], next_h, 0.0)
    output = torch.stack(outputs, dim=1) if seq else input.new_zeros(problem.doutput.shape)
    nothing = 0.0 * weight.sum()  # each has a graph, even without a step and a state
    return _with_gradients((output + nothing, h + nothing, c + nothing), leaves, problem.cotangents)


def magnitude(problem: LstmProblem) -> Results:
    """The same sums with every term made positive, in float64: what rounding the terms can disturb.

    The absolute error of a gate before its activation is a relative error of the activation's derivative.
    """
    p = problem.map(lambda x: x.detach().double())
    batch, seq, _ = p.input.shape
    x, valid = torch.where(p.valid(), p.input, 0.0), p.valid()
    zeros = x.new_zeros(batch, p.weight_hh.shape[1])
    bias = sum(b.abs() for b in (p.bias_ih, p.bias_hh) if b is not None)
    before = {}
    h, c = (zeros if s is None else s for s in (p.h0, p.c0))
    size = zeros
    order = list(reversed(range(seq)) if p.reverse else range(seq))
    for t in order:
        gates = x[:, t] @ p.weight_ih.T + h @ p.weight_hh.T + sum(b for b in (p.bias_ih, p.bias_hh) if b is not None)
        terms = x[:, t].abs() @ p.weight_ih.abs().T + h.abs() @ p.weight_hh.abs().T + bias
        i, f, g, o = gates.chunk(4, dim=1)
        i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
        before[t] = h, c, (i, f, g, o), 1.0 + terms
        next_c = f * c + i * g
        h, c = torch.where(valid[:, t], o * next_c.tanh(), h), torch.where(valid[:, t], next_c, c)
        size = torch.maximum(size, torch.where(valid[:, t], terms.unflatten(1, (4, -1)).amax(1), 0.0))

    dh, dc = p.dh_n.abs(), p.dc_n.abs()
    dx = torch.zeros_like(x)
    dweight_ih, dweight_hh = torch.zeros_like(p.weight_ih), torch.zeros_like(p.weight_hh)
    dbias = x.new_zeros(p.weight_ih.shape[0])
    for t in reversed(order):
        h_before, c_before, (i, f, g, o), terms = before[t]
        tanh_c = (f * c_before + i * g).tanh()
        through = dh + p.doutput[:, t].abs()
        d = dc + through * o * (1 - tanh_c * tanh_c)
        gates = torch.cat(
            [
                d * g.abs() * i * (1 - i),
                d * c_before.abs() * f * (1 - f),
                d * i * (1 - g * g),
                through * tanh_c.abs() * o * (1 - o),
            ],
            dim=1,
        )
        gates = torch.where(valid[:, t], gates * terms, 0.0)
        dx[:, t] = gates @ p.weight_ih.abs()
        dweight_ih += gates.T @ x[:, t].abs()
        dweight_hh += gates.T @ h_before.abs()
        dbias += gates.sum(0)
        dh = torch.where(valid[:, t], gates @ p.weight_hh.abs(), dh)
        dc = torch.where(valid[:, t], d * f, dc)
    one = 1.0 + size
    return Results(
        output=one.unsqueeze(1).expand_as(p.doutput),
        h_n=one,
        c_n=one * (1.0 + c.abs()),
        dinput=dx,
        dh0=None if p.h0 is None else dh,
        dc0=None if p.c0 is None else dc,
        dweight_ih=dweight_ih,
        dweight_hh=dweight_hh,
        dbias_ih=None if p.bias_ih is None else dbias,
        dbias_hh=None if p.bias_hh is None else dbias,
    )
