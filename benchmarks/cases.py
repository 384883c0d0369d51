"""What is measured: for each op its inputs, the routes a user can take to the result, the truth, and the work in it.

A case is one point of the grid. The other files know cases only by the `Case` protocol, so an op joins the benchmarks
by a class of that form and a line in `SUITES`.

The work is what the definition asks for, not what an implementation does: only the (query, key) pairs that the mask
lets see each other count, and every route is charged the same. A route that computes hidden scores to throw them away
shows a lower rate.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from timing import Variant
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import pyattn
import pyattn.reference

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
MASKS = ("full", "causal", "padding")
DIRECTIONS = FORWARD, TRAINING = ("forward", "forward+backward")

# The key of our own among a case's routes.
PYATTN = "pyattn"

SDPA_BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}

Shape = tuple[int, ...]


class Route(NamedTuple):
    """One way to the result: called with the inputs, inside its context."""

    call: Callable[..., Tensor]
    context: Callable[[], AbstractContextManager[object]] = nullcontext


class Case(Protocol):
    """What the benchmark asks of a point of the grid. Names of dtype and mask are keys of `DTYPES` and `MASKS`."""

    op: str
    dtype: str
    mask: str
    shape: Shape
    directions: tuple[str, ...]  # it is measured in
    results: tuple[str, ...]  # names of what `truth` returns: the output, then, for training, each input's gradient
    yardstick: str  # the route whose error bounds ours

    def inputs(self, seed: int, device: str) -> tuple[list[Tensor], Tensor]:
        """The inputs and the gradient of the output, in the case's dtype."""

    def truth(self, inputs: Sequence[Tensor], grad_out: Tensor) -> list[Tensor]:
        """The results in float64."""

    def routes(self, device: str) -> dict[str, Route]: ...
    def flops(self, direction: str) -> int: ...
    def bytes(self, direction: str) -> int: ...

    def smallest(self) -> "Case":
        """The same problem at a size that costs nothing: it loads the code of a call without its memory."""


def variants(case: Case, routes: Mapping[str, Route], direction: str, device: str) -> dict[str, Variant]:
    """The calls to be timed: inference, or forward and backward through autograd, as a user calls them. All share one
    set of tensors: even where a tensor lies in memory can change a time by more than two routes differ."""
    inputs, grad_out = case.inputs(seed=0, device=device)
    if direction == FORWARD:
        return {name: Variant(partial(r.call, *inputs), partial(_inference, r)) for name, r in routes.items()}
    leaves = [x.requires_grad_() for x in inputs]
    return {name: Variant(partial(_training, r, leaves, grad_out), r.context) for name, r in routes.items()}


def _training(route: Route, leaves: Sequence[Tensor], grad_out: Tensor) -> None:
    for leaf in leaves:
        leaf.grad = None
    route.call(*leaves).backward(grad_out)


@contextmanager
def _inference(route: Route) -> Iterator[None]:
    with torch.inference_mode(), route.context():
        yield


