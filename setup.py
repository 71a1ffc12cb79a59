"""Builds the C++ extensions; everything else is in pyproject.toml.

Hosts without a compiler say so by VAS_ENGINE_WITHOUT_CPP=1; the reference in torch then serves.
"""

import os
from glob import glob

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import setup

ParallelCompile().install()

# Tuned code paths are chosen at run time, so one wheel runs on any x86-64 (and plain C++ elsewhere).
FLAGS = ["-O3", "-fvisibility=hidden", "-pthread"]


def extension(name: str, pattern: str) -> Pybind11Extension:
    sources = sorted(glob(pattern))
    return Pybind11Extension(
        f"vas_engine.{name}", sources, cxx_std=17, extra_compile_args=FLAGS, depends=sorted(glob("csrc/*.h"))
    )


extensions = [extension("_sampling", "csrc/sampling*.cpp"), extension("_attention", "csrc/attention*.cpp")]
setup(ext_modules=[] if os.environ.get("VAS_ENGINE_WITHOUT_CPP") == "1" else extensions)
