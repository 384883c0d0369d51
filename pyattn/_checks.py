"""Error classes, and the checks that types cannot express.

Shapes that an annotation can state are checked by `typed` (see _types.py). Here is the rest: agreement of dtypes and
devices, the head ratio, what broadcasts to what, ranges of numbers. The eager path, the fake implementations (and so
torch.compile and torch.export) and the dispatcher ops all call these functions, so a mistake reads the same anywhere.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_QUANTIZED = (torch.qint8, torch.quint8, torch.qint32, torch.quint4x2, torch.quint2x4)


class ShapeError(TypeError, ValueError, RuntimeError):
    """A tensor has the wrong shape.

    jaxtyping's TypeCheckError is a TypeError, NumPy users expect a ValueError and torch raises RuntimeError:
    handlers written for any of the three keep working.
    """


class DtypeError(TypeError, RuntimeError):
    """A tensor has the wrong dtype, or tensors that must share one do not."""


class DeviceError(ValueError, RuntimeError):
    """Tensors that must share a device do not."""


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """What scores, sums and the log-sum-exp are computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def shape_text(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)}"


def dtype_hint(argument: str, dtype: torch.dtype) -> str:
    """The way out for an argument of the wrong dtype, to end a message with; empty where none is known."""
    if argument == "bias" and dtype == torch.bool:
        return "; a bool tensor, True = attend, goes into mask="
    if argument == "mask" and dtype in DTYPES:
        return "; terms to add to the scores go into bias=, a 0/1 mask becomes bool with (mask != 0)"
    if dtype in _QUANTIZED:
        return f"; {argument}.dequantize() converts"
    if argument in ("bias", "attn_mask") and dtype in DTYPES:
        return f"; {argument}.to(query.dtype) converts"
    if argument in ("mask", "attn_mask"):
        return f"; a 0/1 mask becomes bool with ({argument} != 0)"
    return ""


def check_dense(name: str, tensor: Tensor) -> None:
    if tensor.is_nested:
        raise TypeError(
            f"{name}: expected a dense tensor, got a nested one; torch.nested.to_padded_tensor makes it dense, and a "
            "mask hides the padding"
        )
    if tensor.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got layout {tensor.layout}; to_dense() converts")


class Names(NamedTuple):
    """What the function that the user called names these: two operands, and the axis before q_len and kv_len."""

    bias: str = "bias"
    mask: str = "mask"
    heads: str = "q_heads"


NAMES = Names()