@dataclass(frozen=True)
class Attention:
    """Attention on contiguous tensors: no mask, causal, or half of the keys padding (a bool mask).

    The padding is ragged: sample b of B has round(S (2b + 1) / 2B) real tokens, so from sample to sample the lengths
    rise evenly and their mean is S / 2. Padded queries are computed like any other, as every route does.
    """

    dtype: str
    mask: str
    shape: Shape  # (B, H, S, D), or (B, H, L, S, D) with fewer queries than keys
    directions: tuple[str, ...] = DIRECTIONS
    op: str = "attention"
    yardstick: str = "sdpa"

    @property
    def results(self) -> tuple[str, ...]:
        return ("out", "dq", "dk", "dv") if TRAINING in self.directions else ("out",)

    def inputs(self, seed: int, device: str) -> tuple[list[Tensor], Tensor]:
        # Drawn on the CPU, so that every device gets the same numbers.
        generator = torch.Generator().manual_seed(seed)
        batch, heads, queries, keys, head_dim = self._sizes
        q, k, v, grad_out = (
            torch.randn(batch, heads, length, head_dim, generator=generator).to(device, DTYPES[self.dtype])
            for length in (queries, keys, keys, queries)
        )
        return [q, k, v], grad_out

    def truth(self, inputs: Sequence[Tensor], grad_out: Tensor) -> list[Tensor]:
        q, k, v, do = (x.double() for x in (*inputs, grad_out))
        problem = {"mask": self._padding(q.device.type), "scale": self._scale, "causal": self.mask == "causal"}
        out, _ = pyattn.reference.attention_forward(q, k, v, **problem)
        dq, dk, dv, _ = pyattn.reference.attention_backward(do, None, q, k, v, **problem)
        return [out, dq, dk, dv][: len(self.results)]

    def routes(self, device: str) -> dict[str, Route]:
        """pyattn; torch's SDPA as it chooses for itself and, on a GPU, with each backend forced; and the formula."""
        padding, causal = self._padding(device), self.mask == "causal"
        sdpa = partial(F.scaled_dot_product_attention, attn_mask=padding, is_causal=causal)
        forced = SDPA_BACKENDS if device == "cuda" else {}
        return {
            PYATTN: Route(partial(pyattn.attention, mask=pyattn.Causal() if causal else padding)),
            self.yardstick: Route(sdpa),
            **{name: Route(sdpa, partial(sdpa_kernel, backend)) for name, backend in forced.items()},
            "formula": Route(partial(_formula, scale=self._scale, bias=self._bias(device))),
        }

    def flops(self, direction: str) -> int:
        """Per head and visible pair: q.k and the pair's part of P V, each D multiply-adds, make 4 D in the forward.
        The backward's five products (the scores again, dP, dV, dQ, dK) make 10 D. The softmax is left out, as usual.
        """
        heads, head_dim = self.shape[1], self.shape[-1]
        return (4 if direction == FORWARD else 14) * heads * head_dim * self.visible_pairs

    def bytes(self, direction: str) -> int:
        """What has to cross memory once: q, k, v and out; backward too, q, k, v, out, do and dq, dk, dv (8 more) and
        the log-sum-exp in fp32, written and read. It is reached when everything else stays in cache."""
        batch, heads, queries, keys, head_dim = self._sizes
        tensors = batch * heads * (queries + keys) * head_dim * DTYPES[self.dtype].itemsize  # q and k, v and out, ...
        lse = batch * heads * queries * torch.float32.itemsize
        return 2 * tensors if direction == FORWARD else 6 * tensors + 2 * lse

    def smallest(self) -> "Attention":
        return replace(self, shape=(1, 1, 2, self.shape[-1]))

    @property
    def visible_pairs(self) -> int:
        """(query, key) pairs of one head that see each other, summed over the batch: L S per sample; causal, the
        triangle with its diagonal (query i sees the keys up to i); padding, every query with each real token."""
        batch, _, queries, keys, _ = self._sizes
        if self.mask == "causal":
            return batch * queries * (queries + 1) // 2
        return queries * sum(self._lengths if self.mask == "padding" else [keys] * batch)

    @property
    def _sizes(self) -> tuple[int, int, int, int, int]:
        batch, heads, *lengths, head_dim = self.shape
        return batch, heads, lengths[0], lengths[-1], head_dim

    @property
    def _scale(self) -> float:
        return 1 / math.sqrt(self.shape[-1])

    @property
    def _lengths(self) -> list[int]:
        return _rising_lengths(self.shape[0], self.shape[-2])

    def _padding(self, device: str) -> Tensor | None:
        """bool [B, 1, 1, S], True = attend."""
        if self.mask != "padding":
            return None
        lengths = torch.tensor(self._lengths, device=device).view(-1, 1, 1, 1)
        return torch.arange(self.shape[-2], device=device) < lengths

    def _bias(self, device: str) -> Tensor | None:
        """The mask as the formula takes it fastest, 0 or -inf to be added: measured beside masked_fill, whose backward
        costs another pass (EPYC Zen 3, fp32 (1,12,512,64), forward + backward: 56 against 70 ms)."""
        visible = self._padding(device)
        if self.mask == "causal":
            _, _, queries, keys, _ = self._sizes
            visible = torch.ones(queries, keys, dtype=torch.bool, device=device).tril()
        if visible is None:
            return None
        return torch.zeros(visible.shape, device=device, dtype=DTYPES[self.dtype]).masked_fill(~visible, -math.inf)


