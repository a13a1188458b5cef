"""Makes Triton's interpreter right where it is not: NumPy 2.4's integers, bf16 and E4M3."""

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

_patch = interpreter._patch_lang_tensor
_cast = interpreter.InterpreterBuilder.cast_impl
_convert = interpreter.InterpreterBuilder.create_fp_to_fp
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


def _fp_to_fp(builder, source, dtype, rounding):
    """To E4M3 likewise."""
    if (source.dtype.scalar, dtype.scalar) != (tl.float32, tl.float8e4nv):
        return _convert(builder, source, dtype, rounding)
    rounded = torch.from_numpy(np.asarray(source.data)).to(torch.float8_e4m3fn)
    return interpreter.TensorHandle(rounded.view(torch.uint8).numpy(), tl.float8e4nv)


def _create_dot(builder, a, b, *rest):
    """The interpreter holds bf16 and E4M3 as integers, and multiplies these."""
    return _dot(builder, _float32(a), _float32(b), *rest)


def _float32(handle):
    if handle.dtype.scalar == tl.float8e4nv:
        numbers = torch.from_numpy(np.ascontiguousarray(handle.data)).view(torch.float8_e4m3fn)
        return interpreter.TensorHandle(numbers.float().numpy(), tl.float32)
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    data = (handle.data.astype(np.uint32) << 16).view(np.float32)
    return interpreter.TensorHandle(data, tl.float32)


interpreter._patch_lang_tensor = _patch_lang_tensor
interpreter.InterpreterBuilder.cast_impl = _cast_impl
interpreter.InterpreterBuilder.create_fp_to_fp = _fp_to_fp
interpreter.InterpreterBuilder.create_dot = _create_dot