def check_attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, mask: Tensor | None, names: Names = NAMES
) -> None:
    """Everything about the operands of attention that a kernel relies on; ranks and shared axes included, because
    the dispatcher op can be called without the typed front."""
    for name, tensor in (("query", query), ("key", key), ("value", value), (names.bias, bias), (names.mask, mask)):
        if tensor is not None:
            check_dense(name, tensor)
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() < 3:
            raise ShapeError(
                f"{name}: expected at least 3 dimensions, (*batch, heads, length, head_dim), got shape "
                f"{shape_text(tensor)}. For one head, insert the axis with {name}.unsqueeze(-3)."
            )
    if query.dtype not in DTYPES:
        raise DtypeError(f"query: expected one of float32, bfloat16, float16, float64, got {query.dtype}")
    for name, operand in (("key", key), ("value", value)):
        if operand.dtype != query.dtype:
            raise DtypeError(
                f"{name}: expected query's dtype {query.dtype}, got {operand.dtype}; {name}.to(query.dtype) converts"
            )
    scores_dtype = accumulation_dtype(query.dtype)
    if bias is not None and bias.dtype not in (query.dtype, scores_dtype):
        expected = f"query's dtype {query.dtype}"
        if scores_dtype != query.dtype:
            expected += f" or the scores' {scores_dtype}"
        if names.bias == names.mask:
            expected += " or torch.bool"
        hint = dtype_hint(names.bias, bias.dtype)
        raise DtypeError(f"{names.bias}: expected {expected}, got {bias.dtype}{hint}")
    for name, other in (("key", key), ("value", value), (names.bias, bias), (names.mask, mask)):
        if other is not None and other.device != query.device:
            raise DeviceError(f"{name}: expected query's device {query.device}, got {other.device}")

    batch, q_heads, q_len, head_dim = query.shape[:-3], query.shape[-3], query.shape[-2], query.shape[-1]
    kv_heads, kv_len = key.shape[-3], key.shape[-2]
    for name, operand in (("key", key), ("value", value)):
        if operand.shape[:-3] != batch:
            raise ShapeError(
                f"{name}: expected query's batch dimensions {tuple(batch)}, got {tuple(operand.shape[:-3])} "
                f"(query {shape_text(query)}, {name} {shape_text(operand)})"
            )
    if key.shape[-1] != head_dim:
        raise ShapeError(f"key: expected query's head_dim {head_dim} as last dimension, got {key.shape[-1]}")
    if value.shape[-3] != kv_heads:
        raise ShapeError(f"value: expected key's {kv_heads} heads, got {value.shape[-3]}")
    if value.shape[-2] != kv_len:
        raise ShapeError(
            f"value: expected key's kv_len {kv_len}, got {value.shape[-2]} (key {shape_text(key)}, "
            f"value {shape_text(value)})"
        )
    if q_heads % kv_heads if kv_heads else q_heads:
        raise ShapeError(
            f"query: its number of heads must be a multiple of key's (grouped-query attention), got q_heads={q_heads} "
            f"and kv_heads={kv_heads}; axes are (*batch, heads, length, head_dim), so transpose(-3, -2) where length "
            "comes before heads"
        )
    scores = (*batch, q_heads, q_len, kv_len)
    if bias is not None:
        check_broadcasts(names.bias, bias, scores, names.heads)
    if mask is not None:
        if mask.dtype != torch.bool:
            raise DtypeError(f"mask: expected bool, got {mask.dtype}{dtype_hint('mask', mask.dtype)}")
        check_broadcasts(names.mask, mask, scores, names.heads)


def check_broadcasts(name: str, tensor: Tensor, scores: Sequence[int], heads: str) -> None:
    """`tensor` must broadcast from the right to the shape of the scores."""
    axes = [*(f"batch[{i}]" for i in range(len(scores) - 3)), heads, "q_len", "kv_len"]
    if tensor.dim() > len(scores):
        raise ShapeError(
            f"{name}: expected at most {len(scores)} dimensions, broadcastable to ({', '.join(axes)}) = "
            f"{tuple(scores)}, got shape {shape_text(tensor)}"
        )
    for size, expected, axis in zip(reversed(tensor.shape), reversed(scores), reversed(axes), strict=False):
        if size != 1 and size != expected:
            allowed = "1" if expected == 1 else f"1 or {expected}"
            raise ShapeError(
                f"{name}: axis {axis} must be {allowed}, got {size} (shape {shape_text(tensor)}, to broadcast to "
                f"{tuple(scores)})"
            )


def check_scale(scale: float, dtype: torch.dtype) -> None:
    """Finite in what scores of `dtype` are computed in, and so times log2(e), since kernels may compute in base 2."""
    if not -math.inf < scale < math.inf:
        raise ValueError(f"scale: expected a finite number, got {scale}")
    accumulation = accumulation_dtype(dtype)
    exponent = 1023 if accumulation == torch.float64 else 127
    if not abs(scale) <= 2**exponent:
        raise ValueError(
            f"scale: expected a magnitude of at most 2**{exponent}, since scores are computed in "
            f"{accumulation}, got {scale}"
        )


def check_dropout_p(dropout_p: float) -> None:
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p: expected a probability in [0, 1], got {dropout_p}")


def check_seed(seed: int | Tensor, device: torch.device) -> None:
    """One int64; a tensor is on the query's device."""
    if not isinstance(seed, Tensor):
        if not -(2**63) <= seed < 2**63:
            raise ValueError(f"dropout_seed: expected an int64, got {seed}")
        return
    check_dense("dropout_seed", seed)
    if seed.dtype != torch.int64:
        raise DtypeError(f"dropout_seed: expected a 0-d int64 tensor, got {seed.dtype}")
    if seed.dim() != 0:
        raise ShapeError(f"dropout_seed: expected a 0-d int64 tensor, got shape {shape_text(seed)}")
    if seed.device != device:
        raise DeviceError(f"dropout_seed: expected query's device {device}, got {seed.device}")


