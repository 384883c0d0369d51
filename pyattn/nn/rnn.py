"""Recurrent layers as modules."""

from typing import overload

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from .._checks import ShapeError, shape_text
from .._lstm import LSTM as LSTM_OP
from .._lstm import Layers, LstmConfig, LstmOperands, torch_layers
from ..rnn import lstm

State = tuple[Tensor, Tensor]


class LSTM(nn.RNNBase):
    """`torch.nn.LSTM` on `pyattn.lstm`, with the lengths of the sequences: torch's constructor, weights and state_dict.

    ``forward(input, hx=None, *, lengths=None)`` returns ``output, (h_n, c_n)`` as torch's does, whose shapes it takes:
    input ``(seq, batch, features)``, or ``(batch, seq, features)`` with `batch_first`, or ``(seq, features)``. With
    `lengths`, a number of steps for each sample, or with a PackedSequence, padding costs no time: the output is 0 there
    and h_n, c_n are those of the last valid step of each sample, backward directions start at it, and a length of 0
    gives the initial state. It traces under ``torch.compile(fullgraph=True)``. (Not a subclass of torch.nn.LSTM, which
    torch.compile refuses by its class.)

    `proj_size` raises NotImplementedError: no kernel computes the projection.

    >>> layer = LSTM(64, 128, num_layers=2, bidirectional=True, batch_first=True)
    >>> output, (h_n, c_n) = layer(torch.randn(8, 100, 64), lengths=torch.arange(10, 90, 10))
    >>> output.shape, h_n.shape
    (torch.Size([8, 100, 256]), torch.Size([4, 8, 128]))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if proj_size:
            raise NotImplementedError(
                f"proj_size: no kernel of pyattn computes the projection, got {proj_size}; torch.nn.LSTM does"
            )
        super().__init__(
            "LSTM",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            device=device,
            dtype=dtype,
        )

    @overload
    def forward(
        self, input: Tensor, hx: State | None = None, *, lengths: Tensor | None = None
    ) -> tuple[Tensor, State]: ...
    @overload
    def forward(self, input: PackedSequence, hx: State | None = None) -> tuple[PackedSequence, State]: ...
    def forward(
        self, input: Tensor | PackedSequence, hx: State | None = None, *, lengths: Tensor | None = None
    ) -> tuple[Tensor | PackedSequence, State]:
        if isinstance(input, PackedSequence):
            if lengths is not None:
                raise ValueError("lengths: a PackedSequence has its own, expected None")
            return self._packed(input, hx)
        self._check(input, hx)
        if input.dim() == 2:
            if lengths is not None:
                raise ValueError("lengths: an input without a batch axis is one whole sample, expected None")
            output, state = self._batched(
                input.unsqueeze(0), None if hx is None else (hx[0].unsqueeze(1), hx[1].unsqueeze(1)), None
            )
            return output.squeeze(0), (state[0].squeeze(1), state[1].squeeze(1))
        if self.batch_first:
            return self._batched(input, hx, lengths)
        output, state = self._batched(input.transpose(0, 1), hx, lengths)
        return output.transpose(0, 1), state

    def _check(self, input: Tensor, hx: State | None) -> None:
        axes = "(batch, seq, features)" if self.batch_first else "(seq, batch, features)"
        if input.dim() not in (2, 3) or input.shape[-1] != self.input_size:
            raise ShapeError(
                f"input: expected shape {axes}, or (seq, features), with input_size={self.input_size} features, got "
                f"{shape_text(input)}"
            )
        directions = 2 if self.bidirectional else 1
        batch = () if input.dim() == 2 else (input.shape[0 if self.batch_first else 1],)
        expected = (self.num_layers * directions, *batch, self.hidden_size)
        for name, state in zip(("h_0", "c_0"), hx or (), strict=False):
            if state.shape != expected:
                raise ShapeError(f"{name}: expected shape {expected}, got {shape_text(state)}")

    def _packed(self, input: PackedSequence, hx: State | None) -> tuple[PackedSequence, State]:
        data, batch_sizes, order, inverse = input
        # In the order of the data, by falling length; the state alone is in the caller's order.
        padded, lengths = pad_packed_sequence(PackedSequence(data, batch_sizes), batch_first=True)
        if order is not None and hx is not None:
            hx = (hx[0].index_select(1, order), hx[1].index_select(1, order))
        output, state = self._batched(padded, hx, lengths.to(data.device))
        packed = pack_padded_sequence(output, lengths, batch_first=True)
        if inverse is not None:
            state = (state[0].index_select(1, inverse), state[1].index_select(1, inverse))
        return PackedSequence(packed.data, batch_sizes, order, inverse), state

    def _batched(self, x: Tensor, hx: State | None, lengths: Tensor | None) -> tuple[Tensor, State]:
        """All layers, on x [batch, seq, features]."""
        if self._prefers_torch(x, lengths):
            shape = (len(self.all_weights), x.shape[0], self.hidden_size)
            hx = (x.new_zeros(shape), x.new_zeros(shape)) if hx is None else hx
            weights = [w for group in self.all_weights for w in group]  # as flatten_parameters() has them in memory
            layers = Layers(self.num_layers, self.dropout, self.training, self.bidirectional)
            output, h_n, c_n = torch_layers(x, hx, weights, self.bias, lengths, layers)
            return output, (h_n, c_n)
        states: list[State] = []
        for layer in range(self.num_layers):
            outputs = []
            for direction in range(2 if self.bidirectional else 1):
                h0, c0 = (None, None) if hx is None else (hx[0][len(states)], hx[1][len(states)])
                weights = self.all_weights[len(states)]
                output, *state = lstm(x, *weights, h0=h0, c0=c0, lengths=lengths, reverse=direction == 1)
                outputs.append(output)
                states.append((state[0], state[1]))
            x = outputs[0] if len(outputs) == 1 else self._join(outputs)
            if layer < self.num_layers - 1:
                x = nn.functional.dropout(x, self.dropout, self.training)
        return x, (torch.stack([h for h, _ in states]), torch.stack([c for _, c in states]))

    def _join(self, outputs: list[Tensor]) -> Tensor:
        """Of both directions, in the order of batch and steps in memory that each has."""
        if self.batch_first:
            return torch.cat(outputs, dim=-1)
        return torch.cat([x.transpose(0, 1) for x in outputs], dim=-1).transpose(0, 1)

    def _prefers_torch(self, x: Tensor, lengths: Tensor | None) -> bool:
        """As for one layer, but torch then runs all of them in one call."""
        if torch.compiler.is_compiling():
            return False
        weight_ih, weight_hh = self.all_weights[0][:2]
        operands = LstmOperands(x, None, None, weight_ih, weight_hh, None, None, lengths)
        return LSTM_OP.prefers_torch(operands, LstmConfig(reverse=False))
