"""A tiny language model of little stories, shipped so that every example and test runs offline on a CPU."""

from pathlib import Path

__all__ = ["model_path"]


def model_path() -> Path:
    """Return the folder of the shipped model, to be given to ``from_pretrained``."""
    return Path(__file__).resolve().parent / "model"
