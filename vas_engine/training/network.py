"""Fresh networks to be trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from vas_engine.errors import InvalidArgumentError, nearest
from vas_engine.values.base import base_fingerprint
from vas_engine.values.config import HeadConfig, ValueConfig, default_config
from vas_engine.values.network import ValueNetwork
from vas_engine.values.value_model import ValueModel

if TYPE_CHECKING:
    from vas_engine.model.lm import CausalLM

__all__ = ["make_network"]

SIZES = ("layers", "states", "width", "depth", "queries")


def make_network(
    lm: CausalLM,
    kind: str,
    heads: Sequence[HeadConfig],
    *,
    tokenizer: Any | None = None,
    seed: int = 0,
    backbone: Any | None = None,
    **sizes: Any,
) -> ValueNetwork | ValueModel:
    """Make a network of any kind with random weights (a value model: with its backbone's), bound to the base.

    Args:
        heads: see `vas_engine.training.fit.head_for`.
        tokenizer: of the base; a value then knows which one it belongs to.
        backbone: of kind "model": a folder, a loaded model or a CausalLM, of the base's vocabulary.
        sizes: in place of the kind's defaults: layers, states, width (the hidden layers keep their proportion
            to it), depth, queries.

    Raises:
        InvalidArgumentError: sizes that cannot work, or that the kind does not have.
    """
    for name in sizes:
        if name not in SIZES:
            raise InvalidArgumentError(name, sizes[name], f"unknown size; {nearest(name, SIZES)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if kind != "model":
            if backbone is not None:
                raise InvalidArgumentError("backbone", backbone, 'only a network of kind "model" has one')
            config = _resized(default_config(kind, lm, heads), sizes)
            # The default knows the model alone.
            config = config.replace(base=base_fingerprint(lm, tokenizer))
            return ValueNetwork(config).bind(lm, tokenizer)
        if backbone is None:
            raise InvalidArgumentError("backbone", None, "name the model that the value model starts from")
        if sizes:
            raise InvalidArgumentError(next(iter(sizes)), sizes, "a value model has the sizes of its backbone")
        return ValueModel.create(backbone, lm, heads, tokenizer)


def _resized(config: ValueConfig, sizes: dict[str, Any]) -> ValueConfig:
    changes = dict(sizes)
    width = sizes.get("width", 0)
    if config.width and isinstance(width, int) and width > 0:
        changes |= {name: getattr(config, name) * width // config.width for name in ("mlp", "head_hidden")}
        if config.depth:
            heads = -(-width // config.head_dim)
            changes |= {"num_heads": heads, "kv_heads": heads}
    return config.replace(**changes)
