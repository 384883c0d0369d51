"""Which backend runs a problem of an op, and why the others do not.

An `Op` has its kernels in order of preference. Each answers with its reasons to refuse a problem, and the first with
none runs it. The reference never runs unless `use_backend("reference")` asks for it: nothing falls back silently. Where
torch's own is the better choice, the op says why, and the backend is named "torch".
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
from typing import Any, Generic, Literal, NamedTuple, NoReturn, Protocol, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import _C

BackendName = Literal["cpu", "triton", "torch", "reference"]


@functools.cache
def _triton_missing() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (CUDA builds of torch bring it; else pip install 'pyattn[triton]')"
    if torch.version.hip is not None:
        return "torch is built for ROCm; the kernels are made for NVIDIA GPUs"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return None


def _cuda_architecture() -> str:
    if not torch.cuda.is_available():
        return "none"
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}"


class Backend(NamedTuple):
    """Where kernels run."""

    name: BackendName
    isa: Callable[[], str]  # the instruction set or architecture that its kernels are compiled for
    missing: Callable[[], str | None] = lambda: None  # why it cannot run at all here
    on_request: bool = False  # runs only inside use_backend


CPU = Backend("cpu", _C.isa)  # the C++ kernels of csrc/
TRITON = Backend("triton", _cuda_architecture, _triton_missing)  # the Triton kernels of kernels/
TORCH = Backend("torch", lambda: "torch")  # torch's own function
REFERENCE = Backend("reference", lambda: "torch", on_request=True)  # the definition, reference.py
BACKENDS: dict[str, Backend] = {b.name: b for b in (CPU, TRITON, TORCH, REFERENCE)}


def under_transforms() -> bool:
    """Inside torch.func's transforms or forward-mode AD, where a call must be differentiable by their rules."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


CPU_MAX_DIMS = 8  # csrc/tensor_view.h: shapes are copied into fixed arrays


def cpu_refusals(name: str, tensor: Tensor) -> Sequence[str]:
    """What the C++ kernels have against the op's main operand."""
    if tensor.is_cpu and tensor.dim() <= CPU_MAX_DIMS:  # the common case, in a tenth of a microsecond
        return ()
    reasons = []
    if not tensor.is_cpu:
        reasons.append(f"{name} is on {tensor.device}, not on the CPU")
    if tensor.dim() > CPU_MAX_DIMS:
        reasons.append(f"{name} has {tensor.dim()} dimensions, more than {CPU_MAX_DIMS}")
    return reasons


# Tensor cores for bfloat16 and float32, and the shared memory that kernels/_configs.py counts on.
OLDEST_GPU = (8, 0)


def triton_refusals(name: str, tensor: Tensor) -> Sequence[str]:
    """What the Triton kernels have against the op's main operand."""
    reasons = []
    if not tensor.is_cuda:
        reasons.append(f"{name} is on {tensor.device}, not on a CUDA device")
    if (missing := _triton_missing()) is not None:
        reasons.append(missing)
    elif tensor.is_cuda and (capability := torch.cuda.get_device_capability(tensor.device)) < OLDEST_GPU:
        major, minor = capability
        reasons.append(f"{tensor.device} is sm_{major}{minor}; the kernels need sm_80 or newer")
    return reasons


class Kernels(Protocol):
    """One op on one backend. What its forward and backward take is the op's own business."""

    backend: Backend
    memory: str

    def refusals(self, operands: Any, config: Any) -> Sequence[str]:
        """Reasons not to run this problem; empty if it can."""
        ...


class TorchFunction(NamedTuple):
    """torch's own function for an op: no pair of kernels, but differentiable as it stands."""

    memory: str
    preferred: Callable[[Any, Any], str | None]  # (operands, config) -> why it is better than the kernels, or None


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


def nothing_requested() -> bool:
    return _request.get() is _NO_REQUEST


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

    `fn` is one of pyattn's functions. All checks are made, so a wrong call raises here as it would there; no
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


K = TypeVar("K", bound=Kernels)


class Op(Generic[K]):
    """An op and what can run it, in order of preference."""

    def __init__(self, name: str, kernels: Sequence[K], torch_function: TorchFunction | None = None) -> None:
        self.name = name
        self.kernels: dict[str, K] = {k.backend.name: k for k in kernels}
        self._unasked = tuple(k for k in kernels if not k.backend.on_request)
        self._torch = torch_function

    def choose(self, operands: Any, config: Any) -> K:
        """The first kernels that take the problem; NotImplementedError with everybody's reasons if none do."""
        request = _request.get()
        if request is _NO_REQUEST:
            for kernels in self._unasked:
                if not kernels.refusals(operands, config):
                    return kernels
        refusals = self._refusals(request, operands, config)
        chosen = next((self.kernels[name] for name, reasons in refusals.items() if not reasons), None)
        if chosen is None:
            raise NotImplementedError(_no_backend(operands, refusals))
        if request.explain:
            self._explain(chosen.backend, chosen.memory, request, "the first in order to take the problem", refusals)
        return chosen

    def prefers_torch(self, operands: Any, config: Any) -> bool:
        """Whether torch's own function is to run the problem: because it is better there, or asked for."""
        assert self._torch is not None
        request = _request.get()
        if request.backend not in (None, TORCH.name):
            return False
        reason = self._torch.preferred(operands, config)
        if reason is None and request.backend is None:
            return False
        if request.explain:
            self._explain(TORCH, self._torch.memory, request, reason, self._refusals(request, operands, config))
        return True

    def _refusals(self, request: _Request, operands: Any, config: Any) -> dict[str, tuple[str, ...]]:
        refusals: dict[str, tuple[str, ...]] = {
            name: _why_not(kernels, request, operands, config) for name, kernels in self.kernels.items()
        }
        if self._torch is not None:
            second = "pyattn's kernels are preferred here; use_backend('torch') asks for it"
            refusals[TORCH.name] = _not_asked(TORCH, request) or (second,)
        elif request.backend == TORCH.name:
            refusals[TORCH.name] = (f"is no backend of {self.name}",)
        return refusals

    def _explain(
        self,
        backend: Backend,
        memory: str,
        request: _Request,
        reason: str | None,
        refusals: dict[str, tuple[str, ...]],
    ) -> NoReturn:
        if request.backend is not None:
            reason = f"use_backend({backend.name!r}) asks for it"
        others = {name: reasons or ("comes later in order",) for name, reasons in refusals.items()}
        others.pop(backend.name, None)
        raise _Explained(Explanation(self.name, backend.name, backend.isa(), memory, reason or "", others))


def _why_not(kernels: Kernels, request: _Request, operands: Any, config: Any) -> tuple[str, ...]:
    if request.backend is None and kernels.backend.on_request:
        return (f"runs only inside use_backend({kernels.backend.name!r})",)
    return (*_not_asked(kernels.backend, request), *kernels.refusals(operands, config))


def _not_asked(backend: Backend, request: _Request) -> tuple[str, ...]:
    if request.backend in (None, backend.name):
        return ()
    return (f"use_backend({request.backend!r}) is in force",)


def _no_backend(operands: Any, refusals: dict[str, tuple[str, ...]]) -> str:
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
        rows.append((f"backend {backend.name}", state + (", on request only" if backend.on_request else "")))
    width = max(len(name) for name, _ in rows)
    print("\n".join(f"{name:<{width}}  {text}" for name, text in rows))
