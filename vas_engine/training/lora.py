"""Low-rank adapters (Hu et al. 2021) on a value model while it is trained."""

from __future__ import annotations

from typing import Any

from vas_engine.errors import VASError
from vas_engine.values.value_model import ValueModel

__all__ = ["Adapters"]


class Adapters:
    """LoRA on every linear layer of a value model's backbone, by peft; only they and the heads are then trained.

    The modules are changed in place and `remove` puts the plain layers back, so what is saved is an ordinary value
    model.

    Args:
        rank: of the adapters; their scale is 1 whatever the rank (alpha = rank).

    Raises:
        VASError: peft is not installed.
    """

    def __init__(self, network: ValueModel, rank: int) -> None:
        try:
            from peft import LoraConfig, get_peft_model
        except ImportError as error:
            raise VASError('LoRA needs peft: pip install "vas-engine[train]"') from error
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear")
        self._backbone = network.backbone
        self._adapted: Any = get_peft_model(network.backbone, config)

    def remove(self, merge: bool) -> None:
        """Take the adapters out: with ``merge`` what they learnt stays in the weights, without it is gone."""
        if merge:
            self._adapted.merge_and_unload()
        else:
            self._adapted.unload()
        self._backbone.requires_grad_(True)
