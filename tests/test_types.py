"""`typed` gives the verdict of jaxtyping and beartype, quickly where it can, and says what is wrong.

The speed itself is a benchmark's business; here, calls of the ordinary kind must be decided by the quick check.
"""

import inspect
import itertools
import types
from collections.abc import Callable, Iterator
from typing import Any, Literal, Union

import jaxtyping
import numpy as np
import pytest
import torch
from beartype import beartype
from beartype.door import is_bearable
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import Bool, Float, Float32, Int, Shaped, TypeCheckError, jaxtyped
from torch import Tensor
from torch._subclasses import FakeTensorMode

import pyattn
from pyattn import _C, _types
from pyattn._checks import DtypeError, ShapeError
from pyattn._types import typed


class Mask:
    pass


class Causal(Mask):
    pass


class Subclass(torch.Tensor):
    pass


def attend(
    query: Float[Tensor, "*batch q_heads q_len head_dim"],
    key: Float[Tensor, "*batch kv_heads kv_len head_dim"],
    value: Float[Tensor, "*batch kv_heads kv_len v_dim"],
    *,
    mask: Mask | Bool[Tensor, "..."] | None = None,
    sinks: Float[Tensor, " q_heads"] | None = None,
    scale: float | int | None = None,
    dropout_seed: int | Int[Tensor, ""] | None = None,
    is_causal: bool = False,
    align: Literal["upper_left", "lower_right"] | None = None,
) -> Float[Tensor, "*batch q_heads q_len v_dim"]:
    """The formula."""
    return torch.softmax(query @ key.mT, -1) @ value


attend_typed = typed(attend)


def quick_check(function: Callable[..., object]) -> Callable[..., bool]:
    return _C.compile_signature(_types._compile(inspect.signature(function)))


attend_quickly = quick_check(attend)


def qkv(kv_len: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(2, 3, 4, 8), torch.randn(2, 3, kv_len, 8), torch.randn(2, 3, kv_len, 7)


def accepts(function: Callable[..., object], *args: object) -> bool:
    try:
        function(*args)
    except TypeError:
        return False
    return True


# ---- The verdicts are equal ----

ARRAYS = [Float, Float32, Bool, Int, Shaped]
DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.bool, torch.int64, torch.uint8, torch.complex64]
# What may stand in a union beside tensors, and arguments for it; NumPy's float64 is a float, its other scalars are not.
OTHERS = [None, int, float, bool, str, Mask, Literal["upper_left", 1], Literal[None, True], type[Mask]]
SCALARS: list[Any] = [
    None,
    0,
    1,
    True,
    2.5,
    "upper_left",
    "up",
    Causal(),
    Causal,
    np.float64(1.5),
    np.float32(1.5),
    np.int64(2),
]
AXES = ["m", "n", "#m", "_", "_n", "2", "#2"]
RUNS = ["*b", "*c", "*#b", "*_", "..."]

sizes = st.integers(0, 3)
shapes = st.lists(sizes, max_size=4).map(tuple)


@st.composite
def axis_strings(draw: st.DrawFn) -> str:
    axes = draw(st.lists(st.sampled_from(AXES), max_size=3))
    if draw(st.booleans()):
        axes.insert(draw(st.integers(0, len(axes))), draw(st.sampled_from(RUNS)))
    return " ".join(axes)


arrays = st.builds(lambda array, axes: array[Tensor, axes], st.sampled_from(ARRAYS), axis_strings())
unions = st.tuples(st.lists(arrays, max_size=2), st.lists(st.sampled_from(OTHERS), max_size=2)).map(
    lambda members: Union[(*members[0], *members[1])] if any(members) else Any
)
annotations = st.one_of(arrays, unions)


@st.composite
def fitting_shapes(draw: st.DrawFn, axes: str, known: dict[str, Any]) -> tuple[int, ...]:
    """A shape that fits the axes; `known` holds the sizes bound by the arguments before, and is extended."""
    shape: list[int] = []
    for token in axes.split():
        name = token.lstrip("#*")
        if "*" in token or token == "...":
            run = draw(st.lists(sizes, max_size=2))
            shape += run if name in ("_", "...") else known.setdefault("*" + name, run)
        elif token.startswith("#") and draw(st.booleans()):
            shape.append(1)
        elif name.isdecimal():
            shape.append(int(name))
        else:
            shape.append(draw(sizes) if name.startswith("_") else known.setdefault(name, draw(sizes)))
    return tuple(shape)