def check_supported(
    sinks: Tensor | None,
    lengths: Tensor | None,
    starts: Tensor | None,
    q_segments: Tensor | None,
    kv_segments: Tensor | None,
    softcap: float,
    left: int | None,
    right: int | None,
) -> None:
    """The op's schema carries the whole contract; what no backend computes yet is refused here, on every path."""
    missing = [
        f"{name} (got {value!r})"
        for name, value, neutral in (("softcap", softcap, 0.0), ("left window", left, None))
        if value != neutral
    ]
    if right not in (None, 0):
        missing.append(f"right window (got {right!r}; 0, causal, is supported)")
    missing += [
        name
        for name, tensor in (
            ("sinks", sinks),
            ("lengths", lengths),
            ("starts", starts),
            ("q_segments", q_segments),
            ("kv_segments", kv_segments),
        )
        if tensor is not None
    ]
    if missing:
        raise NotImplementedError(
            f"{' and '.join(missing)}: part of the op's schema, but no backend (cpu, triton, reference) computes "
            "it yet. A bool mask or a bias expresses windows, lengths and segments today."
        )


# ---- cross-entropy ---------------------------------------------------------------------------------------------------

REDUCTIONS = ("none", "mean", "sum")
INDEX_DTYPES = (torch.int64, torch.uint8)  # torch's


def check_cross_entropy(
    input: Tensor, target: Tensor, weight: Tensor | None, reduction: str, ignore_index: int, label_smoothing: float
) -> None:
    """Everything about a cross-entropy that a kernel relies on, except that the indices are classes."""
    check_dense("input", input)
    if input.dim() == 0:
        raise ShapeError("input: expected shape (classes,) or (batch, classes, *positions), got ()")
    if input.dtype not in DTYPES:
        raise DtypeError(f"input: expected one of float32, bfloat16, float16, float64, got {input.dtype}")
    check_targets("input's", input.shape, input, target, weight, reduction, ignore_index, label_smoothing)


def check_targets(
    whose: str,
    logits: Sequence[int],
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
) -> None:
    """What is asked of logits of a shape, which is that of `whose`; they are on input's device and of its dtype."""
    for name, tensor in (("target", target), ("weight", weight)):
        if tensor is None:
            continue
        check_dense(name, tensor)
        if tensor.device != input.device:
            raise DeviceError(f"{name}: expected input's device {input.device}, got {tensor.device}")
    class_axis = min(len(logits) - 1, 1)
    classes, rows = logits[class_axis], (*logits[:class_axis], *logits[class_axis + 1 :])
    if target.shape == torch.Size(logits):
        if target.dtype not in DTYPES:
            raise DtypeError(
                f"target: expected class probabilities in a floating dtype, since it has {whose} shape "
                f"{tuple(logits)}, got {target.dtype}; class indices have shape {rows}"
            )
        if ignore_index >= 0:
            raise ValueError(f"ignore_index: does not apply to class probabilities, got {ignore_index}")
    elif target.shape != rows:
        raise ShapeError(
            f"target: expected shape {rows} for class indices, or {whose} {tuple(logits)} for class probabilities, "
            f"got {shape_text(target)}"
        )
    elif target.dtype not in INDEX_DTYPES:
        raise DtypeError(
            f"target: expected int64 or uint8 class indices, since it has shape {rows}, got {target.dtype}; "
            "target.long() converts"
        )
    if weight is not None:
        if weight.shape != (classes,):
            raise ShapeError(f"weight: expected shape ({classes},), a number per class, got {shape_text(weight)}")
        expected = DTYPES if target.is_floating_point() else (input.dtype,)
        if weight.dtype not in expected:
            raise DtypeError(
                f"weight: expected input's dtype {input.dtype}, got {weight.dtype}; weight.to(input.dtype) converts"
            )
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: expected one of {', '.join(map(repr, REDUCTIONS))}, got {reduction!r}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing: expected a number in [0, 1], got {label_smoothing}")


