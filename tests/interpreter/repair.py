"""Repairs of Triton's interpreter, where it is wrong without saying so. Written for triton 3.6.0.

bfloat16: the interpreter keeps its bit pattern as an integer and then computes with the integer. Here a bfloat16 is
held as the float32 of the same value: numpy then computes right, and every new value is rounded to the nearest even
bfloat16, as the hardware's conversion does.

float arguments: the kernels declare theirs `tl.float64`, which the interpreter does not look at.

Loop bounds: numpy 2.4 no longer converts an array of one element by int().

Calls: every call of a device function patches the whole of triton.language again, which took a third of the time; here
a launch does it once.
"""

from types import SimpleNamespace

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

Builder = interpreter.InterpreterBuilder
Handle = interpreter.TensorHandle


def round_to_bfloat16(x: np.ndarray) -> np.ndarray:
    """float32 values rounded to the nearest bfloat16, ties to even."""
    bits = x.view(np.uint32)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) & np.uint32(0xFFFF0000)
    return np.where(np.isnan(x), x, rounded.view(np.float32))


def to_bits(x: np.ndarray) -> np.ndarray:
    return (x.view(np.uint32) >> 16).astype(np.uint16)


def from_bits(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def is_bfloat16(dtype: tl.dtype) -> bool:
    return dtype.scalar == tl.bfloat16


def install() -> None:
    np_dtype, post_init = interpreter._get_np_dtype, Handle.__post_init__
    load, store = Builder.create_masked_load, Builder.create_masked_store
    cast, convert = Builder.cast_impl, Builder.create_fp_to_fp
    patch_tensor, implicit_cvt = interpreter._patch_lang_tensor, interpreter._implicit_cvt
    patch_language = interpreter._patch_lang

    def get_np_dtype(dtype: tl.dtype) -> np.dtype:
        return np.dtype(np.float32) if is_bfloat16(dtype) else np_dtype(dtype)

    def round_new_handle(self: Handle) -> None:
        if is_bfloat16(self.dtype) and self.data.dtype == np.float32:
            self.data = round_to_bfloat16(self.data)
        else:
            post_init(self)

    def masked_load(self, ptrs, mask, other, *options):
        if not is_bfloat16(ptrs.get_element_ty()):
            return load(self, ptrs, mask, other, *options)
        fill = np.zeros(ptrs.data.shape, np.uint16) if other is None else to_bits(other.data)
        bits = interpreter._interpreter.load(ptrs.data, mask.data, fill, np.dtype(np.uint16))
        return Handle(from_bits(bits), tl.bfloat16)

    def masked_store(self, ptrs, value, mask, *options):
        if is_bfloat16(ptrs.get_element_ty()):
            value = Handle(to_bits(value.data), tl.uint16)
        return store(self, ptrs, value, mask, *options)

    def cast_impl(self, src, dst_type):
        if is_bfloat16(src.dtype) or is_bfloat16(dst_type):
            return Handle(src.data.astype(get_np_dtype(dst_type)), dst_type.scalar)
        return cast(self, src, dst_type)

    def fp_to_fp(self, src, dst_type, rounding_mode):
        if is_bfloat16(src.dtype) or is_bfloat16(dst_type):
            return cast_impl(self, src, dst_type)
        return convert(self, src, dst_type, rounding_mode)

    def patch_lang_tensor(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def convert_argument(arg):
        if isinstance(arg, float):
            return tl.tensor(Handle(np.array([arg]), tl.float64), tl.float64)
        return implicit_cvt(arg)

    def patch_lang(kernel):
        # What it looks for is the names under which a function's module knows the language.
        return patch_language(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))

    interpreter._get_np_dtype = get_np_dtype
    Handle.__post_init__ = round_new_handle
    Builder.create_masked_load, Builder.create_masked_store = masked_load, masked_store
    Builder.cast_impl, Builder.create_fp_to_fp = cast_impl, fp_to_fp
    Builder.create_fabs = lambda self, x: self.unary_op(x, np.abs)
    Builder.get_bf16 = lambda self, value: Handle(np.array([value], np.float32), tl.bfloat16)
    interpreter._patch_lang_tensor = patch_lang_tensor
    interpreter._implicit_cvt = convert_argument
    interpreter._patch_lang = patch_lang
    interpreter.InterpretedFunction.__call__ = lambda self, *args, **kwargs: self.rewrite()(*args, **kwargs)
