"""One layer of an LSTM in the terms of the dispatcher op, and what runs it.

The fields of the tuple stand in the order of the op's schema; csrc/bind_lstm-inl.h reads them by position.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from . import _C, reference
from ._checks import accumulation_dtype, check_lengths, check_lstm
from ._dispatch import CPU, REFERENCE, Backend, Op, TorchFunction, cpu_refusals, under_transforms


class LstmOperands(NamedTuple):
    """The op's tensor arguments, in the order of its schema."""

    input: Tensor  # [batch, seq, features]
    h0: Tensor | None  # [batch, hidden]
    c0: Tensor | None  # [batch, hidden]
    weight_ih: Tensor  # [4 hidden, features]
    weight_hh: Tensor  # [4 hidden, hidden]
    bias_ih: Tensor | None  # [4 hidden]
    bias_hh: Tensor | None  # [4 hidden]
    lengths: Tensor | None  # [batch]


class LstmConfig(NamedTuple):
    """The op's scalar arguments."""

    reverse: bool


States = tuple[Tensor, Tensor, Tensor]  # output, h_n, c_n
Cotangents = tuple[Tensor | None, Tensor | None, Tensor | None]  # of those; None is zeros
# Of input, h0, c0, weight_ih, weight_hh, and of either bias.
Gradients = tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor, Tensor | None]


def check(operands: LstmOperands) -> None:
    check_lstm(*operands)


def _steps_first(input: Tensor) -> bool:
    return input.stride(0) < input.stride(1)


def empty_states(operands: LstmOperands) -> States:
    """The output in input's order of batch and steps in memory, and the states."""
    input, hidden = operands.input, operands.weight_hh.shape[1]
    batch, seq, _ = input.shape
    if _steps_first(input):
        output = input.new_empty(seq, batch, hidden).transpose(0, 1)
    else:
        output = input.new_empty(batch, seq, hidden)
    return output, input.new_empty(batch, hidden), input.new_empty(batch, hidden)


SAVED_UNITS = 16  # csrc/lstm.h: kSavedUnits


def empty_saved(operands: LstmOperands) -> Tensor:
    """Room for the gates and the cell of every step; padding leaves the end of it unused."""
    batch, seq, _ = operands.input.shape
    units = (operands.weight_hh.shape[1] + SAVED_UNITS - 1) // SAVED_UNITS * SAVED_UNITS
    return operands.input.new_empty(batch * seq, 5 * units, dtype=accumulation_dtype(operands.input.dtype))


def empty_gradients(operands: LstmOperands) -> Gradients:
    input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, _ = operands
    bias = bias_hh if bias_ih is None else bias_ih
    return (
        torch.empty_like(input),
        None if h0 is None else torch.empty_like(h0),
        None if c0 is None else torch.empty_like(c0),
        torch.empty_like(weight_ih),
        torch.empty_like(weight_hh),
        None if bias is None else torch.empty_like(bias),
    )


class LstmKernels(Protocol):
    """`_dispatch.Kernels` of the LSTM."""

    backend: Backend
    memory: str

    def refusals(self, operands: LstmOperands, config: LstmConfig) -> Sequence[str]: ...

    def forward(self, operands: LstmOperands, config: LstmConfig, with_saved: bool) -> tuple[States, Tensor | None]:
        """What the function returns, and, if asked for, what the backward needs. Inference has no use for that."""
        ...

    def backward(
        self, cotangents: Cotangents, saved: Tensor, operands: LstmOperands, config: LstmConfig
    ) -> Gradients: ...


class CpuLstm:
    """The C++ kernels of csrc/."""

    backend = CPU
    memory = "O(valid steps * hidden) to train, O(hidden) to infer"

    def refusals(self, operands: LstmOperands, config: LstmConfig) -> Sequence[str]:
        transforms = ["kernels are not differentiable by torch.func or forward-mode AD"] if under_transforms() else []
        return (*cpu_refusals("input", operands.input), *transforms)

    def forward(self, operands: LstmOperands, config: LstmConfig, with_saved: bool) -> tuple[States, Tensor | None]:
        states, saved = empty_states(operands), empty_saved(operands) if with_saved else None
        bad_sample = _C.lstm_forward(
            _with_long_lengths(operands), config.reverse, *states, saved, torch.get_num_threads()
        )
        if bad_sample >= 0:
            _refuse_lengths(operands)
        return states, saved

    def backward(self, cotangents: Cotangents, saved: Tensor, operands: LstmOperands, config: LstmConfig) -> Gradients:
        gradients = empty_gradients(operands)
        bad_sample = _C.lstm_backward(
            *cotangents, saved, _with_long_lengths(operands), config.reverse, gradients, torch.get_num_threads()
        )
        if bad_sample >= 0:
            _refuse_lengths(operands)
        return gradients


def _with_long_lengths(operands: LstmOperands) -> LstmOperands:
    lengths = operands.lengths
    if lengths is None or lengths.dtype == torch.int64:
        return operands
    return operands._replace(lengths=lengths.long())


def _refuse_lengths(operands: LstmOperands) -> None:
    check_lengths(operands.lengths, operands.input.shape[1])