def _rising_lengths(batch: int, length: int) -> list[int]:
    return [max(1, round(length * (2 * b + 1) / (2 * batch))) for b in range(batch)]


def _formula(q: Tensor, k: Tensor, v: Tensor, *, scale: float, bias: Tensor | None) -> Tensor:
    """Attention as one writes it in eager mode, with the two savings that cost nothing: q is scaled instead of the
    longer scores, and the mask is added in place."""
    scores = (q * scale) @ k.mT
    if bias is not None:
        scores += bias
    return scores.softmax(-1) @ v


# 12 heads of 64 are BERT-base and its kin, from a short sentence to a full context; 77 is CLIP's text and 197 a vision
# transformer's 14 x 14 patches with its class token, both primes to every tile; (1,16,257,80) is ViT-H's head_dim. One
# query is a step of decoding.
SHAPES: tuple[Shape, ...] = (
    (1, 12, 16, 64),
    (1, 12, 32, 64),
    (1, 12, 77, 64),
    (1, 12, 128, 64),
    (8, 12, 128, 64),
    (2, 3, 197, 64),
    (1, 16, 257, 80),
    (1, 12, 512, 64),
    (4, 12, 512, 64),
    (1, 4, 1024, 64),
    (1, 1, 4096, 64),
    (1, 8, 1024, 32),
    (1, 4, 1024, 128),
    (1, 2, 1024, 256),
    (1, 12, 1, 1024, 64),
    (8, 12, 1, 512, 64),
)
DECODING = 5  # numbers in such a shape
TINY: Shape = (1, 1, 1, 8)  # its time is the cost of a call

# float64 serves gradient checks rather than models: two points show that it is no afterthought.
GRID = {"fp32": SHAPES, "bf16": SHAPES, "fp16": SHAPES, "fp64": ((1, 12, 128, 64), (1, 12, 512, 64))}

# Without bf16 instructions torch takes half a second for one backward at S = 512, so the minute allows it in fp32 only.
QUICK_SHAPES: tuple[Shape, ...] = ((1, 12, 32, 64), (1, 12, 128, 64), (1, 12, 1, 1024, 64))
QUICK_GRID = {"fp32": (*QUICK_SHAPES, (2, 3, 197, 64), (1, 12, 512, 64)), "bf16": QUICK_SHAPES, "fp16": QUICK_SHAPES}


def attention_suite(
    shapes: Sequence[Shape] | None, dtypes: Sequence[str] | None, masks: Sequence[str] | None, quick: bool
) -> list[Case]:
    """The grid, or the part of it that is asked for; shapes asked for need not be on it."""
    grid = QUICK_GRID if quick else GRID
    cases = [
        # Decoding does not train; and its single query sees all keys, where one of a causal mask sees the first.
        Attention(dtype, mask, shape, DIRECTIONS if shapes or len(shape) != DECODING else (FORWARD,))
        for dtype in dtypes or grid
        for mask in masks or MASKS
        for shape in shapes or grid.get(dtype, ())
        if shapes or len(shape) != DECODING or mask != "causal"
    ]
    tiny = [] if shapes else [Attention(dtype, "full", TINY) for dtype in dtypes or ["fp32"]]
    return [*cases, *tiny]