def dress(tensor: Tensor, kind: str) -> Tensor:
    """The same shape and dtype in another kind of tensor."""
    if kind == "meta":
        return tensor.to("meta")
    if kind == "subclass":
        return tensor.as_subclass(Subclass)
    if kind == "parameter":
        return torch.nn.Parameter(tensor, requires_grad=tensor.is_floating_point())
    if kind == "strided":
        return torch.cat([tensor, tensor], -1)[..., : tensor.shape[-1]] if tensor.dim() else tensor
    return tensor


@st.composite
def fitting_arguments(draw: st.DrawFn, annotation: Any, known: dict[str, Any], kinds: list[str]) -> Any:
    """Something that the annotation takes, as far as that can be told without the other arguments."""
    member = draw(st.sampled_from(list(_types._members(annotation))))
    if not _types._is_array(member):
        return draw(st.sampled_from([value for value in SCALARS if is_bearable(value, member)]))
    dtypes = [dtype for dtype in DTYPES if isinstance(torch.zeros((), dtype=dtype), member.dtype[Tensor, ""])]
    tensor = torch.zeros(draw(fitting_shapes(member.dim_str, known)), dtype=draw(st.sampled_from(dtypes)))
    return dress(tensor, draw(st.sampled_from(kinds)))


@st.composite
def fitting_calls(draw: st.DrawFn, function: Callable[..., object], kinds: list[str]) -> list[Any]:
    """An argument for every parameter. Together they usually fit."""
    known: dict[str, Any] = {}
    hints = [parameter.annotation for parameter in inspect.signature(function).parameters.values()]
    return [draw(fitting_arguments(hint, known, kinds)) for hint in hints]


def neighbours(args: list[Any]) -> Iterator[list[Any]]:
    """The call, and those that differ from it in one respect of one argument; most do not fit."""
    yield args
    for position, argument in enumerate(args):
        others: list[Any] = [None, True]
        if isinstance(argument, Tensor):
            shape = tuple(argument.shape)
            others += [argument.new_zeros(shape, dtype=torch.float16), argument.new_zeros(shape, dtype=torch.int32)]
            changed = [(*shape[:i], size, *shape[i + 1 :]) for i in range(len(shape)) for size in (1, 2, 5)]
            others += [argument.new_zeros(other) for other in (*changed, (1, *shape), (2, *shape), shape[1:])]
        for other in others:
            yield [*args[:position], other, *args[position + 1 :]]


def verdict(function: Callable[..., object], args: list[Any]) -> bool:
    """jaxtyping's and beartype's, without the milliseconds that they take to write the message of a misfit."""
    parameters = inspect.signature(function).parameters.values()
    with jaxtyped("context"):
        return all(is_bearable(argument, p.annotation) for p, argument in zip(parameters, args, strict=True))


def annotated(*hints: Any) -> Callable[..., object]:
    def template(a, b, c): ...  # type: ignore[no-untyped-def]

    function = types.FunctionType(template.__code__, template.__globals__, "function")
    function.__annotations__ = dict(zip("abc", hints, strict=True))
    return function


@given(st.data())
def test_verdict_is_that_of_jaxtyping_and_beartype(data: st.DataObject) -> None:
    function = annotated(*(data.draw(annotations, label=name) for name in "abc"))
    args = data.draw(fitting_calls(function, ["plain", "plain", "strided", "parameter", "meta", "subclass"]))

    expected = accepts(jaxtyped(function, typechecker=beartype), *args)
    assert accepts(typed(function), *args) == verdict(function, args) == expected
    quickly = quick_check(function)
    for call in neighbours(args):
        if quickly(*call):
            assert verdict(function, call), call


