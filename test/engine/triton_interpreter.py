"""Makes Triton's interpreter right where it is not: NumPy 2.4's integers, and bf16."""

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_patch = interpreter._patch_lang_tensor
_cast = interpreter.InterpreterBuilder.cast_impl
_dot = interpreter.InterpreterBuilder.create_dot


def _patch_lang_tensor(tensor, scope):
    """NumPy 2.4 no longer turns arrays of one element into ints."""
    _patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


def _cast_impl(builder, source, dtype):
    """To bf16 the interpreter cuts off; a GPU rounds to nearest, ties to even."""
    if (source.dtype.scalar, dtype.scalar) != (tl.float32, tl.bfloat16):
        return _cast(builder, source, dtype)
    bits = source.data.view(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    data = np.where(np.isnan(source.data), 0x7FC0, rounded).astype(np.uint16)
    return interpreter.TensorHandle(data, tl.bfloat16)


def _create_dot(builder, a, b, *rest):
    """The interpreter holds bf16 as 16-bit integers, and multiplies these."""
    return _dot(builder, _float32(a), _float32(b), *rest)


def _float32(handle):
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    data = (handle.data.astype(np.uint32) << 16).view(np.float32)
    return interpreter.TensorHandle(data, tl.float32)


interpreter._patch_lang_tensor = _patch_lang_tensor
interpreter.InterpreterBuilder.cast_impl = _cast_impl
interpreter.InterpreterBuilder.create_dot = _create_dot