@dataclass(frozen=True)
class CrossEntropy:
    """The mean loss of class indices; with padding, every seventh row is ignored."""

    dtype: str
    mask: str
    shape: Shape  # (rows, classes)
    directions: tuple[str, ...] = DIRECTIONS
    op: str = "cross_entropy"
    results: tuple[str, ...] = ("loss", "dinput")
    yardstick: str = "torch"

    def inputs(self, seed: int, device: str) -> tuple[list[Tensor], Tensor]:
        generator = torch.Generator().manual_seed(seed)
        logits = torch.randn(self.shape, generator=generator).to(device, DTYPES[self.dtype])
        return [logits], torch.ones((), device=device, dtype=logits.dtype)

    def truth(self, inputs: Sequence[Tensor], grad_out: Tensor) -> list[Tensor]:
        logits, target = inputs[0].double(), self._target(inputs[0].device.type)
        loss, _, _ = pyattn.reference.cross_entropy_forward(logits, target)
        return [loss, pyattn.reference.cross_entropy_backward(grad_out.double(), logits, target)]

    def routes(self, device: str) -> dict[str, Route]:
        target = self._target(device)
        return {
            PYATTN: Route(partial(pyattn.cross_entropy, target=target)),
            self.yardstick: Route(partial(F.cross_entropy, target=target)),
        }

    def flops(self, direction: str) -> int:
        """Per logit: e^(x - m) and its part of the sum, an exponential counted as one; backward, e^(x - m) and its
        factor. Rows that are ignored are not asked for."""
        return (3 if direction == FORWARD else 6) * self.shape[1] * self._counted_rows

    def bytes(self, direction: str) -> int:
        """The logits, read; backward too, read again, and their gradient, which ignored rows have as well."""
        row = self.shape[1] * DTYPES[self.dtype].itemsize
        return row * (self._counted_rows if direction == FORWARD else 2 * self._counted_rows + self.shape[0])

    def smallest(self) -> "CrossEntropy":
        return replace(self, shape=(2, self.shape[1]))

    @property
    def _counted_rows(self) -> int:
        rows = self.shape[0]
        return rows - math.ceil(rows / 7) if self.mask == "padding" else rows

    def _target(self, device: str) -> Tensor:
        target = torch.randint(self.shape[1], self.shape[:1], generator=torch.Generator().manual_seed(0))
        if self.mask == "padding":
            target[::7] = -100
        return target.to(device)


@dataclass(frozen=True)
class LinearCrossEntropy:
    """The same of the logits of a linear layer. The losses of sequences are of such logits, and memory is the point."""

    dtype: str
    mask: str
    shape: Shape  # (rows, features, classes)
    directions: tuple[str, ...] = DIRECTIONS
    op: str = "linear_cross_entropy"
    results: tuple[str, ...] = ("loss", "dinput", "dlinear_weight")
    yardstick: str = "torch"

    def inputs(self, seed: int, device: str) -> tuple[list[Tensor], Tensor]:
        """Logits have a deviation of 1."""
        rows, features, classes = self.shape
        generator = torch.Generator().manual_seed(seed)
        input, weight = (
            torch.randn(shape, generator=generator).to(device, DTYPES[self.dtype])
            for shape in ((rows, features), (classes, features))
        )
        return [input / math.sqrt(features), weight], torch.ones((), device=device, dtype=input.dtype)

    def truth(self, inputs: Sequence[Tensor], grad_out: Tensor) -> list[Tensor]:
        problem = *(x.double() for x in inputs), self._loss._target(inputs[0].device.type)
        loss, _, _ = pyattn.reference.linear_cross_entropy_forward(*problem)
        gradients = pyattn.reference.linear_cross_entropy_backward(grad_out.double(), *problem)
        return [loss, *gradients[:2]]

    def routes(self, device: str) -> dict[str, Route]:
        """pyattn; torch's linear and cross_entropy, and, where this torch has it, its own function in chunks."""
        target = self._loss._target(device)
        routes = {
            PYATTN: Route(partial(pyattn.linear_cross_entropy, target=target)),
            self.yardstick: Route(lambda input, weight: F.cross_entropy(F.linear(input, weight), target)),
        }
        if hasattr(torch.nn, "LinearCrossEntropyOptions"):
            options = torch.nn.LinearCrossEntropyOptions()
            routes["chunked"] = Route(partial(F.linear_cross_entropy, target=target, options=options))
        return routes

    def flops(self, direction: str) -> int:
        """A multiply-add per logit and feature; for training three. Cross-entropy's own, and what is ignored, are left
        out."""
        return (2 if direction == FORWARD else 6) * self.shape[1] * self.shape[2] * self._loss._counted_rows

    def bytes(self, direction: str) -> int:
        """Input and weight, read; their gradients, written."""
        rows, features, classes = self.shape
        return (1 if direction == FORWARD else 2) * (rows + classes) * features * DTYPES[self.dtype].itemsize

    def smallest(self) -> "LinearCrossEntropy":
        """Of few features and classes too, by which the scratch that stays with a thread is measured."""
        return replace(self, shape=(2, 2, 2))

    @property
    def _loss(self) -> CrossEntropy:
        rows, _, classes = self.shape
        return CrossEntropy(self.dtype, self.mask, (rows, classes))


