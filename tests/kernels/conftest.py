"""Triton kernels run under its interpreter where there is no GPU. The decorator of a kernel looks for the setting, so
it is made here, before any module of kernels is imported."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import numpy as np
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def _mend_interpreter() -> None:
    """What the interpreter of Triton up to 3.6 gets wrong; on later ones this changes nothing."""
    import triton.language as tl
    from triton.runtime import interpreter
    from triton.runtime.jit import JITFunction

    patch, builder = interpreter._patch_lang_tensor, interpreter.InterpreterBuilder
    if getattr(patch, "mended", False):
        return
    dot = builder.create_dot

    def patch_and_mend(tensor: Any, *scope: Any) -> None:
        """Scalars are arrays of one element, which NumPy 2.4 no longer takes for integers, such as ends of loops."""
        patch(tensor, *scope)
        place = scope[0].set_attr if scope else setattr
        place(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def widened(operand: Any) -> Any:
        """bfloat16 is kept as the 16-bit integers of its bits, which the product takes at their face value."""
        if operand.dtype.scalar != tl.bfloat16 or operand.data.dtype != np.uint16:
            return operand
        return interpreter.TensorHandle((operand.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Functions of Triton's own library are interpreted too, if Triton was imported before the setting was made."""
        return interpreter.InterpretedFunction(self.fn)(*args, **kwargs)

    patch_and_mend.mended = True
    JITFunction.__call__ = call
    interpreter._patch_lang_tensor = patch_and_mend
    builder.create_dot = lambda self, a, b, *more: dot(self, widened(a), widened(b), *more)


if importlib.util.find_spec("triton") is not None and os.environ.get("TRITON_INTERPRET"):
    _mend_interpreter()