class ReferenceLstm:
    """The definition itself."""

    backend = REFERENCE
    memory = "O(batch * seq * hidden)"

    def refusals(self, operands: LstmOperands, config: LstmConfig) -> Sequence[str]:
        return ()

    def forward(self, operands: LstmOperands, config: LstmConfig, with_saved: bool) -> tuple[States, Tensor | None]:
        _refuse_lengths(operands)
        output, h_n, c_n = reference.lstm_forward(*operands, reverse=config.reverse)
        if _steps_first(operands.input):
            output = output.transpose(0, 1).contiguous().transpose(0, 1)
        return (output, h_n, c_n), empty_saved(operands).zero_() if with_saved else None

    def backward(self, cotangents: Cotangents, saved: Tensor, operands: LstmOperands, config: LstmConfig) -> Gradients:
        return backward_composite(cotangents, operands, config)


def backward_composite(cotangents: Cotangents, operands: LstmOperands, config: LstmConfig) -> Gradients:
    """The backward by its definition, which can be differentiated itself."""
    zeros = (torch.zeros_like(x) for x in empty_states(operands))
    doutput, dh_n, dc_n = (z if x is None else x for x, z in zip(cotangents, zeros, strict=True))
    *gradients, dbias_ih, dbias_hh = reference.lstm_backward(doutput, dh_n, dc_n, *operands, reverse=config.reverse)
    return (*gradients, dbias_hh if dbias_ih is None else dbias_ih)  # type: ignore[return-value]


# ---- torch's own -----------------------------------------------------------------------------------------------------


class Layers(NamedTuple):
    """What torch's own function is told of a stack of layers."""

    num_layers: int = 1
    dropout: float = 0.0
    training: bool = False
    bidirectional: bool = False


# torch.nn.LSTM's without the Python around it; its two forms differ in what follows the input.
call_torch: Callable[..., States] = torch._VF.lstm


def torch_layers(
    input: Tensor,
    hx: tuple[Tensor, Tensor],
    weights: Sequence[Tensor],
    has_biases: bool,
    lengths: Tensor | None,
    layers: Layers = Layers(),  # noqa: B008 (immutable)
) -> States:
    """torch's own function on input [batch, seq, features]; with lengths, on packed sequences."""
    parameters, options = list(weights), (has_biases, *layers)
    if lengths is None:
        return call_torch(input, hx, parameters, *options, True)
    check_lengths(lengths, input.shape[1])
    # Packing takes no empty sample: it runs a step, which is then not looked at.
    packed = pack_padded_sequence(input, lengths.clamp(min=1).cpu(), batch_first=True, enforce_sorted=False)
    order, inverse = packed.sorted_indices, packed.unsorted_indices
    assert order is not None and inverse is not None
    sorted_hx = tuple(x.index_select(1, order) for x in hx)
    data, *states = call_torch(packed.data, packed.batch_sizes, sorted_hx, parameters, *options)
    output, _ = pad_packed_sequence(packed._replace(data=data), batch_first=True, total_length=input.shape[1])
    empty = (lengths == 0).unsqueeze(-1)
    h_n, c_n = (torch.where(empty, x0, x.index_select(1, inverse)) for x, x0 in zip(states, hx, strict=True))
    return torch.where(empty.unsqueeze(-1), 0.0, output), h_n, c_n


def torch_lstm(operands: LstmOperands, config: LstmConfig) -> States:
    """torch's own function for one layer."""
    check(operands)
    input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, lengths = operands
    shape = (1, input.shape[0], weight_hh.shape[1])
    hx = tuple(input.new_zeros(shape) if x is None else x.unsqueeze(0) for x in (h0, c0))
    weights = [weight_ih, weight_hh]
    if bias_ih is not None or bias_hh is not None:
        weights += [torch.zeros_like(weight_hh[:, 0]) if x is None else x for x in (bias_ih, bias_hh)]
    if config.reverse:
        input = _flip_steps(input, lengths)
    output, h_n, c_n = torch_layers(input, (hx[0], hx[1]), weights, len(weights) > 2, lengths)
    return _flip_steps(output, lengths) if config.reverse else output, h_n.squeeze(0), c_n.squeeze(0)


def _flip_steps(x: Tensor, lengths: Tensor | None) -> Tensor:
    """Each sample's valid steps in reverse order; padding stays."""
    if lengths is None:
        return x.flip(1)
    step, last = torch.arange(x.shape[1], device=x.device), lengths.long().unsqueeze(-1) - 1
    source = torch.where(step <= last, last - step, step)
    return x.gather(1, source.unsqueeze(-1).expand_as(x))


def _torch_preferred(operands: LstmOperands, config: LstmConfig) -> str | None:
    if operands.input.is_cuda:
        return "on CUDA torch's own, cuDNN, is the better one; with lengths on packed sequences"
    return None


def forward_with_saved(operands: LstmOperands, config: LstmConfig) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    states, saved = LSTM.choose(operands, config).forward(operands, config, with_saved=True)
    assert saved is not None
    return *states, saved


LSTM: Op[LstmKernels] = Op(
    "lstm", (CpuLstm(), ReferenceLstm()), TorchFunction("O(batch * seq * hidden)", _torch_preferred)
)