# A binary and a large classifier, and BERT's vocabulary with a batch of tokens. The first two are torch's own call.
LOSS_SHAPES: tuple[Shape, ...] = ((32, 2), (256, 2), (2048, 1000), (512, 30522), (2048, 30522))

# The same with linear layers of BERT's kin before them.
LINEAR_LOSS_SHAPES: tuple[Shape, ...] = ((32, 128, 2), (256, 256, 1000), (512, 256, 8192), (2048, 768, 30522))


def losses_suite(
    shapes: Sequence[Shape] | None, dtypes: Sequence[str] | None, masks: Sequence[str] | None, quick: bool
) -> list[Case]:
    """Shapes of two numbers are cross-entropy's, of three also have a linear layer's features."""
    grid = (*LOSS_SHAPES[:3], *LINEAR_LOSS_SHAPES[:3]) if quick else (*LOSS_SHAPES, *LINEAR_LOSS_SHAPES)
    return [
        CrossEntropy(dtype, mask, shape) if len(shape) == 2 else LinearCrossEntropy(dtype, mask, shape)
        for dtype in dtypes or ("fp32", "bf16")
        for mask in masks or ("padding",)
        for shape in shapes or grid
    ]


@dataclass(frozen=True)
class EmbeddingBag:
    """The mean of each bag of a padded batch, of ids as a text has them: P(id) ~ 1 / id over 10000 words. With padding,
    lengths are uniform between 5 and all of the tokens, and the rest is id 0; full, there is no padding.
    """

    dtype: str
    mask: str
    shape: Shape  # (bags, tokens, features)
    op: str = "embedding_bag"
    results: tuple[str, ...] = ("out", "dweight")
    yardstick: str = "F.embedding_bag"
    directions: tuple[str, ...] = DIRECTIONS

    def inputs(self, seed: int, device: str) -> tuple[list[Tensor], Tensor]:
        generator = torch.Generator().manual_seed(seed)
        bags, _, features = self.shape
        weight, grad_out = (torch.randn(n, features, generator=generator) for n in (VOCABULARY, bags))
        return [weight.to(device, DTYPES[self.dtype])], grad_out.to(device, DTYPES[self.dtype])

    def truth(self, inputs: Sequence[Tensor], grad_out: Tensor) -> list[Tensor]:
        weight, ids = inputs[0].double(), self._ids(inputs[0].device.type)
        out, largest = pyattn.reference.embedding_bag_forward(weight, ids, padding_idx=0)
        dweight, _ = pyattn.reference.embedding_bag_backward(grad_out.double(), largest, weight, ids, padding_idx=0)
        return [out, dweight]

    def routes(self, device: str) -> dict[str, Route]:
        """pyattn; torch's fused bag; and the plain formula, where it means the same."""
        ids = self._ids(device)
        padding = 0 if self.mask == "padding" else None
        routes = {
            PYATTN: Route(partial(_bag, pyattn.embedding_bag, ids, padding)),
            self.yardstick: Route(partial(_bag, F.embedding_bag, ids, padding)),
        }
        if padding is None:
            routes["embedding, mean"] = Route(lambda weight: F.embedding(ids, weight).mean(1))
        return routes

    def flops(self, direction: str) -> int:
        """An addition per number of a token's row; backward, another of its bag's gradient."""
        return (1 if direction == FORWARD else 2) * self._tokens * self.shape[2]

    def bytes(self, direction: str) -> int:
        """A row per token, read; backward, one of the output's gradient too, and the table's gradient, written."""
        rows = self._tokens if direction == FORWARD else 2 * self._tokens + VOCABULARY
        return rows * self.shape[2] * DTYPES[self.dtype].itemsize

    def smallest(self) -> "EmbeddingBag":
        return replace(self, shape=(1, 2, self.shape[2]))

    @property
    def _tokens(self) -> int:
        return int((self._ids("cpu") != 0).sum())

    def _ids(self, device: str) -> Tensor:
        bags, tokens, _ = self.shape
        generator = torch.Generator().manual_seed(0)
        frequencies = 1 / torch.arange(1, VOCABULARY)
        ids = 1 + torch.multinomial(frequencies, bags * tokens, True, generator=generator).view(bags, tokens)
        if self.mask == "padding":
            lengths = torch.randint(min(5, tokens), tokens + 1, (bags, 1), generator=generator)
            ids = torch.where(torch.arange(tokens) < lengths, ids, 0)
        return ids.to(device)