@given(fitting_calls(attend, ["plain", "strided", "parameter"]))
def test_ordinary_calls_are_decided_quickly(args: list[Any]) -> None:
    for call in neighbours(args):
        assert attend_quickly(*call) == verdict(attend, call), call


FEW_SHAPES = [torch.zeros(shape) for shape in [(), (1,), (2,), (3,), (1, 2), (2, 1), (2, 3)]]


# Rules that random annotations meet too rarely: what a run has broadcast to, and unions whose members both fit.
@pytest.mark.parametrize("axes", list(itertools.product(["*b", "*#b"], repeat=3)), ids=" ".join)
def test_runs_that_broadcast(axes: tuple[str, ...]) -> None:
    function = annotated(*(Float[Tensor, each] for each in axes))
    quickly = quick_check(function)
    for args in itertools.product(FEW_SHAPES, repeat=3):
        assert quickly(*args) == verdict(function, [*args]), args


@pytest.mark.parametrize(
    "union",
    [
        Float[Tensor, "m n"] | Float[Tensor, "n m"],
        Float[Tensor, "#m"] | Shaped[Tensor, "*n"],
        Tensor | Float[Tensor, " n"],
        object | Float[Tensor, "n m"],
    ],
    ids=str,
)
def test_unions_of_which_two_members_fit(union: Any) -> None:
    function = annotated(union, Float[Tensor, "*#n"], Float[Tensor, " m"] | None)
    quickly = quick_check(function)
    for args in itertools.product(FEW_SHAPES, repeat=3):
        assert not quickly(*args) or verdict(function, [*args]), args


@pytest.mark.parametrize("name", [name for name in pyattn.__all__ if hasattr(getattr(pyattn, name), "__wrapped__")])
def test_public_functions_are_decided_quickly(name: str) -> None:
    """No parameter has an annotation that only the full check understands."""
    assert _types._NOTHING not in _types._compile(inspect.signature(getattr(pyattn, name)))


# ---- Every way to pass arguments ----


def test_arguments_arrive_however_they_are_passed() -> None:
    def function(a: int, /, b: int = 2, *, c: int = 3) -> tuple[int, int, int]:
        return a, b, c

    checked = typed(function)
    assert checked(1) == (1, 2, 3)
    assert checked(1, 5, c=7) == (1, 5, 7)
    assert checked(1, c=7, b=5) == (1, 5, 7)
    for call in (lambda: checked(), lambda: checked(1, d=4), lambda: checked(a=1), lambda: checked(1, 2, 3)):
        with pytest.raises(TypeError, match=r"function\(\) "):  # Python's own message, with the function's name
            call()


def test_numpy_numbers_become_those_of_python() -> None:
    """As torch.nn.functional.scaled_dot_product_attention takes them; its bools it does not take either."""

    def function(x: float | int | None, n: int, other: object = None) -> tuple[object, ...]:
        return x, n, other

    received = typed(function)(np.float32(0.5), np.int64(3), np.float32(0.5))
    assert received == (0.5, 3, 0.5)
    assert [type(x) for x in received] == [float, int, np.float32]
    assert type(typed(function)(np.uint8(2), 3)[0]) is int
    for args in ((np.float32(0.5), np.float32(3.0)), (np.bool_(True), 3), (np.ones(1), 3), (None, "3")):
        with pytest.raises(TypeCheckError):
            typed(function)(*args)  # type: ignore[arg-type]


def test_looks_like_the_function() -> None:
    assert inspect.signature(attend_typed) == inspect.signature(attend)
    for attribute in ("__name__", "__qualname__", "__module__", "__doc__", "__annotations__", "__kwdefaults__"):
        assert getattr(attend_typed, attribute) == getattr(attend, attribute)


def test_needs_named_parameters() -> None:
    def variadic(*args: int) -> None: ...

    with pytest.raises(TypeError, match=r"variadic has \*args or \*\*kwargs"):
        typed(variadic)


