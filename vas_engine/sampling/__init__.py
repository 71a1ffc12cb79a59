"""Candidate selection, keyed noise, tilt and winner, over arrays."""

from vas_engine.sampling.arrays import SamplingArrays
from vas_engine.sampling.backend import backend_name
from vas_engine.sampling.noise import fork_seed, gumbel_noise
from vas_engine.sampling.selection import Selection, select, select_on_device
from vas_engine.sampling.tilt import prune, tilt_limits, value_tilt
from vas_engine.sampling.winner import Winners, choose

__all__ = [
    "SamplingArrays",
    "Selection",
    "Winners",
    "backend_name",
    "choose",
    "fork_seed",
    "gumbel_noise",
    "prune",
    "select",
    "select_on_device",
    "tilt_limits",
    "value_tilt",
]
