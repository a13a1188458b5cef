"""Lets Triton's interpreter run beside NumPy 2.4, which no longer turns arrays of one element into ints."""

import triton.runtime.interpreter as interpreter

_patch = interpreter._patch_lang_tensor


def _patch_lang_tensor(tensor, scope):
    _patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


interpreter._patch_lang_tensor = _patch_lang_tensor