def check_linear(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None) -> None:
    """What linear layer and cross-entropy in one has before its logits; then check_cross_entropy applies to those."""
    for name, tensor in (("input", input), ("linear_weight", linear_weight), ("linear_bias", linear_bias)):
        if tensor is None:
            continue
        check_dense(name, tensor)
        if tensor.device != input.device:
            raise DeviceError(f"{name}: expected input's device {input.device}, got {tensor.device}")
        if tensor.dtype not in DTYPES:
            raise DtypeError(f"{name}: expected one of float32, bfloat16, float16, float64, got {tensor.dtype}")
        if tensor.dtype != input.dtype:
            raise DtypeError(
                f"{name}: expected input's dtype {input.dtype}, got {tensor.dtype}; {name}.to(input.dtype) converts"
            )
    if input.dim() not in (1, 2):
        hint = "; input.flatten(0, -2) and target.flatten() make rows of the leading axes" if input.dim() > 2 else ""
        raise ShapeError(f"input: expected shape (features,) or (tokens, features), got {shape_text(input)}{hint}")
    if linear_weight.dim() < 2 or linear_weight.shape[-1] != input.shape[-1]:
        raise ShapeError(
            f"linear_weight: expected shape (classes, features) or (classes, *positions, features) with features="
            f"{input.shape[-1]} (from input), got {shape_text(linear_weight)}"
        )
    if linear_weight.dim() > 2 and input.dim() == 1:
        raise ShapeError(
            f"input: expected shape (tokens, features), since linear_weight has positions "
            f"({shape_text(linear_weight)}), got {shape_text(input)}"
        )
    if linear_bias is not None and linear_bias.shape != linear_weight.shape[:-1]:
        raise ShapeError(
            f"linear_bias: expected linear_weight's shape without features, {tuple(linear_weight.shape[:-1])}, got "
            f"{shape_text(linear_bias)}"
        )


def check_class_indices(target: Tensor, classes: int, ignore_index: int) -> None:
    """Looks at every index; kernels do so on the way, and come here for the words."""
    if target.is_floating_point():
        return
    bad = (target != ignore_index) & ((target < 0) | (target >= classes))
    if bad.any():
        position: list[int] = bad.nonzero()[0].tolist()
        where = f" at position {position[0] if len(position) == 1 else tuple(position)}" if position else ""
        raise IndexError(
            f"target: expected class indices in [0, {classes}) or ignore_index={ignore_index}, got "
            f"{int(target[tuple(position)])}{where}"
        )


# ---- embedding bag ---------------------------------------------------------------------------------------------------

BAG_MODES = ("sum", "mean", "max")
ID_DTYPES = (torch.int64, torch.int32)
MAX_BAGS = 2**31 - 1  # and rows: kernels keep their numbers in 32 bits


