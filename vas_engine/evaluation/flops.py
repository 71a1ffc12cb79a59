"""Model FLOPs of decoding: two for every weight of a matrix a row goes through.

Counted are the base model's and the value networks' matrices, prompts included. Left out are attention's products
with keys and values (they depend on the length, and are small beside the matrices at these lengths), embeddings
looked up, norms and sampling, and the rewards' own models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import nn

from vas_engine.values.scorer import Scorer

if TYPE_CHECKING:
    from vas_engine.model.lm import CausalLM

__all__ = ["decoding_flops", "matrix_weights", "model_flops"]


def matrix_weights(module: nn.Module) -> int:
    """Weights that every row is multiplied with: all matrices but the embeddings that are looked up."""
    looked_up = {id(part.weight) for part in module.modules() if isinstance(part, nn.Embedding)}
    return sum(weight.numel() for weight in module.parameters() if weight.ndim > 1 and id(weight) not in looked_up)


def model_flops(lm: CausalLM, rows: float, tokens: float) -> float:
    """FLOPs of a language model over rows of its layers, and as many vocabulary projections as tokens are drawn."""
    head = lm.model.get_output_embeddings()
    vocabulary = head.weight.numel()
    tied = any(isinstance(part, nn.Embedding) and part.weight is head.weight for part in lm.model.modules())
    layers = matrix_weights(lm.model) - (0 if tied else vocabulary)
    return 2.0 * (layers * rows + vocabulary * tokens)


def decoding_flops(
    lm: CausalLM,
    networks: Sequence[Scorer],
    *,
    model_rows: float,
    tokens: float,
    value_rows: float,
    prompt_rows: float,
) -> float:
    """FLOPs of a run of the engine.

    Args:
        networks: those that score every one of the value rows.
        model_rows: rows of the base model, prompts and candidates included.
        tokens: drawn.
        value_rows: candidates scored.
        prompt_rows: tokens of the prompts, which networks with K/V of their own read too.
    """
    total = model_flops(lm, model_rows, tokens)
    for network in networks:
        rows = value_rows + (prompt_rows if network.cache_layers else 0)
        # The input's projection: of the state once a token, or of every candidate that was looked ahead to. The
        # candidates' embeddings are projected once and for all, in a table.
        state = getattr(network, "state_weight", None)
        table = getattr(network, "embed_weight", None)
        once = state.numel() if state is not None and network.input == "action" else 0
        apart = once + (table.numel() if table is not None else 0)
        total += 2.0 * ((matrix_weights(network) - apart) * rows + once * tokens)  # type: ignore[arg-type]
    return total
