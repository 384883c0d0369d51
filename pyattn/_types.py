"""The names of axes, and `typed`, which checks a call against them.

The axes, as annotations spell them and, abbreviated, as code does:

=========  ===  ==========================================================================
*batch     B    any number of leading axes, none included, equal for all operands;
                *q_batch, *k_batch and *v_batch where they need only broadcast together
q_heads    Hq   heads of the query, a multiple of
kv_heads   Hkv  heads of key and value; query head h reads head h // (q_heads // kv_heads)
q_len      L    queries
kv_len     S    keys, and as many values
head_dim   D    width of a query and of a key
v_dim      Dv   width of a value, and so of the output
seq        T    tokens of a sequence that are both queries and keys
d_model    E    width of a token over all heads; d_value where values have their own
tokens     N    rows, of whatever sequences
features   F    width of a row
classes    V    labels, or words of a vocabulary
=========  ===  ==========================================================================

Annotations are jaxtyping's: ``Float[Tensor, "*batch q_heads q_len head_dim"]``. Within one call an axis has one size.
"""

import functools
import inspect
import numbers
import re
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple, ParamSpec, TypeVar, Union, cast, get_args, get_origin

import torch
from jaxtyping import AbstractArray, Shaped, TypeCheckError, jaxtyped
from torch import Tensor

from . import _C
from ._checks import DtypeError, ShapeError, check_dense, dtype_hint

P = ParamSpec("P")
R = TypeVar("R")


def typed(function: Callable[P, R]) -> Callable[P, R]:
    """Check the arguments of every call against the annotations, as ``jaxtyped(typechecker=beartype)`` would.

    The annotations are compiled once, here, for a check in C++ that adds 0.5 to 0.6 us to a call with three tensors and
    two keywords, whether or not the shapes were seen before (jaxtyping and beartype: 31 us; Zen 3, November 2026). It
    accepts only what is certain. Everything else goes to jaxtyping and beartype, which accept it or explain: tensor
    subclasses, fake and meta tensors, tensors inside ``torch.func`` transforms, and what does not fit. NumPy's numbers
    are converted there to Python's, which the function is then called with.

    Right but always slow: a parameter whose annotation is neither a class, a literal, None nor a tensor over plain
    axes, nor a union of these; or is a union of two tensor types that share a dtype.

    - Under ``torch.compile`` there is no check; the ops' fake implementations check what they are given.
    - The return annotation is not checked: it is for readers and static checkers, and what a kernel returns was
      allocated from the shapes just checked.
    - ``JAXTYPING_DISABLE=1`` lets every call pass.

    Raises, when called:
        ShapeError: a tensor's shape does not fit; the message names the argument, the expected and the actual shape.
        DtypeError: a tensor's dtype does not fit.
        TypeError: a tensor is sparse or nested.
        jaxtyping.TypeCheckError: anything else does not fit; the message names the argument. All are TypeErrors, and
            jaxtyping's own message, with all arguments, is their cause.
    """
    signature = inspect.signature(function, eval_str=True)
    accepts = _C.compile_signature(_compile(signature))
    strict = functools.cache(functools.partial(_strict, function, signature))

    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        call = signature.bind(*args, **kwargs)
        for name, value in call.arguments.items():
            call.arguments[name] = _python_number(value, signature.parameters[name].annotation)
            if isinstance(value, Tensor):
                check_dense(name, value)
        try:
            strict()(*call.args, **call.kwargs)
        except TypeCheckError as error:
            explained = _explain(signature, call.arguments)
            if explained is None:
                raise
            error.__cause__ = None  # beartype's stack, which says the same as jaxtyping's message
            raise explained from error
        return function(*call.args, **call.kwargs)

    return _front(function, signature, accepts, checked)