def check_embedding_bag(
    weight: Tensor,
    input: Tensor,
    offsets: Tensor | None,
    per_sample_weights: Tensor | None,
    mask: Tensor | None,
    lengths: Tensor | None,
    mode: str,
    padding_idx: int | None,
    include_last_offset: bool,
    scale_grad_by_freq: bool,
    dropout_p: float,
) -> None:
    """Everything about an embedding bag that a kernel relies on, except what ids, offsets and lengths are."""
    for name, tensor in (
        ("weight", weight),
        ("input", input),
        ("offsets", offsets),
        ("per_sample_weights", per_sample_weights),
        ("mask", mask),
        ("lengths", lengths),
    ):
        if tensor is not None:
            check_dense(name, tensor)
            if tensor.device != weight.device:
                raise DeviceError(f"{name}: expected weight's device {weight.device}, got {tensor.device}")
    if weight.dim() != 2:
        raise ShapeError(f"weight: expected shape (vocabulary, features), got {shape_text(weight)}")
    if weight.dtype not in DTYPES:
        raise DtypeError(f"weight: expected one of float32, bfloat16, float16, float64, got {weight.dtype}")
    for name, tensor in (("input", input), ("offsets", offsets), ("lengths", lengths)):
        if tensor is not None and tensor.dtype not in ID_DTYPES:
            raise DtypeError(f"{name}: expected int64 or int32, got {tensor.dtype}; {name}.long() converts")
    if offsets is None:
        if input.dim() != 2:
            hint = "; one list of ids in bags takes offsets, the bags' starts" if input.dim() == 1 else ""
            raise ShapeError(f"input: expected shape (bags, tokens), got {shape_text(input)}{hint}")
        if include_last_offset:
            raise ValueError("include_last_offset: expected offsets, the last of which is the end, got None")
    else:
        if input.dim() != 1:
            raise ShapeError(
                f"input: expected shape (tokens,), since there are offsets, got {shape_text(input)}; the rows of a "
                "2-D input are bags by themselves"
            )
        if offsets.dim() != 1 or offsets.shape[0] < int(include_last_offset):
            expected = "(bags + 1,)" if include_last_offset else "(bags,)"
            raise ShapeError(f"offsets: expected shape {expected}, got {shape_text(offsets)}")
    bags = input.shape[0] if offsets is None else offsets.shape[0]
    for name, size in (("weight", weight.shape[0]), ("input" if offsets is None else "offsets", bags)):
        if size > MAX_BAGS:
            raise ShapeError(f"{name}: expected a first dimension of at most {MAX_BAGS}, got {size}")
    _check_tokens(input, offsets, weight.dtype, per_sample_weights, mask, lengths)
    check_bag_options(weight.shape[0], per_sample_weights, mode, padding_idx, scale_grad_by_freq)
    check_dropout_p(dropout_p)


def _check_tokens(
    input: Tensor,
    offsets: Tensor | None,
    dtype: torch.dtype,
    per_sample_weights: Tensor | None,
    mask: Tensor | None,
    lengths: Tensor | None,
) -> None:
    for name, tensor in (("per_sample_weights", per_sample_weights), ("mask", mask)):
        if tensor is not None and tensor.shape != input.shape:
            raise ShapeError(f"{name}: expected input's shape {shape_text(input)}, got {shape_text(tensor)}")
    if per_sample_weights is not None and per_sample_weights.dtype != dtype:
        raise DtypeError(
            f"per_sample_weights: expected weight's dtype {dtype}, got {per_sample_weights.dtype}; "
            "per_sample_weights.to(weight.dtype) converts"
        )
    if mask is not None and mask.dtype != torch.bool:
        raise DtypeError(f"mask: expected bool, True = the token counts, got {mask.dtype}; (mask != 0) converts")
    if lengths is None:
        return
    if offsets is not None:
        raise ValueError("lengths: do not go with offsets, which bound the bags already")
    if lengths.shape != input.shape[:1]:
        raise ShapeError(f"lengths: expected shape ({input.shape[0]},), one per bag, got {shape_text(lengths)}")


def check_bag_options(
    vocabulary: int, per_sample_weights: Tensor | None, mode: str, padding_idx: int | None, scale_grad_by_freq: bool
) -> None:
    if mode not in BAG_MODES:
        raise ValueError(f"mode: expected one of {', '.join(map(repr, BAG_MODES))}, got {mode!r}")
    if mode == "max" and per_sample_weights is not None:
        raise ValueError("per_sample_weights: a maximum has no weights; mode 'sum' or 'mean' has")
    if mode == "max" and scale_grad_by_freq:
        raise ValueError("scale_grad_by_freq: is not defined for mode 'max'; 'sum' and 'mean' have it")
    if padding_idx is not None and not 0 <= padding_idx < vocabulary:
        raise ValueError(
            f"padding_idx: expected a row of weight, in [-{vocabulary}, {vocabulary}), got "
            f"{padding_idx if padding_idx >= 0 else padding_idx - vocabulary}"
        )


