"""Triton's interpreter in the place of the compiler for CPUs that vLLM's Model Runner V2 wants there.

Imported before vLLM it selects Runner V2 in its CPU build. As a script it is vLLM's server: processes that vLLM spawns
import their parent's script first, and so have the interpreter too.
"""

import os
import runpy
from types import SimpleNamespace

os.environ |= {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"}

from triton.backends import Backend, backends

# vLLM asks no more than that the backend is there; interpreted kernels have no driver and no compiler.
backends["cpu"] = Backend(compiler=None, driver=SimpleNamespace(is_active=lambda: True))

import vllm.v1.sample.ops.topk_topp_sampler as topk_topp  # noqa: E402

# Its kernel calls a method of a loop variable, which is an int where it is interpreted; vLLM has the same in torch.
topk_topp.HAS_TRITON = False

if __name__ == "__main__":
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__")
