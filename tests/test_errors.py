"""Every mistake is an error of its class that names the argument, on every way into the op.

The ways: `pyattn.attention`, where annotations are checked first; the dispatcher ops, forward and backward; and both of
them with fake tensors, as torch.compile and torch.export run them.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import pyattn
from pyattn import DeviceError, DtypeError, ShapeError
from pyattn._problem import AttentionConfig, Operands


def ones(*shape: int, **options: Any) -> Tensor:
    return torch.ones(shape, **options)


Arguments = dict[str, Any]  # by the names of the op's schema

GOOD: Arguments = {"q": ones(2, 6, 5, 4), "k": ones(2, 3, 7, 4), "v": ones(2, 3, 7, 8), "scale": 0.5}
FRONT_NAMES = {"seed": "dropout_seed"}


def front(arguments: Arguments) -> None:
    options = {FRONT_NAMES.get(name, name): x for name, x in arguments.items() if name not in ("q", "k", "v")}
    pyattn.attention_with_lse(arguments["q"], arguments["k"], arguments["v"], **options)


def op(arguments: Arguments) -> tuple[Tensor, Tensor]:
    operands = Operands(**{name: x for name, x in arguments.items() if name in Operands._fields})
    config = AttentionConfig(**{name: x for name, x in arguments.items() if name in AttentionConfig._fields})
    return torch.ops.pyattn.attention_forward(*operands, *config)


def backward_op(arguments: Arguments) -> None:
    operands = Operands(**{name: x for name, x in arguments.items() if name in Operands._fields})
    config = AttentionConfig(**{name: x for name, x in arguments.items() if name in AttentionConfig._fields})
    out = operands.q.new_empty((*operands.q.shape[:-1], operands.v.shape[-1]))
    lse = operands.q.new_empty(operands.q.shape[:-1], dtype=torch.float32)
    torch.ops.pyattn.attention_backward(out, None, out, lse, *operands, *config, True)


def with_fake_tensors(way: Callable[[Arguments], object]) -> Callable[[Arguments], None]:
    def call(arguments: Arguments) -> None:
        with FakeTensorMode() as mode:
            way({name: mode.from_tensor(x) if isinstance(x, Tensor) else x for name, x in arguments.items()})

    return call


OPS = {"op": op, "backward op": backward_op}
WAYS = {"front": front, **OPS}
WAYS |= {f"{name}, fake": with_fake_tensors(way) for name, way in WAYS.items()}
every_way = pytest.mark.parametrize("way", WAYS)


def expect(way: str, change: Arguments, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        WAYS[way](GOOD | change)
    assert type(caught.value) is error


@every_way
def test_the_good_call_is_good(way: str) -> None:
    """So each error below comes of its change."""
    WAYS[way](GOOD | {"bias": ones(6, 1, 7), "mask": ones(2, 1, 1, 7) > 0})


# The annotation states some of these, _checks.py all: the messages may differ, in words.
WRONG: dict[str, tuple[Arguments, type[Exception], str]] = {
    "query's rank": ({"q": ones(5, 4)}, ShapeError, r"^query: expected .*\*batch, .*got .*\(5, 4\)"),
    "key's rank": ({"k": ones(7, 4)}, ShapeError, r"^key: expected .*\*batch, .*got .*\(7, 4\)"),
    "value's rank": ({"v": ones(7, 8)}, ShapeError, r"^value: expected .*\*batch, .*got .*\(7, 8\)"),
    "integers": (
        {name: ones(2, 3, 5, 4, dtype=torch.int64) for name in ("q", "k", "v")},
        DtypeError,
        "^query: expected one of float32, bfloat16, float16, float64, got torch.int64",
    ),
    "key's dtype": (
        {"k": GOOD["k"].half()},
        DtypeError,
        "^key: expected query's dtype torch.float32, got torch.float16",
    ),
    "value's dtype": ({"v": GOOD["v"].double()}, DtypeError, "^value: .*float32, got torch.float64"),
    "bias's dtype": (
        {"bias": ones(5, 7).half()},
        DtypeError,
        "^bias: expected query's dtype torch.float32, got torch.float16",
    ),
    "bias's dtype, half query": (
        {name: GOOD[name].half() for name in ("q", "k", "v")} | {"bias": ones(5, 7).double()},
        DtypeError,
        r"^bias: expected query's dtype torch.float16 or the scores' torch.float32, got torch.float64; bias.to\(query",
    ),
    "key's device": ({"k": GOOD["k"].to("meta")}, DeviceError, "^key: expected query's device cpu, got meta"),
    "value's device": ({"v": GOOD["v"].to("meta")}, DeviceError, "^value: expected query's device cpu, got meta"),
    "bias's device": ({"bias": ones(7, device="meta")}, DeviceError, "^bias: expected query's device cpu, got meta"),
    "mask's device": (
        {"mask": ones(7, device="meta") > 0},
        DeviceError,
        "^mask: expected query's device cpu, got meta",
    ),
    "key's batch": ({"k": ones(3, 3, 7, 4)}, ShapeError, r"^key: expected .*batch.*2.*got .*\(3"),
    "value's batch": ({"v": ones(3, 7, 8)}, ShapeError, r"^value: expected .*batch.*2.*got .*\("),
    "head_dim": ({"k": ones(2, 3, 7, 9)}, ShapeError, "^key: expected .*head_dim.*4.*got .*9"),
    "value's heads": ({"v": ones(2, 2, 7, 8)}, ShapeError, "^value: expected .*3.*got .*2"),
    "kv_len": ({"v": ones(2, 3, 11, 8)}, ShapeError, "^value: expected .*kv_len.*7.*got .*11"),
    "head ratio": (
        {"q": ones(2, 5, 5, 4)},
        ShapeError,
        r"^query: .*multiple of key's.*got q_heads=5 and kv_heads=3; axes are .*transpose\(-3, -2\)",
    ),
    "no key heads": (
        {"k": ones(2, 0, 7, 4), "v": ones(2, 0, 7, 8)},
        ShapeError,
        "^query: .*multiple of key's.*got q_heads=6 and kv_heads=0",
    ),
    "bool bias": ({"bias": ones(5, 7) > 0}, DtypeError, "^bias: expected .*, got torch.bool; .* goes into mask=$"),
    "float mask": (
        {"mask": ones(5, 7)},
        DtypeError,
        r"^mask: expected bool, got torch.float32; .* go into bias=, .* with \(mask != 0\)$",
    ),
    "integer mask": (
        {"mask": ones(5, 7, dtype=torch.uint8)},
        DtypeError,
        r"^mask: expected bool, got torch.uint8; .* with \(mask != 0\)$",
    ),
    "sparse query": (
        {"q": GOOD["q"].to_sparse()},
        TypeError,
        r"^query: expected a dense tensor, got layout torch.sparse_coo; to_dense\(\) converts",
    ),
    "sparse key": ({"k": GOOD["k"].to_sparse()}, TypeError, "^key: expected a dense tensor, got layout torch.sp"),
    "sparse value": ({"v": GOOD["v"].to_sparse()}, TypeError, "^value: expected a dense tensor, got layout torch.s"),
    "sparse mask": (
        {"mask": (ones(5, 7) > 0).to_sparse()},
        TypeError,
        "^mask: expected a dense tensor, got layout torch.sparse_coo",
    ),
    "sparse bias": ({"bias": ones(5, 7).to_sparse()}, TypeError, "^bias: expected a dense tensor, got layout torch.sp"),
    "sparse seed": (
        {"dropout_p": 0.5, "seed": torch.tensor(1).to_sparse()},
        TypeError,
        "^dropout_seed: expected a dense tensor, got layout torch.sparse_coo",
    ),
    "mask's kv_len": ({"mask": ones(5, 2) > 0}, ShapeError, "^mask: axis kv_len must be 1 or 7, got 2"),
    "mask's q_len": ({"mask": ones(7, 7) > 0}, ShapeError, "^mask: axis q_len must be 1 or 5, got 7"),
    "mask's heads": ({"mask": ones(3, 1, 7) > 0}, ShapeError, "^mask: axis q_heads must be 1 or 6, got 3"),
    "mask's batch": ({"mask": ones(3, 1, 1, 1) > 0}, ShapeError, r"^mask: axis batch\[0\] must be 1 or 2, got 3"),
    "mask's rank": ({"mask": ones(1, 1, 1, 1, 1) > 0}, ShapeError, r"^mask: expected at most 4 .*\(1, 1, 1, 1, 1\)"),
    "bias's heads": ({"bias": ones(3, 1, 7)}, ShapeError, "^bias: axis q_heads must be 1 or 6, got 3"),
    "bias's size for an axis of size 1": (
        {"q": ones(2, 6, 1, 4), "bias": ones(5, 7)},
        ShapeError,
        r"^bias: axis q_len must be 1, got 5 \(shape \(5, 7\), to broadcast to \(2, 6, 1, 7\)\)",
    ),
    "bias's rank": ({"bias": ones(1, 1, 1, 1, 1)}, ShapeError, "^bias: expected at most 4 dimensions"),
    "scale is NaN": ({"scale": float("nan")}, ValueError, "^scale: expected a finite number, got nan"),
    "scale is infinite": ({"scale": float("inf")}, ValueError, "^scale: expected a finite number, got inf"),
    "scale beyond float32": ({"scale": -1e39}, ValueError, r"^scale: expected .*2\*\*127, .*float32, got -1e\+39"),
    "dropout_p below 0": (
        {"dropout_p": -0.1, "seed": torch.tensor(1)},
        ValueError,
        r"^dropout_p: expected a probability in \[0, 1\], got -0.1",
    ),
    "dropout_p above 1": ({"dropout_p": 1.1, "seed": torch.tensor(1)}, ValueError, "^dropout_p: .*got 1.1"),
    "dropout_p is NaN": ({"dropout_p": float("nan"), "seed": torch.tensor(1)}, ValueError, "^dropout_p: .*got nan"),
    "seed's rank": (
        {"dropout_p": 0.5, "seed": torch.tensor([1])},
        ShapeError,
        r"^dropout_seed: expected .*got .*\(1,\)",
    ),
    "seed's dtype": (
        {"dropout_p": 0.5, "seed": torch.tensor(1, dtype=torch.int32)},
        DtypeError,
        "^dropout_seed: expected .*int64.*got torch.int32",
    ),
    "seed's device": (
        {"dropout_p": 0.5, "seed": torch.tensor(1, device="meta")},
        DeviceError,
        "^dropout_seed: expected query's device cpu, got meta",
    ),
}


@every_way
@pytest.mark.parametrize("case", WRONG)
def test_wrong_operand(case: str, way: str) -> None:
    change, error, message = WRONG[case]
    expect(way, change, error, message)


NOT_DENSE: dict[str, tuple[Callable[[Tensor], Tensor], type[Exception], str]] = {
    "csr": (Tensor.to_sparse_csr, TypeError, r"a dense tensor, got layout torch.sparse_csr; to_dense\(\) converts"),
    "mkldnn": (Tensor.to_mkldnn, TypeError, r"a dense tensor, got layout torch._mkldnn; to_dense\(\) converts"),
    "nested": (lambda x: torch.nested.nested_tensor([*x]), TypeError, "a dense tensor, got a nested one; .*to_padded"),
    "jagged": (
        lambda x: torch.nested.nested_tensor([*x], layout=torch.jagged),
        TypeError,
        "a dense tensor, got a nested one; .*to_padded_tensor",
    ),
    "quantized": (
        lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
        DtypeError,
        r".*got torch.qint8; {0}.dequantize\(\) converts",
    ),
}


@pytest.mark.filterwarnings("ignore")  # torch's, that these kinds of tensors are prototypes, in beta or deprecated
@pytest.mark.parametrize("argument", ["query", "key", "value", "bias"])
@pytest.mark.parametrize("kind", NOT_DENSE)
def test_tensors_that_are_not_dense(kind: str, argument: str) -> None:
    convert, error, message = NOT_DENSE[kind]
    call = {"query": ones(2, 6, 5, 4), "key": ones(2, 6, 7, 4), "value": ones(2, 6, 7, 8), "bias": ones(6, 5, 7)}
    with pytest.raises(error, match=f"^{argument}: expected {message.format(argument)}"):
        pyattn.attention(**call | {argument: convert(call[argument])})


def test_a_gradient_that_is_not_dense() -> None:
    q = GOOD["q"].clone().requires_grad_()
    out = pyattn.attention(q, GOOD["k"], GOOD["v"])
    with pytest.raises(TypeError, match="^gradient of the output: expected a dense tensor, got layout torch.sparse_c"):
        out.backward(torch.ones_like(out).to_sparse())


@pytest.mark.parametrize("way", [way for way in WAYS if "op" in way])
def test_the_ops_need_a_seed_for_dropout(way: str) -> None:
    expect(way, {"dropout_p": 0.5}, ValueError, "^seed: dropout_p=0.5 needs a 0-d int64 tensor, got None")


@pytest.mark.parametrize("way", [way for way in WAYS if "op" in way])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"align": 7, "right": 0}, "^align: expected 0 .*, got 7"),
        ({"align": 1}, "^align, right: .*, got 1, None"),
        ({"right": 0}, "^align, right: .*, got 0, 0"),
        ({"align": 1, "right": 0, "prefix": -5}, "^prefix: .*, got -5 with right=0"),
        ({"prefix": 3}, "^prefix: .*, got 3 with right=None"),
    ],
)
def test_the_ops_refuse_scalars_that_mean_nothing(way: str, arguments: Arguments, message: str) -> None:
    expect(way, arguments, ValueError, message)


@pytest.mark.parametrize("missing", ["q", "k", "v"])
def test_an_operand_that_is_missing_is_not_ready(missing: str) -> None:
    operands = Operands(**{name: GOOD[name] for name in ("q", "k", "v")})._replace(**{missing: None})
    assert pyattn._C.attention_ready(operands, AttentionConfig(1.0)) == 0


IDS = torch.zeros(2, 7, dtype=torch.int64)
NOT_YET: dict[str, Arguments] = {
    "softcap": {"softcap": 30.0},
    "sinks": {"sinks": ones(6)},
    "left window": {"right": 0, "left": 3, "align": 1},
    "right window": {"right": 2, "align": 1},
    "lengths": {"lengths": IDS[:, 0]},
    "starts": {"starts": IDS[:, 0]},
    "q_segments": {"q_segments": IDS[:, :5]},
    "kv_segments": {"kv_segments": IDS},
}


FRONT_HAS = ("softcap", "sinks")  # the others have no argument yet


@pytest.mark.parametrize(
    ("feature", "way"), [(f, way) for f in NOT_YET for way in WAYS if "op" in way or f in FRONT_HAS]
)
def test_what_the_schema_names_and_nothing_computes(feature: str, way: str) -> None:
    """Accepted and ignored would be the worst answer."""
    expect(way, NOT_YET[feature], NotImplementedError, f"{feature}.*no backend .* computes it yet")


def test_several_missing_features_are_all_named() -> None:
    expect("front", NOT_YET["softcap"] | NOT_YET["sinks"], NotImplementedError, r"softcap \(got 30.0\) and sinks")


@pytest.mark.parametrize("backend", ["cpu", "triton", "reference"])
def test_no_backend_is_a_way_around(backend: str) -> None:
    with pyattn.use_backend(backend):
        expect("front", NOT_YET["softcap"], NotImplementedError, "softcap")
        expect("op", NOT_YET["lengths"], NotImplementedError, "lengths")


def test_errors_are_those_that_handlers_expect() -> None:
    assert set(ShapeError.__mro__) >= {TypeError, ValueError, RuntimeError}
    assert set(DtypeError.__mro__) >= {TypeError, RuntimeError}
    assert set(DeviceError.__mro__) >= {ValueError, RuntimeError}


# ---- the mask objects ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (pyattn.Causal(), ValueError, r"^Causal: q_len=5 differs from kv_len=7, .*'upper_left'.*'lower_right'"),
        (pyattn.Causal("upper_left") & pyattn.Causal("lower_right"), ValueError, "different alignment"),
        (pyattn.Causal("upper_left") & ones(5, 7), DtypeError, "^mask: only bool tensors .*got torch.float32"),
        (ones(5, 7) & pyattn.Causal("upper_left"), DtypeError, "^mask: only bool tensors .*got torch.float32"),
        (pyattn.Causal("upper_left") & (ones(5, 6) > 0), ShapeError, "^mask: axis kv_len must be 1 or 7, got 6"),
    ],
)
def test_wrong_mask(mask: Any, error: type[Exception], message: str) -> None:
    expect("front", {"mask": mask}, error, message)


def test_wrong_causal() -> None:
    with pytest.raises(ValueError, match="^Causal: align must be 'upper_left', 'lower_right' or None, got 'left'"):
        pyattn.Causal("left")
    with pytest.raises(ValueError, match="^Causal: prefix must be a number of keys, 0 or more, got -1"):
        pyattn.Causal(prefix=-1)
    with pytest.raises(TypeError, match="unsupported operand"):
        pyattn.Causal() & 3
    with pytest.raises(TypeError, match="'numpy.ndarray' and 'Causal'"):  # not one of its elements
        np.ones((2, 2), dtype=bool) & pyattn.Causal()


def test_scale_at_the_ends_of_its_range() -> None:
    """Of products that are 0, so that only the scale can spoil the scores."""
    zeros, double = torch.zeros(2, 3, 5, 4), torch.zeros(2, 3, 5, 4, dtype=torch.float64)
    value = torch.randn(2, 3, 5, 4)
    for backend in ("cpu", "reference"):
        with pyattn.use_backend(backend):
            for scale in (2.0**127, -(2**127), 1e-300, 0):
                out = pyattn.attention(zeros, zeros, value, scale=scale)
                torch.testing.assert_close(out, value.mean(-2, keepdim=True).expand_as(out))
            for scale in (1e300, -(2**1023)):
                out = pyattn.attention(double, double, value.double(), scale=scale)
                torch.testing.assert_close(out, value.double().mean(-2, keepdim=True).expand_as(out))
    for scale in (2.0**127 * 1.001, 10**400):
        expect("front", {"scale": scale}, ValueError, "^scale: expected ")
    with pytest.raises(ValueError, match=r"^scale: expected .*2\*\*1023, .*float64, got 1.7e\+308"):
        pyattn.attention(double, double, double, scale=1.7e308)


def test_numpy_numbers_are_numbers() -> None:
    q, k, v = ones(2, 6, 5, 4), ones(2, 3, 5, 4), ones(2, 3, 5, 8)

    def call(number: type, integer: type) -> Tensor:
        mask = pyattn.Causal(prefix=integer(2))
        options = {"scale": number(0.5), "dropout_p": number(0.25), "dropout_seed": integer(3)}
        return pyattn.attention(q, k, v, mask=mask, **options)

    assert torch.equal(call(np.float32, np.int64), call(float, int))
    expect("front", {"scale": np.float32("nan")}, ValueError, "^scale: expected a finite number, got nan")
    expect("front", {"dropout_p": 0.5, "seed": np.uint64(2**63)}, ValueError, f"^dropout_seed: .* got {2**63}")


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((3, 5, 7), r"axis batch must be 1 or 2, got 3 \(shape \(3, 5, 7\), to broadcast to \(2, 5, 7\)\)"),
        ((2, 4, 7), "axis q_len must be 1 or 5, got 4"),
        ((2, 5, 6), "axis kv_len must be 1 or 7, got 6"),
        ((2, 1, 5, 7), r"expected at most 3 dimensions, broadcastable to \(batch, q_len, kv_len\) = \(2, 5, 7\)"),
    ],
)
def test_a_function_speaks_of_its_own_axes_and_arguments(shape: tuple[int, ...], message: str, device: str) -> None:
    q, kv, mask = ones(2, 5, 4, device=device), ones(2, 7, 4, device=device), ones(*shape, device=device)
    with pytest.raises(ShapeError, match=f"^mask: {message}"):
        pyattn.compute_attention(q, kv, kv, mask)
    with pytest.raises(ShapeError, match=f"^attn_mask: {message.replace('batch', 'q_heads')}"):
        pyattn.scaled_dot_product_attention(q, kv, kv, mask)


# ---- the other functions ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [2**63, -(2**63) - 1])
def test_seed_beyond_64_bits(seed: int) -> None:
    expect("front", {"dropout_p": 0.5, "seed": seed}, ValueError, f"^dropout_seed: expected an int64, got {seed}")
    expect("front", {"seed": seed}, ValueError, "^dropout_seed")  # whether dropout is on or not
    with pytest.raises(ValueError, match=f"^dropout_seed: expected an int64, got {seed}"):
        pyattn.dropout_mask(seed, 0.5, batch=1, q_heads=1, q_len=1, kv_len=1)
    with pytest.raises(ValueError, match=f"^dropout_seed: expected an int64, got {seed}"):
        pyattn.explain(pyattn.attention, GOOD["q"], GOOD["k"], GOOD["v"], dropout_p=0.5, dropout_seed=seed)


def test_dropout_mask_checks_its_arguments() -> None:
    with pytest.raises(ValueError, match="^dropout_p: .*got 2"):
        pyattn.dropout_mask(1, 2, batch=1, q_heads=1, q_len=1, kv_len=1)
    with pytest.raises(ValueError, match="^kv_len: expected a size, 0 or more, got -3"):
        pyattn.dropout_mask(1, 0.5, batch=1, q_heads=1, q_len=1, kv_len=-3)
    with pytest.raises(DtypeError, match="^dropout_seed: expected a 0-d int64 tensor, got torch.int32"):
        pyattn.dropout_mask(torch.tensor(1, dtype=torch.int32), 0.5, batch=1, q_heads=1, q_len=1, kv_len=1)


def test_explain_of_a_wrong_seed() -> None:
    seed = torch.tensor(1, dtype=torch.int32)
    with pytest.raises(DtypeError, match="^dropout_seed: .*got torch.int32"):
        pyattn.explain(pyattn.attention, GOOD["q"], GOOD["k"], GOOD["v"], dropout_p=0.5, dropout_seed=seed)


def test_more_dimensions_than_a_backend_takes() -> None:
    """The CPU kernels take 8; the reference any number."""
    x = ones(*[1] * 9)
    with pytest.raises(NotImplementedError, match="(?s)q: torch.float32 .*cpu: query has 9 dimensions, more than 8"):
        pyattn.attention(x, x, x)
    with pyattn.use_backend("reference"):
        assert pyattn.attention(x, x, x).shape == x.shape
    assert pyattn.attention(x[0], x[0], x[0]).shape == x[0].shape