def _front(
    function: Callable[P, R],
    signature: inspect.Signature,
    accepts: Callable[..., bool],
    checked: Callable[P, R],
) -> Callable[P, R]:
    """`function`, or `checked` in its place unless `accepts` takes the arguments.

    The function is generated with the parameters of `function` written out, because ``*args, **kwargs`` would pack
    and unpack a dict: 0.56 us in place of 0.91 for three tensors and two keywords. It also leaves missing and unknown
    arguments to Python's own messages. Under dynamo the first test folds to True, and what dynamo could not trace is
    never reached.
    """
    name = function.__name__
    parameters = signature.parameters.values()
    if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
        raise TypeError(f"typed: {name} has *args or **kwargs, which have no annotations to compile; name them")
    plain = [p.replace(annotation=p.empty, default=p.default if p.default is p.empty else None) for p in parameters]
    head = signature.replace(parameters=plain, return_annotation=signature.empty)
    values = ", ".join(p.name for p in parameters)
    arguments = ", ".join(f"{p.name}={p.name}" if p.kind is p.KEYWORD_ONLY else p.name for p in parameters)
    source = f"""
def make(_function, _accepts, _checked, _is_dynamo_compiling):
    def {name}{head}:
        if _is_dynamo_compiling() or _accepts({values}):
            return _function({arguments})
        return _checked({arguments})
    return {name}
"""
    scope: dict[str, Any] = {}
    exec(compile(source, f"<typed {name}>", "exec"), function.__globals__, scope)
    front = scope["make"](function, accepts, checked, torch.compiler.is_dynamo_compiling)
    front.__defaults__, front.__kwdefaults__ = function.__defaults__, function.__kwdefaults__
    return cast(Callable[P, R], functools.update_wrapper(front, function))


# ---- Annotations to the form that csrc/signature.cpp reads ----


class _Axis(NamedTuple):
    kind: int
    broadcastable: bool
    value: int  # a fixed axis: its size; a named axis or run: the number of its name


_ANY, _FIXED, _NAMED, _ANY_RUN, _NAMED_RUN = range(5)  # Axis::Kind


class _Pattern(NamedTuple):
    dtypes: tuple[tuple[int, int], ...]  # code and bits, as DLPack has them
    axes: tuple[_Axis, ...]


class _Accepted(NamedTuple):
    """What one parameter surely accepts."""

    classes: tuple[type, ...] = ()
    literals: tuple[object, ...] = ()
    patterns: tuple[_Pattern, ...] = ()


_NOTHING = _Accepted()


class _Names:
    """Numbers for the names of one signature. jaxtyping keeps `x` and `*x` apart, so there are two counts."""

    def __init__(self) -> None:
        self.axes: dict[str, int] = {}
        self.runs: dict[str, int] = {}

    def axis(self, name: str) -> int:
        return self.axes.setdefault(name, len(self.axes))

    def run(self, name: str) -> int:
        return self.runs.setdefault(name, len(self.runs))


class _NotCompiled(Exception):
    """An annotation that only jaxtyping and beartype can judge."""


# jaxtyping's name of a dtype -> DLPack's code and bits. A dtype that is not here takes the slow way.
_DLPACK_DTYPES = {
    "float32": (2, 32),
    "bfloat16": (4, 16),
    "float16": (2, 16),
    "float64": (2, 64),
    "bool": (6, 8),
    "int64": (0, 64),
    "int32": (0, 32),
    "int16": (0, 16),
    "int8": (0, 8),
    "uint8": (1, 8),
    "uint16": (1, 16),
    "uint32": (1, 32),
    "uint64": (1, 64),
    "complex64": (5, 64),
    "complex128": (5, 128),
}


def _compile(signature: inspect.Signature) -> tuple[_Accepted, ...]:
    names = _Names()
    return tuple(_compile_parameter(parameter.annotation, names) for parameter in signature.parameters.values())


def _compile_parameter(annotation: Any, names: _Names) -> _Accepted:
    classes: list[type] = []
    literals: list[object] = []
    patterns: list[_Pattern] = []
    try:
        for member in _members(annotation):
            if _is_array(member):
                patterns.append(_compile_array(member, names))
            elif get_origin(member) is Literal:
                literals += _compile_literal(member)
            else:
                classes.append(_compile_class(member))
    except _NotCompiled:
        return _NOTHING
    if patterns and any(issubclass(Tensor, cls) for cls in classes):
        return _NOTHING  # Tensor | Float[Tensor, "n"]: whether n is bound depends on the type checker's order
    return _Accepted(tuple(classes), tuple(literals), tuple(patterns))


