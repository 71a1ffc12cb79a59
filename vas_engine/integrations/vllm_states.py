"""The last hidden states inside vLLM, for action heads: seen where it makes logits of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from weakref import WeakSet

import numpy as np
import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.model_executor.custom_op import op_registry_oot
from vllm.model_executor.layers.logits_processor import LogitsProcessor

from vas_engine.errors import InvalidArgumentError
from vas_engine.model.backend import resolve_backend
from vas_engine.model.batch import AttentionBatch
from vas_engine.model.lm import CausalLM
from vas_engine.values.artifact import load_value, read_config
from vas_engine.values.files import read_json
from vas_engine.values.network import ValueNetwork

SETTING = "vas_values"
"""Key in vLLM's `additional_config`."""

_layers: WeakSet[WatchedLogits] = WeakSet()


def register() -> None:
    """Has vLLM build `WatchedLogits`; called in each of its processes before models are (entry point
    `vllm.general_plugins`).
    """
    if op_registry_oot.get(LogitsProcessor.__name__) is not WatchedLogits:
        LogitsProcessor.register_oot(WatchedLogits)


class WatchedLogits(LogitsProcessor):
    """vLLM's layer that makes logits, which also shows the last hidden states that it was given, [rows, H].

    vLLM lets plugins put layers of their own in the place of its own (`PluggableLayer.register_oot`). This one runs
    outside of what it compiles or captures, on the rows that are sampled from.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.engine = get_current_vllm_config()
        self.states: Tensor | None = None
        _layers.add(self)

    def forward(self, lm_head: Any, hidden_states: Tensor, *rest: Any, **options: Any) -> Any:
        if (self.engine.additional_config or {}).get(SETTING):
            self.states = hidden_states
        return super().forward(lm_head, hidden_states, *rest, **options)


def find_states(engine: Any, rows: int) -> Tensor | None:
    """The hidden states [rows, H] behind the logits of so many rows, of the engine with this config."""
    for layer in _layers:
        if layer.engine is engine and layer.states is not None and len(layer.states) == rows:
            return layer.states
    return None


def is_head(folder: str | Path) -> bool:
    """Whether a folder holds an action head, not a value model or a checkpoint with one."""
    path = Path(folder) / "config.json"
    config = read_json(path) if path.is_file() else {}
    return "format_version" in config and config.get("kind") == "action"


class _Base:
    """A base model as an action head sees it once it is loaded: sizes, fingerprint, embeddings."""

    tensor_parallel_size = 1

    def __init__(self, lm: CausalLM, device: Any) -> None:
        self.vocab_size, self.hidden_size, self.num_layers = lm.vocab_size, lm.hidden_size, lm.num_layers
        self.dtype, self.device, self.fingerprint = lm.dtype, torch.device(device), lm.fingerprint
        self.attention_backend = resolve_backend("auto", self.device, self.dtype)
        self._embed = lm.embed

    def embed(self, token_ids: Tensor) -> Tensor:
        return self._embed(token_ids.cpu()).to(self.device)

    def let_go(self) -> None:
        """Of the model; its projected embeddings are in the head."""
        del self._embed, self.fingerprint


class HeadValues:
    """Head outputs of candidates by an action head.

    Args:
        folder: of the value.
        model, revision: the base model's folder or name. It is read once, into the host's memory, to see that the two
            belong together and for its embeddings.
        dtype, device: of the base model in vLLM.
        tokenizer: the base model's, to be compared.

    Raises:
        InvalidArgumentError: a head on other hidden states than the last. ValueArtifactError: as `load_value`.
    """

    def __init__(
        self, folder: str | Path, model: str, revision: str | None, dtype: torch.dtype, device: Any, tokenizer: Any
    ) -> None:
        lm = CausalLM.load(model, "cpu", dtype, revision=revision)
        states = read_config(folder).states
        if states != (lm.num_layers,):
            fix = (
                f"it reads the hidden states {list(states)}, vLLM shows the last one only; train one with "
                f"`vas train --kind action --states {lm.num_layers}`"
            )
            raise InvalidArgumentError("values", str(folder), fix)
        base: Any = _Base(lm, device)
        value = load_value(folder, base, tokenizer=tokenizer)
        assert isinstance(value, ValueNetwork)
        base.let_go()
        self.value = value

    def score(self, states: Tensor, lengths: Sequence[int], candidates: Sequence[np.ndarray]) -> list[Tensor]:
        """Head outputs of sequences' candidates in one pass.

        Args:
            states: [S, H], the last hidden state of each sequence.
            lengths: tokens of each. candidates: int64 [c] token ids of each.

        Returns:
            Of each sequence [1 + c, O] float32; the first line, of the sequence itself, is zeros: its value takes the
            state before it, which vLLM shows of no prompt.
        """
        device = self.value.lm.device  # type: ignore[union-attr]
        owner = np.repeat(np.arange(len(candidates)), [len(tokens) for tokens in candidates])
        positions = np.asarray(lengths, np.int64)[owner]
        table, unslotted = np.zeros((1, 1), np.int32), np.full(len(owner), -1, np.int64)
        batch = AttentionBatch.build(table, [0, len(owner)], positions, unslotted, device)
        tokens = torch.from_numpy(np.concatenate(candidates).astype(np.int64)).to(device)
        output = self.value.score(tokens, states, torch.from_numpy(owner).to(device), batch).float().cpu()
        parts = output.split([len(tokens) for tokens in candidates])
        return [torch.cat([part.new_zeros(1, part.shape[1]), part]) for part in parts]