def _bag(function: Callable[..., Tensor], ids: Tensor, padding_idx: int | None, weight: Tensor) -> Tensor:
    return function(ids, weight, padding_idx=padding_idx)


VOCABULARY = 10000
BAG_SHAPES: tuple[Shape, ...] = ((1, 100, 128), (32, 100, 128), (256, 100, 128))


def embeddings_suite(
    shapes: Sequence[Shape] | None, dtypes: Sequence[str] | None, masks: Sequence[str] | None, quick: bool
) -> list[Case]:
    return [
        EmbeddingBag(dtype, mask, shape)
        for dtype in dtypes or (("fp32",) if quick else ("fp32", "bf16"))
        for mask in masks or ("full", "padding")
        for shape in shapes or BAG_SHAPES
    ]


@dataclass(frozen=True)
class Lstm:
    """One layer in one direction, batch first; with padding, of samples whose lengths rise evenly to a mean of half.

    torch has two routes for those: to run the padding too and clear what it gave, and packed sequences.
    """

    dtype: str
    mask: str
    shape: Shape  # (batch, seq, features, hidden)
    op: str = "lstm"
    results: tuple[str, ...] = ("output", "dinput", "dweight_ih", "dweight_hh", "dbias_ih", "dbias_hh")
    yardstick: str = "torch"
    directions: tuple[str, ...] = DIRECTIONS

    def inputs(self, seed: int, device: str) -> tuple[list[Tensor], Tensor]:
        """Standard normal inputs, and weights as torch.nn.LSTM starts with."""
        batch, seq, features, hidden = self.shape
        generator = torch.Generator().manual_seed(seed)
        x, grad_out = (torch.randn(batch, seq, width, generator=generator) for width in (features, hidden))
        shapes = ((4 * hidden, features), (4 * hidden, hidden), (4 * hidden,), (4 * hidden,))
        weights = [(2 * torch.rand(shape, generator=generator) - 1) / math.sqrt(hidden) for shape in shapes]
        dtype = DTYPES[self.dtype]
        return [t.to(device, dtype) for t in (x, *weights)], grad_out.to(device, dtype)

    def truth(self, inputs: Sequence[Tensor], grad_out: Tensor) -> list[Tensor]:
        x, *weights = (t.double() for t in inputs)
        operands = (x, None, None, *weights, self._lengths(x.device.type))
        output, h_n, c_n = pyattn.reference.lstm_forward(*operands)
        zeros = torch.zeros_like(h_n), torch.zeros_like(c_n)
        dinput, _, _, *dweights = pyattn.reference.lstm_backward(grad_out.double(), *zeros, *operands)
        return [output, dinput, *dweights]

    def routes(self, device: str) -> dict[str, Route]:
        lengths = self._lengths(device)
        packed = {} if lengths is None else {"packed": Route(partial(_lstm_packed, lengths=lengths.cpu()))}
        return {
            PYATTN: Route(partial(_lstm, lengths=lengths)),
            self.yardstick: Route(partial(_lstm_padded, lengths=lengths)),
            **packed,
        }

    def flops(self, direction: str) -> int:
        """Per valid step the product of x and h with the weights; backward, two of the same size: gradients of x and h,
        and of the weights."""
        _, _, features, hidden = self.shape
        return (2 if direction == FORWARD else 6) * 4 * hidden * (features + hidden) * self._steps

    def bytes(self, direction: str) -> int:
        """x, the output and the weights; backward too, x again and the gradients of all three."""
        _, _, features, hidden = self.shape
        steps, weights = self._steps * (features + hidden), 4 * hidden * (features + hidden + 2)
        moved = steps + weights if direction == FORWARD else 3 * steps + 3 * weights
        return moved * DTYPES[self.dtype].itemsize

    def smallest(self) -> "Lstm":
        return replace(self, shape=(1, 2, *self.shape[2:]))

    @property
    def _steps(self) -> int:
        batch, seq, _, _ = self.shape
        return sum(_rising_lengths(batch, seq)) if self.mask == "padding" else batch * seq

    def _lengths(self, device: str) -> Tensor | None:
        batch, seq, _, _ = self.shape
        return torch.tensor(_rising_lengths(batch, seq), device=device) if self.mask == "padding" else None