def test_postponed_annotations_are_evaluated() -> None:
    def postponed(n: "int") -> "int":
        return n

    assert typed(postponed)(3) == 3
    with pytest.raises(TypeCheckError):
        typed(postponed)("3")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "dressed",
    [
        pytest.param(torch.nn.Parameter, id="parameter"),
        pytest.param(lambda x: x.as_subclass(Subclass), id="subclass"),
        pytest.param(lambda x: x.to("meta"), id="meta"),
        pytest.param(lambda x: x.mT.contiguous().mT, id="transposed"),
    ],
)
def test_any_kind_of_tensor_is_taken_and_checked(dressed: Callable[[Tensor], Tensor]) -> None:
    query, key, value = map(dressed, qkv())
    assert attend_typed(query, key, value).shape == (2, 3, 4, 7)
    with pytest.raises(ShapeError, match=r"^key: .* with head_dim=8 \(from query\), got \(2, 3, 5, 7\)$"):
        attend_typed(query, key[..., 1:], value)


def test_fake_tensors() -> None:
    with FakeTensorMode():
        query, key, value = qkv()
        assert attend_typed(query, key, value).shape == (2, 3, 4, 7)
        with pytest.raises(ShapeError, match=r"^value: .* kv_len=5 \(from key\), got \(2, 3, 4, 7\)$"):
            attend_typed(query, key, value[:, :, 1:])


def test_transforms_show_the_logical_shape() -> None:
    query, key, value = qkv()
    expected = attend(query, key, value)
    torch.testing.assert_close(torch.vmap(attend_typed)(query, key, value), expected)
    assert torch.func.grad(lambda q: attend_typed(q, key, value).sum())(query).shape == query.shape
    assert torch.func.jvp(lambda q: attend_typed(q, key, value), (query,), (query,))[1].shape == expected.shape
    with pytest.raises(ShapeError, match=r"got \(3, 5, 7\)$"):
        torch.vmap(attend_typed)(query, key[..., 1:], value)


def test_compiles_without_a_break() -> None:
    query, key, value = qkv()
    compiled = torch.compile(attend_typed, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(query, key, value, scale=None, mask=None), attend(query, key, value))
    torch.testing.assert_close(
        compiled(query, key[:, :, 1:], value[:, :, 1:]), attend(query, key[:, :, 1:], value[:, :, 1:])
    )


class Attend(torch.nn.Module):
    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attend_typed(query, key, value)


@pytest.mark.parametrize("strict", [True, False])
def test_exports_with_dynamic_shapes(strict: bool) -> None:
    args = qkv()
    q_len, kv_len = torch.export.Dim("q_len"), torch.export.Dim("kv_len")
    dynamic = ({2: q_len}, {2: kv_len}, {2: kv_len})
    exported = torch.export.export(Attend(), args, dynamic_shapes=dynamic, strict=strict).module()
    longer = qkv(kv_len=9)
    torch.testing.assert_close(exported(*longer), attend(*longer))


# ---- What is said when a call does not fit ----


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        pytest.param(
            {"key": torch.zeros(2, 3, 5, 9)},
            ShapeError,
            "key: expected shape (*batch, kv_heads, kv_len, head_dim) with head_dim=8 (from query), got (2, 3, 5, 9)",
            id="size",
        ),
        pytest.param(
            {"value": torch.zeros(4, 2, 6, 7)},
            ShapeError,
            "value: expected shape (*batch, kv_heads, kv_len, v_dim) with *batch=(2,) (from query), "
            "kv_heads=3 (from key), kv_len=5 (from key), got (4, 2, 6, 7)",
            id="several sizes",
        ),
        pytest.param(
            {"query": torch.zeros(4, 8)},
            ShapeError,
            "query: expected shape (*batch, q_heads, q_len, head_dim), got (4, 8)",
            id="rank",
        ),
        pytest.param(
            {"sinks": torch.zeros(3, 1)},
            ShapeError,
            "sinks: expected shape (q_heads,), got (3, 1)",
            id="rank of one axis",
        ),
        pytest.param(
            {"dropout_seed": torch.zeros(1, dtype=torch.int64)},
            ShapeError,
            "dropout_seed: expected shape (), got (1,)",
            id="scalar tensor",
        ),
        pytest.param(
            {"key": torch.zeros(2, 3, 5, 8, dtype=torch.int32)},
            DtypeError,
            "key: expected one of float32, bfloat16, float16, float64, got torch.int32",
            id="dtype",
        ),
        pytest.param(
            {"mask": torch.zeros(4, 5)},
            DtypeError,
            "mask: expected bool, got torch.float32; terms to add to the scores go into bias=, a 0/1 mask becomes bool "
            "with (mask != 0)",
            id="dtype in a union",
        ),
    ],
)
def test_misfit_of_a_tensor(change: dict[str, Any], error: type[Exception], message: str) -> None:
    call = dict(zip(("query", "key", "value"), qkv(), strict=True)) | change
    with pytest.raises(error) as caught:
        attend_typed(**call)
    assert str(caught.value) == message
    # jaxtyping's own message, with all arguments and sizes, stands above ours in the traceback
    assert isinstance(caught.value.__cause__, TypeCheckError)
    assert "Called with parameters" in str(caught.value.__cause__)


