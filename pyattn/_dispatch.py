"""Which backend runs a problem, and why the others do not.

Backends stand in order of preference. Each answers with its reasons to refuse a problem, and the first with none runs
it. The reference never runs unless `use_backend("reference")` asks for it: nothing falls back silently.
"""

import contextlib
import functools
import importlib.metadata
import importlib.util
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar, Token
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from . import _C, reference
from ._problem import AttentionConfig, Gradients, Operands, empty_gradients, empty_lse, empty_out, kernel_arguments

BackendName = Literal["cpu", "triton", "reference"]


class Backend(Protocol):
    """One implementation of the op."""

    name: BackendName
    memory: str

    def isa(self) -> str:
        """The instruction set or architecture that its kernels are compiled for."""
        ...

    def missing(self) -> str | None:
        """Why the backend cannot run at all here, or None."""
        ...

    def refusals(self, operands: Operands, config: AttentionConfig) -> Sequence[str]:
        """Reasons not to run this problem; empty if it can."""
        ...

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


class CpuBackend:
    """The C++ kernels of csrc/."""

    name: BackendName = "cpu"
    memory = "O(q_len + kv_len)"
    MAX_DIMS = 8  # csrc/tensor_view.h: shapes are copied into fixed arrays

    def isa(self) -> str:
        return _C.isa()

    def missing(self) -> str | None:
        return None

    def refusals(self, operands: Operands, config: AttentionConfig) -> Sequence[str]:
        q = operands.q
        if q.is_cpu and q.dim() <= self.MAX_DIMS:  # the common case, in a tenth of a microsecond
            return ()
        reasons = []
        if not q.is_cpu:
            reasons.append(f"query is on {q.device}, not on the CPU")
        if q.dim() > self.MAX_DIMS:
            reasons.append(f"query has {q.dim()} dimensions, more than {self.MAX_DIMS}")
        return reasons

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


class TritonBackend:
    """The Triton kernels of kernels/, imported on first use: `import pyattn` works without triton."""

    name: BackendName = "triton"
    memory = "O(q_len + kv_len)"
    OLDEST = (8, 0)  # tensor cores for bfloat16 and float32, and the shared memory that kernels/_configs.py counts on

    def isa(self) -> str:
        if not torch.cuda.is_available():
            return "none"
        major, minor = torch.cuda.get_device_capability()
        return f"sm_{major}{minor}"

    def missing(self) -> str | None:
        return _triton_missing()

    def refusals(self, operands: Operands, config: AttentionConfig) -> Sequence[str]:
        q = operands.q
        reasons = []
        if not q.is_cuda:
            reasons.append(f"query is on {q.device}, not on a CUDA device")
        if (missing := self.missing()) is not None:
            reasons.append(missing)
        elif q.is_cuda and (capability := torch.cuda.get_device_capability(q.device)) < self.OLDEST:
            major, minor = capability
            reasons.append(f"{q.device} is sm_{major}{minor}; the kernels need sm_80 or newer")
        return reasons

    def forward(self, operands: Operands, config: AttentionConfig, with_lse: bool) -> tuple[Tensor, Tensor | None]:
        from .kernels import attention as kernels

        q, k, v, bias, _, mask, _, _, _, _, seed = operands
        out, lse = empty_out(q, v.shape[-1]), empty_lse(q)
        kernels.attention_forward(q, k, v, bias, mask, seed, out, lse, **kernel_arguments(operands, config)._asdict())
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

        q, k, v, bias, _, mask, _, _, _, _, seed = operands
        gradients = empty_gradients(operands, bias_grad)
        kernels.attention_backward(
            do, dlse, q, k, v, out, lse, bias, mask, seed, *gradients, **kernel_arguments(operands, config)._asdict()
        )
        return gradients


class ReferenceBackend:
    """The definition itself."""

    name: BackendName = "reference"
    memory = "O(q_len * kv_len)"

    def isa(self) -> str:
        return "torch"

    def missing(self) -> str | None:
        return None

    def refusals(self, operands: Operands, config: AttentionConfig) -> Sequence[str]:
        return []

    def forward(self, operands: Operands, config: AttentionConfig, with_lse: bool) -> tuple[Tensor, Tensor | None]:
        q, k, v, bias, _, mask, _, _, _, _, seed = operands
        result, lse = reference.attention_forward(
            q, k, v, bias, mask, seed, **kernel_arguments(operands, config)._asdict()
        )
        out = empty_out(q, v.shape[-1])
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
        q, k, v, bias, _, mask, _, _, _, _, seed = operands
        dq, dk, dv, dbias = reference.attention_backward(
            do, dlse, q, k, v, bias, mask, seed, **kernel_arguments(operands, config)._asdict()
        )
        gradients = empty_gradients(operands, bias_grad)
        for gradient, computed in zip(gradients, (dq, dk, dv, dbias), strict=True):
            if gradient is not None and computed is not None:
                gradient.copy_(computed)
        return gradients


@functools.cache
def _triton_missing() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (CUDA builds of torch bring it; else pip install 'pyattn[triton]')"
    if torch.version.hip is not None:
        return "torch is built for ROCm; the kernels are made for NVIDIA GPUs"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return None


BACKENDS: dict[str, Backend] = {b.name: b for b in (CpuBackend(), TritonBackend(), ReferenceBackend())}
_ON_REQUEST = "reference"
_UNASKED = tuple(b for b in BACKENDS.values() if b.name != _ON_REQUEST)


class _Request(NamedTuple):
    """What the surrounding code asked for."""

    backend: str | None = None
    explain: bool = False


_NO_REQUEST = _Request()
_request: ContextVar[_Request] = ContextVar("pyattn_request", default=_NO_REQUEST)


