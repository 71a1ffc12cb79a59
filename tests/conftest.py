"""Settings of every test: tiny models run faster on one thread, and runs side by side do not fight for cores."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

torch.set_num_threads(1)

SHARED = Path(os.environ.get("VAS_SHARED", Path(__file__).resolve().parents[2] / "shared"))


def shared_model(name: str) -> Path:
    """Folder of a real model beside the repository; skips where it is absent."""
    folder = SHARED / "models" / name
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent; point VAS_SHARED at the folder that holds models/{name}")
    return folder