QUERY = "Float[Tensor, '*batch q_heads q_len head_dim']"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("scale", "1", "expected float | int | None, got '1'"),
        ("scale", torch.tensor(1.0), "expected float | int | None, got torch.Tensor"),
        ("is_causal", 1, "expected bool, got 1"),
        ("align", "left", "expected Literal['upper_left', 'lower_right'] | None, got 'left'"),
        ("mask", Causal, "expected Mask | Bool[Tensor, '...'] | None, got the class Causal"),
        ("query", None, f"expected {QUERY}, got None"),
        ("query", [[1.0] * 1000], f"expected {QUERY}, got list; torch.as_tensor(query) makes a tensor of it"),
        ("query", np.zeros(3), f"expected {QUERY}, got numpy.ndarray; torch.as_tensor(query) makes a tensor of it"),
    ],
    ids=lambda x: x if isinstance(x, str) else type(x).__name__,
)
def test_misfit_of_anything_else(name: str, value: Any, message: str) -> None:
    call = dict(zip(("query", "key", "value"), qkv(), strict=True)) | {name: value}
    with pytest.raises(TypeCheckError) as caught:
        attend_typed(**call)
    assert str(caught.value) == f"{name}: {message}"
    assert "Called with parameters" in str(caught.value.__cause__)


def test_the_first_misfit_is_named() -> None:
    query, key, value = qkv()
    with pytest.raises(TypeCheckError, match="^value: expected .*, got 3$"):
        attend_typed(query, key, 3, sinks=torch.zeros(4))  # type: ignore[arg-type]


def test_errors_from_inside_pass_unchanged() -> None:
    def outer(query: Float[Tensor, "n d"], key: Float[Tensor, "m d"]) -> None:
        raise TypeCheckError("from inside")

    for query in (torch.zeros(2, 3), torch.zeros(2, 3, device="meta")):
        with pytest.raises(TypeCheckError, match="^from inside$"):
            typed(outer)(query, query)


def test_the_return_annotation_is_not_checked() -> None:
    def wrong(x: Float[Tensor, " n"]) -> Float[Tensor, "n n"]:
        return x

    assert typed(wrong)(torch.zeros(3)).shape == (3,)


def test_jaxtyping_can_be_disabled() -> None:
    def vector(x: Float[Tensor, " n"]) -> Tensor:
        return x

    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        assert typed(vector)(torch.zeros(2, 3)).shape == (2, 3)
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


def test_too_many_names_are_refused_at_decoration() -> None:
    def many(x: Float[Tensor, " ".join(f"axis{i}" for i in range(33))]) -> None: ...

    with pytest.raises(ValueError, match="more than 32 names"):
        typed(many)


# ---- plain ----


def test_plain_tells_which_way_a_call_may_go() -> None:
    tensor, parameter = torch.zeros(2), torch.nn.Parameter(torch.zeros(2))
    frozen = torch.nn.Parameter(torch.zeros(2), requires_grad=False)
    assert _C.plain() == _C.plain(None, tensor, frozen) == 1
    assert _C.plain(tensor, None, parameter) == _C.plain(parameter * 2) == 2
    assert _C.plain(parameter, tensor.as_subclass(Subclass)) == _C.plain(np.zeros(2)) == 0