class use_backend:
    """Context manager: inside it, only the named backend runs; a problem it refuses raises NotImplementedError.

    >>> with pyattn.use_backend("reference"):
    ...     out = pyattn.attention(q, k, v)

    The backward of a forward made inside it uses the same backend, wherever it runs. A graph from torch.compile asks
    each time it runs, its backward apart from its forward: keep both inside.
    """

    def __init__(self, name: BackendName) -> None:
        if name not in tuple(BACKENDS):
            raise ValueError(f"use_backend: expected one of {', '.join(map(repr, BACKENDS))}, got {name!r}")
        self._name = name
        self._tokens: list[Token[_Request]] = []

    def __enter__(self) -> None:
        self._tokens.append(_request.set(_request.get()._replace(backend=self._name)))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _request.reset(self._tokens.pop())


def requested() -> str | None:
    """The backend that `use_backend` asks for here; a forward keeps it for its backward, which may run elsewhere."""
    return _request.get().backend


@contextlib.contextmanager
def requesting(name: str | None) -> Iterator[None]:
    """The request of the forward, in force again for its backward."""
    token = _request.set(_request.get()._replace(backend=name))
    try:
        yield
    finally:
        _request.reset(token)


@dataclass(frozen=True)
class Explanation:
    """Which backend a call would run on, and why. `str` gives a table."""

    op: str
    backend: str
    isa: str
    memory: str
    reason: str
    refusals: dict[str, tuple[str, ...]]

    def __str__(self) -> str:
        rows = [
            ("op", self.op),
            ("backend", self.backend),
            ("isa", self.isa),
            ("memory", self.memory),
            ("reason", self.reason),
        ]
        rows += [(f"not {name}", "; ".join(reasons)) for name, reasons in self.refusals.items()]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)


class _Explained(BaseException):
    """Carries the answer out of a call that must not go on to its kernel."""

    def __init__(self, explanation: Explanation) -> None:
        self.explanation = explanation


def explain(fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Explanation:
    """Which backend ``fn(*args, **kwargs)`` would run on, why, and why not on the others.

    `fn` is one of pyattn's attention functions. All checks are made, so a wrong call raises here as it would there; no
    kernel runs and no random number is drawn.
    """
    token = _request.set(_request.get()._replace(explain=True))
    try:
        fn(*args, **kwargs)
    except _Explained as explained:
        return explained.explanation
    finally:
        _request.reset(token)
    if any(isinstance(argument, Tensor) and argument.is_meta for argument in (*args, *kwargs.values())):
        raise ValueError(
            "explain: meta tensors are on no device that a backend runs on; give tensors of the device in question, "
            "or fake ones (torch._subclasses.FakeTensorMode), which take no memory either"
        )
    raise TypeError(f"explain: {fn!r} made no pyattn call")


def choose(operands: Operands, config: AttentionConfig) -> Backend:
    """The first backend that takes the problem; NotImplementedError with every backend's reasons if none does."""
    request = _request.get()
    if request is _NO_REQUEST:
        for backend in _UNASKED:
            if not backend.refusals(operands, config):
                return backend
    refusals: dict[str, tuple[str, ...]] = {b.name: _why_not(b, request, operands, config) for b in BACKENDS.values()}
    chosen = next((BACKENDS[name] for name, reasons in refusals.items() if not reasons), None)
    if chosen is None:
        raise NotImplementedError(_no_backend(operands, refusals))
    if not request.explain:
        return chosen
    del refusals[chosen.name]
    reason = (
        f"use_backend({chosen.name!r}) asks for it" if request.backend else "the first in order to take the problem"
    )
    raise _Explained(Explanation("attention", chosen.name, chosen.isa(), chosen.memory, reason, refusals))


def forward_with_lse(operands: Operands, config: AttentionConfig) -> tuple[Tensor, Tensor]:
    out, lse = choose(operands, config).forward(operands, config, with_lse=True)
    assert lse is not None
    return out, lse


def _why_not(backend: Backend, request: _Request, operands: Operands, config: AttentionConfig) -> tuple[str, ...]:
    if request.backend is None and backend.name == _ON_REQUEST:
        return (f"runs only inside use_backend({backend.name!r})",)
    reasons = backend.refusals(operands, config)
    if request.backend is not None and request.backend != backend.name:
        return (f"use_backend({request.backend!r}) is in force", *reasons)
    return tuple(reasons)


def _no_backend(operands: Operands, refusals: dict[str, tuple[str, ...]]) -> str:
    tensors = [
        f"  {name}: {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
        for name, tensor in operands._asdict().items()
        if tensor is not None
    ]
    reasons = [f"  {name}: {'; '.join(texts)}" for name, texts in refusals.items()]
    return "\n".join(("no backend takes this problem", *tensors, "because", *reasons))


def show_config() -> None:
    """Print what pyattn runs on here: versions, instruction set, threads, and each backend or why it is missing."""
    rows = [
        ("pyattn", importlib.metadata.version("pyattn")),
        ("torch", torch.__version__),
        ("python", f"{platform.python_version()} on {sys.platform} {platform.machine()}"),
        (
            "isa",
            f"{_C.isa()} (compiled: {', '.join(_C.compiled_isas())}; usable here: {', '.join(_C.available_isas())})",
        ),
        ("threads", str(torch.get_num_threads())),
    ]
    for backend in BACKENDS.values():
        missing = backend.missing()
        state = f"missing: {missing}" if missing else f"available, {backend.isa()}"
        rows.append((f"backend {backend.name}", state + (", on request only" if backend.name == _ON_REQUEST else "")))
    width = max(len(name) for name, _ in rows)
    print("\n".join(f"{name:<{width}}  {text}" for name, text in rows))
