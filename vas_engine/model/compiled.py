"""Functions of a frozen model through torch.compile."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
import torch._inductor.config
import torch.fx.experimental._config

from vas_engine.errors import VASError

_inductor: Any = torch._inductor.config
_shapes: Any = torch.fx.experimental._config

MAX_ROWS = 2**16
"""Rows up to which compiled code serves."""
_EXAMPLE_ROWS = 16  # the number of rows by which the compiler judges whether threads pay


class CompiledFunction:
    """A function of tensors [1, R, ...], compiled once for every R in [1, MAX_ROWS], its weights constants.

    R is a symbol from the start: there is one compilation, no padding, and one copy of the weights in the
    layout that the compiler's matrix products want (besides the model's own).

    What the function reads other than its arguments is taken as it was when it was compiled. That is not
    checked at every call, as torch.compile would: going through all modules of a model would cost a good part
    of what a step saves. So nothing may change but the arguments, and what operators look up by themselves.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        # Compiled code hangs on the code object and is told apart by the checks that are left out here, so
        # every function needs a code object to itself.
        plain: Any = getattr(function, "__func__", function)
        own: Any = types.FunctionType(
            plain.__code__.replace(), plain.__globals__, plain.__name__, plain.__defaults__, plain.__closure__
        )
        if plain is not function:
            own = types.MethodType(own, function.__self__)  # type: ignore[attr-defined]
        self._run = torch.compile(
            own, fullgraph=True, options={"guard_filter_fn": torch.compiler.skip_all_guards_unsafe}
        )

    def compile(self, *arguments: torch.Tensor) -> None:
        """Compiles by a run over rows that all repeat the first of each argument.

        Raises:
            VASError: the function cannot be compiled here (no C++ compiler, say).
        """
        examples = [given[:, :1].repeat_interleave(_EXAMPLE_ROWS, dim=1) for given in arguments]
        for example in examples:
            torch._dynamo.mark_dynamic(example, 1, min=1, max=MAX_ROWS)
        on_cpu = examples[0].device.type == "cpu"
        settings = {
            # On a CPU weights are laid out anew and products that share an input become one, as they are on a GPU.
            "freezing": on_cpu,
            "cpp.enable_concat_linear": True,
            # Queries and keys are rotated by one kernel.
            "combo_kernels": not on_cpu,
            # Operators may keep what they are given (keys and values to commit), so nothing is written over.
            "allow_buffer_reuse": False,
            "inplace_buffers": False,
        }
        # Sizes of 1 are oblivious: a single row is not told apart from several.
        with _inductor.patch(settings), _shapes.patch(backed_size_oblivious=True):
            try:
                self._run(*examples)
            except Exception as error:
                raise VASError(
                    f"torch.compile failed ({type(error).__name__}: {_first_line(error)}); run eagerly instead "
                    "(enforce_eager=True)"
                ) from error

    def __call__(self, *arguments: torch.Tensor) -> Any:
        # Whoever resets torch.compile takes the code away; compiled again from here, without the settings
        # above, it would be wrong for another R. Better an error.
        with torch.compiler.set_stance("fail_on_recompile"):
            return self._run(*arguments)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "")