def _lstm(x: Tensor, *weights: Tensor, lengths: Tensor | None) -> Tensor:
    return pyattn.lstm(x, *weights, lengths=lengths)[0]


def _torch_lstm(x: Tensor, weights: Sequence[Tensor], *batch_sizes: Tensor, batch: int) -> Tensor:
    hx = x.new_zeros(1, batch, weights[1].shape[1])
    end = () if batch_sizes else (True,)
    return torch._VF.lstm(x, *batch_sizes, (hx, hx), weights, True, 1, 0.0, True, False, *end)[0]


def _lstm_padded(x: Tensor, *weights: Tensor, lengths: Tensor | None) -> Tensor:
    output = _torch_lstm(x, weights, batch=x.shape[0])
    if lengths is None:
        return output
    return output * (torch.arange(x.shape[1], device=x.device) < lengths.unsqueeze(1)).unsqueeze(2)


def _lstm_packed(x: Tensor, *weights: Tensor, lengths: Tensor) -> Tensor:
    packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    data = _torch_lstm(packed.data, weights, packed.batch_sizes, batch=x.shape[0])
    return pad_packed_sequence(packed._replace(data=data), batch_first=True, total_length=x.shape[1])[0]


# A text classifier's layer, from one request to a training batch.
LAYER_SHAPES: tuple[Shape, ...] = ((1, 100, 64, 128), (32, 100, 64, 128), (256, 100, 64, 128))


def layers_suite(
    shapes: Sequence[Shape] | None, dtypes: Sequence[str] | None, masks: Sequence[str] | None, quick: bool
) -> list[Case]:
    return [
        Lstm(dtype, mask, shape)
        for dtype in dtypes or ("fp32", "bf16")
        for mask in masks or ("full", "padding")
        for shape in shapes or (LAYER_SHAPES[:2] if quick else LAYER_SHAPES)
    ]


SUITES = {
    "attention": attention_suite,
    "losses": losses_suite,
    "embeddings": embeddings_suite,
    "layers": layers_suite,
}