def check_bags(
    weight: Tensor,
    input: Tensor,
    offsets: Tensor | None,
    mask: Tensor | None,
    lengths: Tensor | None,
    padding_idx: int | None,
    include_last_offset: bool,
) -> None:
    """Looks at every id, offset and length; kernels do so on the way, and come here for the words."""
    tokens = input.shape[-1]
    counts = torch.ones_like(input, dtype=torch.bool) if mask is None else mask
    if offsets is not None and offsets.shape[0] == int(include_last_offset):
        return  # no bags
    if offsets is not None:
        bounds = offsets.long() if include_last_offset else torch.cat([offsets.long(), offsets.new_tensor([tokens])])
        bad = (bounds < 0) | (bounds > tokens)
        bad[1:] |= bounds[1:] < bounds[:-1]
        bad[0] |= bounds[0] != 0
        if bad.any():
            bag = int(bad.nonzero()[0])
            raise ValueError(
                f"offsets: expected to start with 0, never to fall, and not to pass input's {tokens} ids, got "
                f"{int(bounds[bag])} at position {bag}"
            )
        counts = counts & (torch.arange(tokens, device=input.device) < bounds[-1])
    if lengths is not None:
        bad = (lengths < 0) | (lengths > tokens)
        if bad.any():
            bag = int(bad.nonzero()[0])
            raise ValueError(f"lengths: expected numbers in [0, {tokens}], got {int(lengths[bag])} at position {bag}")
        counts = counts & (torch.arange(tokens, device=input.device) < lengths.unsqueeze(-1))
    if padding_idx is not None:
        counts = counts & (input != padding_idx)
    bad = counts & ((input < 0) | (input >= weight.shape[0]))
    if bad.any():
        position: list[int] = bad.nonzero()[0].tolist()
        where = position[0] if len(position) == 1 else tuple(position)
        raise IndexError(
            f"input: expected ids in [0, {weight.shape[0]}), the rows of weight, got {int(input[tuple(position)])} at "
            f"position {where}"
        )


# ---- LSTM ------------------------------------------------------------------------------------------------------------


def check_lstm(
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    lengths: Tensor | None,
) -> None:
    """Everything about one layer of an LSTM that a kernel relies on, except that the lengths are lengths."""
    if input.dim() != 3:
        raise ShapeError(f"input: expected shape (batch, seq, features), got {shape_text(input)}")
    if weight_hh.dim() != 2:
        raise ShapeError(f"weight_hh: expected shape (4 * hidden, hidden), got {shape_text(weight_hh)}")
    if input.dtype not in DTYPES:
        raise DtypeError(f"input: expected one of float32, bfloat16, float16, float64, got {input.dtype}")
    batch, features, hidden = input.shape[0], input.shape[2], weight_hh.shape[1]
    expected = {
        "input": (input, tuple(input.shape)),
        "h0": (h0, (batch, hidden)),
        "c0": (c0, (batch, hidden)),
        "weight_ih": (weight_ih, (4 * hidden, features)),
        "weight_hh": (weight_hh, (4 * hidden, hidden)),
        "bias_ih": (bias_ih, (4 * hidden,)),
        "bias_hh": (bias_hh, (4 * hidden,)),
        "lengths": (lengths, (batch,)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is None:
            continue
        check_dense(name, tensor)
        if tensor.shape != shape:
            raise ShapeError(
                f"{name}: expected shape {shape} (input {shape_text(input)}, weight_hh {shape_text(weight_hh)}), got "
                f"{shape_text(tensor)}"
            )
        if name == "lengths":
            if tensor.dtype not in ID_DTYPES:
                raise DtypeError(f"lengths: expected int64 or int32, got {tensor.dtype}; lengths.long() converts")
        elif tensor.dtype != input.dtype:
            raise DtypeError(
                f"{name}: expected input's dtype {input.dtype}, got {tensor.dtype}; {name}.to(input.dtype) converts"
            )
        if tensor.device != input.device:
            raise DeviceError(f"{name}: expected input's device {input.device}, got {tensor.device}")


def check_lengths(lengths: Tensor | None, seq: int) -> None:
    """Looks at every length; kernels do so on the way, and come here for the words."""
    bad = None if lengths is None else (lengths < 0) | (lengths > seq)
    if lengths is not None and bad is not None and bad.any():
        sample = int(bad.nonzero()[0])
        raise ValueError(
            f"lengths: expected numbers of steps in [0, {seq}], got {int(lengths[sample])} of sample {sample}"
        )