def _members(annotation: Any) -> Iterator[Any]:
    """The annotation, or, if it is a union, what it is a union of."""
    if get_origin(annotation) in (Union, types.UnionType):
        for member in get_args(annotation):
            yield from _members(member)
    else:
        yield annotation


def _arrays(annotation: Any) -> list[Any]:
    return [member for member in _members(annotation) if _is_array(member)]


def _is_array(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, AbstractArray)


def _compile_class(annotation: Any) -> type:
    if annotation is Any or annotation is inspect.Parameter.empty:
        return object
    if annotation is None:
        return types.NoneType
    # beartype looks into the items of a class that derives from a generic one, such as class Names(list[str]).
    if not isinstance(annotation, type) or hasattr(annotation, "__orig_bases__"):
        raise _NotCompiled
    return annotation


def _compile_literal(annotation: Any) -> tuple[object, ...]:
    values = get_args(annotation)
    if any(type(value) not in (str, int, bool, bytes, types.NoneType) for value in values):
        raise _NotCompiled  # an enum may define equality by itself
    return values


def _compile_array(annotation: Any, names: _Names) -> _Pattern:
    if annotation.array_type is not Tensor:
        raise _NotCompiled
    dtypes = tuple(_DLPACK_DTYPES[name] for name in _dtypes(annotation))
    return _Pattern(dtypes, tuple(_compile_axis(token, names) for token in annotation.dim_str.split()))


def _dtypes(annotation: Any) -> list[str]:
    """The dtypes of torch that an annotation accepts, by name."""
    if annotation.dtypes is cast(Any, Shaped).dtypes:
        return list(_DLPACK_DTYPES)
    return [name for name in _DLPACK_DTYPES if name in annotation.dtypes]


def _compile_axis(token: str, names: _Names) -> _Axis:
    if token == "...":
        return _Axis(_ANY_RUN, False, 0)
    match = re.fullmatch(r"(?P<marks>[#*_]*)(?P<name>\w*)", token, re.ASCII)
    if match is None:
        raise _NotCompiled  # arithmetic ("n+1") and other syntax
    marks, name = match["marks"], match["name"]
    broadcastable = "#" in marks
    if name.isdecimal():
        return _Axis(_FIXED, broadcastable, int(name))
    if "_" in marks:
        return _Axis(_ANY_RUN if "*" in marks else _ANY, False, 0)
    if not name.isidentifier():
        raise _NotCompiled
    if "*" in marks:
        return _Axis(_NAMED_RUN, broadcastable, names.run(name))
    return _Axis(_NAMED, broadcastable, names.axis(name))


# ---- The full check ----


def _python_number(value: Any, annotation: Any) -> Any:
    """A NumPy scalar as the Python number that the annotation asks for: torch's own functions take either."""
    if isinstance(value, int | float) or not isinstance(value, numbers.Real):
        return value
    if not any(member in (int, float) for member in _members(annotation)):
        return value
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def _strict(function: Callable[..., object], signature: inspect.Signature) -> Callable[..., None]:
    """A function of the same parameters that jaxtyping and beartype check, and that does nothing else."""
    # Here, and not above: beartype takes 0.3 s to import, which a program without type errors never needs.
    from beartype import beartype

    def check(*args: object, **kwargs: object) -> None: ...

    for name in ("__module__", "__name__", "__qualname__"):
        setattr(check, name, getattr(function, name))
    check.__signature__ = signature.replace(return_annotation=inspect.Signature.empty)  # type: ignore[attr-defined]
    strict: Callable[..., None] = jaxtyped(check, typechecker=beartype)
    return strict


