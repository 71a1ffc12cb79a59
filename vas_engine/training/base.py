"""The frozen model as networks in training see it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from vas_engine.errors import TrainingDataError
from vas_engine.model.branches import Branches
from vas_engine.model.lm import DenseOutput
from vas_engine.training.batches import Batch, make_batch, plan_batches
from vas_engine.training.rollouts import Rollouts, load_states, shard_names

if TYPE_CHECKING:
    from vas_engine.model.lm import CausalLM

__all__ = ["FrozenBase", "read_states"]


class FrozenBase:
    """The frozen model to several networks: it runs once a batch for what any of them reads.

    What is read can also be kept: hidden states that were saved with the rollouts where they are enough, else
    everything in memory where it fits, so that the model runs once for all epochs.

    Args:
        lm: the model.
        networks: that read it.
        logits: whether its final state is wanted too, to work out logits.

    Attributes:
        source: where the states come from: "model" (run in every batch), "saved", "memory" or "none" (nobody
            reads any).
    """

    def __init__(self, lm: CausalLM, networks: Sequence[Any], logits: bool = False) -> None:
        self._lm = lm
        final = [lm.num_layers] if logits else []
        self._states = sorted({state for network in networks for state in network.states} | set(final))
        self._layers = sorted({layer for network in networks for layer in network.config.layers})
        self.source = "model" if self._states or self._layers else "none"
        self._store: _Store | None = None
        self._batch: Batch | None = None
        self._runs: dict[bool, tuple[torch.Tensor, Branches | None, DenseOutput]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._lm, name)

    @property
    def reads_final_only(self) -> bool:
        """Whether the final state is all that is read, so that saved ones are enough."""
        return self._states == [self._lm.num_layers] and not self._layers

    def use_saved(self, states: Sequence[torch.Tensor], rollouts: Rollouts) -> None:
        """Read the final states ([tokens, H] of each rollout) that were saved, if nothing else is needed.

        Raises:
            TrainingDataError: they are not those of the rollouts.
        """
        for index, (state, rollout) in enumerate(zip(states, rollouts, strict=True)):
            wanted = (rollout.length, self._lm.hidden_size)
            if state.shape != wanted:
                raise TrainingDataError(
                    f"the hidden states saved for rollout {index} are {list(state.shape)}, not {list(wanted)}: collect "
                    "again, or train without them"
                )
        if self.reads_final_only:
            self._store = _Store({self._lm.num_layers: list(states)}, {}, {})
            self.source = "saved"

    @torch.no_grad()
    def keep(self, rollouts: Rollouts, batch_tokens: int, memory: int, use_tqdm: bool = True) -> None:
        """Run the model over all rollouts now and keep what is read, if that fits into ``memory`` bytes."""
        lengths = [rollout.length for rollout in rollouts]
        if self.source != "model" or sum(lengths) * self._token_bytes() > memory:
            return
        count = len(rollouts)
        hidden, keys, values = (
            {place: [torch.empty(0)] * count for place in places}
            for places in (self._states, self._layers, self._layers)
        )
        store = _Store(hidden, keys, values)
        rewards = torch.zeros(count, 0)
        plan = plan_batches(lengths, range(count), batch_tokens)
        for indices in tqdm(plan, desc="base states", unit="batch", disable=not use_tqdm):
            batch = make_batch(rollouts, indices, rewards, self._lm.device)
            store.put(indices, lengths, self._run(batch.token_ids, batch.lengths, None))
        self._store, self.source = store, "memory"

    def _token_bytes(self) -> int:
        shapes = [self._lm.layer_shapes[layer] for layer in self._layers]
        numbers = len(self._states) * self._lm.hidden_size + sum(2 * s.kv_heads * s.head_dim for s in shapes)
        return numbers * self._lm.dtype.itemsize

    def take(self, batch: Batch) -> None:
        """The batch that is worked on from now on."""
        self._batch, self._runs = batch, {}

    def dense(
        self,
        token_ids: torch.Tensor,
        lengths: torch.Tensor | None = None,
        states: Sequence[int] = (),
        kv_layers: Sequence[int] = (),
        logits: bool = False,
        branches: Branches | None = None,
    ) -> DenseOutput:
        """As `CausalLM.dense`, from what is kept or was worked out for this batch already."""
        if logits or self._batch is None or token_ids is not self._batch.token_ids:
            return self._lm.dense(token_ids, lengths, states, kv_layers, logits, branches)
        found = self._runs.get(branches is not None)
        if found is None or found[0] is not token_ids or found[1] is not branches:
            if self._store is not None and branches is None:
                output = self._store.get(self._batch.indices, self._lm)
            else:
                output = self._run(token_ids, lengths, branches)
            found = self._runs[branches is not None] = (token_ids, branches, output)
        return found[2]

    @torch.no_grad()
    def final_states(self, batch: Batch) -> torch.Tensor:
        """[B, T, H] of the batch that is worked on, for logits; the model runs for them where they are not kept."""
        found = self.dense(batch.token_ids, batch.lengths).last_hidden
        return self._lm.dense(batch.token_ids, batch.lengths).last_hidden if found is None else found

    @torch.no_grad()
    def logits_at(self, batch: Batch, places: torch.Tensor) -> torch.Tensor:
        """Logits at places int64 [B, P] of the batch that is worked on: float32 [B, P, V]."""
        final = self.final_states(batch)
        final = final.gather(1, places[..., None].expand(-1, -1, final.shape[-1]))
        # Logits are made in inference mode; a copy is an ordinary tensor again.
        return self._lm.logits(final.flatten(0, 1)).float().clone().unflatten(0, places.shape)

    @torch.no_grad()
    def _run(self, token_ids: torch.Tensor, lengths: torch.Tensor | None, branches: Branches | None) -> DenseOutput:
        return self._lm.dense(token_ids, lengths, self._states, self._layers, branches=branches)


class _Store:
    """What is kept of each rollout: hidden states [tokens, H], keys and values [tokens, KVH, D]."""

    def __init__(
        self,
        hidden: dict[int, list[torch.Tensor]],
        keys: dict[int, list[torch.Tensor]],
        values: dict[int, list[torch.Tensor]],
    ) -> None:
        self.hidden, self.keys, self.values = hidden, keys, values

    def put(self, indices: Sequence[int], lengths: Sequence[int], output: DenseOutput) -> None:
        for kept, found in ((self.hidden, output.hidden), (self.keys, output.keys), (self.values, output.values)):
            for place, rows in kept.items():
                for index, row in zip(indices, found[place], strict=True):
                    row = row if row.dim() == 2 else row.transpose(0, 1)
                    # A copy, so that the rest of the batch is let go.
                    rows[index] = row[: lengths[index]].clone()

    def get(self, indices: Sequence[int], lm: CausalLM) -> DenseOutput:
        hidden, keys, values = (
            {place: pad_sequence([rows[i] for i in indices], batch_first=True) for place, rows in kept.items()}
            for kept in (self.hidden, self.keys, self.values)
        )
        hidden = {place: rows.to(lm.device, lm.dtype) for place, rows in hidden.items()}
        last: Any = hidden.get(lm.num_layers)
        keys, values = ({place: rows.transpose(1, 2) for place, rows in kept.items()} for kept in (keys, values))
        return DenseOutput(None, hidden, last, keys, values)


def read_states(folder: str | Path, rollouts: Rollouts) -> list[torch.Tensor] | None:
    """Final hidden states that `vas collect` saved beside a folder's rollouts, [tokens, H] each; None without any.

    Raises:
        TrainingDataError: some shards have them and some do not, or not as many as there are rollouts.
    """
    names = shard_names(folder)
    if not any((Path(folder) / name).with_suffix(".safetensors").exists() for name in names):
        return None
    states = [state for name in names for state in load_states(folder, name)]
    if len(states) != len(rollouts):
        raise TrainingDataError(
            f"{folder} has hidden states of {len(states)} responses and {len(rollouts)} rollouts: collect again"
        )
    return states
