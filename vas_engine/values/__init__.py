"""Value networks and value models: what scores candidates, how it is saved and loaded."""

from vas_engine.values.artifact import load_value, read_config, save_value
from vas_engine.values.config import HeadConfig, Support, ValueConfig, default_config
from vas_engine.values.heads import Heads
from vas_engine.values.network import ValueNetwork
from vas_engine.values.scorer import Scorer
from vas_engine.values.value_model import ValueModel

__all__ = [
    "HeadConfig",
    "Heads",
    "Scorer",
    "Support",
    "ValueConfig",
    "ValueModel",
    "ValueNetwork",
    "default_config",
    "load_value",
    "read_config",
    "save_value",
]