def _explain(signature: inspect.Signature, arguments: Mapping[str, Any]) -> TypeError | None:
    """The error in one line; None if each argument fits by itself."""
    name = _first_misfit(signature, arguments)
    if name is None:
        return None
    value, annotation = arguments[name], signature.parameters[name].annotation
    arrays = _arrays(annotation)
    if not isinstance(value, Tensor) or not arrays:
        is_array = isinstance(value, list | tuple) or hasattr(value, "__array__")
        hint = f"; torch.as_tensor({name}) makes a tensor of it" if arrays and is_array else ""
        return TypeCheckError(f"{name}: expected {_annotation_text(annotation)}, got {_value_text(value)}{hint}")
    of_dtype = [array for array in arrays if isinstance(value, array.dtype[Tensor, "..."])]
    if not of_dtype:
        names = dict.fromkeys(name for array in arrays for name in _dtypes(array))
        expected = f"{'one of ' * (len(names) > 1)}{', '.join(names)}"
        return DtypeError(f"{name}: expected {expected}, got {value.dtype}{dtype_hint(name, value.dtype)}")
    shapes = " or ".join(_shape_text(array) for array in of_dtype)
    known = _known_sizes(signature, arguments, name)
    clashes = [
        f"{axis}={known[axis][0]} (from {known[axis][1]})"
        for axis, size in _axis_sizes(of_dtype[0], value)
        if axis in known and known[axis][0] != size
    ]
    given = f" with {', '.join(clashes)}" if clashes else ""
    return ShapeError(f"{name}: expected shape {shapes}{given}, got {tuple(value.shape)}")


def _annotation_text(annotation: Any) -> str:
    names = (
        member.__name__ if isinstance(member, type) else inspect.formatannotation(member).replace("typing.", "")
        for member in _members(annotation)
    )
    return " | ".join("None" if name == "NoneType" else name for name in names)


def _value_text(value: Any) -> str:
    if value is None or isinstance(value, bool | int | float | str):
        return repr(value)
    if isinstance(value, type):
        return f"the class {value.__qualname__}"
    cls = type(value)
    return f"{'' if cls.__module__ == 'builtins' else cls.__module__ + '.'}{cls.__qualname__}"


def _first_misfit(signature: inspect.Signature, arguments: Mapping[str, Any]) -> str | None:
    """The first argument that does not fit, given those before it."""
    from beartype.door import is_bearable

    with jaxtyped("context"):
        for name, value in arguments.items():
            annotation = signature.parameters[name].annotation
            if annotation is not inspect.Parameter.empty and not is_bearable(value, annotation):
                return name
    return None


def _known_sizes(
    signature: inspect.Signature, arguments: Mapping[str, Any], until: str
) -> dict[str, tuple[int | tuple[int, ...], str]]:
    """The size of every axis that the arguments before `until` name, and the argument that named it."""
    known: dict[str, tuple[int | tuple[int, ...], str]] = {}
    for name, value in arguments.items():
        if name == until:
            break
        for array in _arrays(signature.parameters[name].annotation):
            if isinstance(value, array):
                for axis, size in _axis_sizes(array, value):
                    known.setdefault(axis, (size, name))
    return known


def _axis_sizes(array: Any, tensor: Tensor) -> Iterator[tuple[str, int | tuple[int, ...]]]:
    """The named axes of an annotation with their sizes in `tensor`; none if the rank does not fit."""
    tokens = array.dim_str.split()
    shape = tuple(tensor.shape)
    sizes: list[int | tuple[int, ...]] = list(shape)
    run = next((i for i, token in enumerate(tokens) if "*" in token or token == "..."), None)
    if run is not None:
        end = run + len(shape) - len(tokens) + 1
        sizes = [*shape[:run], shape[run:end], *shape[end:]]
    if len(sizes) == len(tokens):
        named = re.compile(r"\*?[A-Za-z]\w*")
        yield from ((token, size) for token, size in zip(tokens, sizes, strict=True) if named.fullmatch(token))


def _shape_text(array: Any) -> str:
    tokens = array.dim_str.split()
    return f"({tokens[0]},)" if len(tokens) == 1 else f"({', '.join(tokens)})"
