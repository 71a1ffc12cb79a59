"""A frozen causal language model over paged keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from vas_engine.errors import InvalidArgumentError, UnsupportedModelError, VASError
from vas_engine.model.attention import AttentionState, LayerSpec, attach
from vas_engine.model.backend import resolve_backend
from vas_engine.model.batch import AttentionBatch
from vas_engine.model.branches import Branches, positions_of
from vas_engine.model.cache import KVCache, LayerShape
from vas_engine.model.compiled import MAX_ROWS, CompiledFunction
from vas_engine.model.fingerprint import vocabulary_hash, weights_hash
from vas_engine.model.loader import load_model
from vas_engine.model.merged import merge
from vas_engine.model.probe import decoder_layers, probe, settle
from vas_engine.model.ranks import all_heads, own_heads
from vas_engine.model.rotary import Rotary

PROBE_POSITION = 7


@dataclass
class ForwardOutput:
    """What one forward over R rows gives.

    Attributes:
        hidden: state index -> [R, H].
        last_hidden: [R, H], after the final norm.
    """

    hidden: dict[int, torch.Tensor]
    last_hidden: torch.Tensor


@dataclass
class DenseOutput:
    """What an uncached forward over whole sequences gives; entries at padding mean nothing.

    Attributes:
        logits: [B, T, V], or None.
        hidden: state index -> [B, T, H].
        keys, values: layer -> [B, KVH, T, D], keys after rotation.
        last_hidden: [B, T, H], after the final norm.
    """

    logits: torch.Tensor | None
    hidden: dict[int, torch.Tensor]
    last_hidden: torch.Tensor
    keys: dict[int, torch.Tensor] = field(default_factory=dict)
    values: dict[int, torch.Tensor] = field(default_factory=dict)


class _Given:
    """Stands for a backbone's output whose last hidden state is at hand; everything else a model may pass
    on is None."""

    def __init__(self, last_hidden_state: torch.Tensor) -> None:
        self.last_hidden_state = last_hidden_state

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, index: int) -> torch.Tensor | None:
        return self.last_hidden_state if index == 0 else None


class CausalLM:
    """A Hugging Face causal LM whose attention reads and writes pages; get one from :meth:`load`.

    Hidden states are numbered as transformers does: 0 the embeddings, j the output of layer j,
    ``num_layers`` the state after the final norm.

    Attributes:
        model: the transformers model. config: its (text) config. cache: pages, after :meth:`allocate`.
        layers: how each layer attends, on this rank. head: whether there is a language-model head.
        tensor_parallel_size: ranks that share the model; each has its part of every layer's heads, and all have the
            same hidden states and logits.
        compiled: whether :meth:`forward` and :meth:`logits` run compiled code.
    """

    def __init__(self, model: PreTrainedModel, attention_backend: str = "auto") -> None:
        self.model = model
        self.backbone: nn.Module = model.base_model
        self.config: Any = model.config.get_text_config()
        self.attention_backend = resolve_backend(attention_backend, self.device, self.dtype)
        self.cache: KVCache | None = None
        self.head = model.get_output_embeddings() is not None and self.backbone is not model
        self._state = AttentionState()
        attach(model, self._state)
        position = min(PROBE_POSITION, self.max_model_len - 1)
        probed = probe(model, self._state, position)
        self.layers: list[LayerSpec] = [entry.spec for entry in probed]
        self.tensor_parallel_size: int = model.tp_size or 1
        self._check_shares()
        self._rotary = Rotary(model, probed, position)
        self._decoder = decoder_layers(model, probed)
        self._state.layers = settle(model, probed)
        self._hooked: dict[int, Any] = {}
        self._captured: dict[int, torch.Tensor] = {}
        self._last: torch.Tensor | None = None
        self.backbone.register_forward_hook(self._keep_last)
        self._given: torch.Tensor | None = None
        self._run_backbone = self.backbone.forward
        self.backbone.forward = self._forward_backbone
        self._weights_hash: str | None = None
        self.compiled = False
        self._compiled: dict[tuple[int, ...], CompiledFunction] = {}
        self._compiled_head: CompiledFunction | None = None

    @classmethod
    def load(
        cls,
        model: str | Path | PreTrainedModel | PretrainedConfig,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        load_format: str = "auto",
        attention_backend: str = "auto",
        revision: str | None = None,
        tensor_parallel_size: int = 1,
    ) -> CausalLM:
        """Loads a folder or hub name, or takes a transformers model (which then answers to this object only).

        Args:
            model: folder, hub name, a loaded model (with or without a head), or a config (random weights).
            device: "auto" (CUDA where there is one) or a torch device.
            dtype: "auto" (the checkpoint's), "float32", "bfloat16", "float16".
            load_format: "auto", or "dummy" for random weights of the real shape.
            attention_backend: "auto", "cpp", "triton", "flash-attn" or "reference".
            revision: of a hub model.
            tensor_parallel_size: ranks that share it, as `LLM` says.

        Code that comes with a checkpoint is never run, and only safetensors are read.

        Raises:
            InvalidArgumentError: an argument that cannot work. UnsupportedModelError: attention that is not
                honoured.
        """
        loaded = load_model(model, device, dtype, load_format, revision, tensor_parallel_size)
        if loaded.device.type == "cuda" and tensor_parallel_size == 1:
            merge(loaded)
        return cls(loaded, attention_backend)

    # What it is

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def device(self) -> torch.device:
        return self.model.device

    @cached_property  # asked for with every step, and transformers looks for the embedding by name
    def vocab_size(self) -> int:
        """Width of the logits (of the embedding where there is no head)."""
        head = self.model.get_output_embeddings()
        module: Any = head if head is not None else self.model.get_input_embeddings()
        return module.weight.shape[0]

    @property
    def hidden_size(self) -> int:
        return self.config.hidden_size

    @property
    def num_layers(self) -> int:
        return self.config.num_hidden_layers

    @property
    def max_model_len(self) -> int:
        """Positions the model was made for."""
        found = getattr(self.config, "max_position_embeddings", None)
        return int(found) if found else 2**20

    @property
    def eos_token_ids(self) -> set[int]:
        """End-of-sequence tokens of the generation config and of the config, those there are logits for."""
        sources = (getattr(self.model, "generation_config", None), self.config)
        found = [getattr(source, "eos_token_id", None) for source in sources]
        named = {int(i) for e in found if e is not None for i in (e if isinstance(e, list | tuple) else [e])}
        return {i for i in named if 0 <= i < self.vocab_size}

    @property
    def layer_shapes(self) -> list[LayerShape]:
        return [LayerShape(spec.kv_heads, spec.head_dim) for spec in self.layers]

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    def fingerprint(self, tokenizer: Any | None = None) -> dict[str, str | None]:
        """``architecture``, ``weights`` (sha256, worked out once) and ``vocabulary`` (sha256, None without
        a tokenizer)."""
        if self._weights_hash is None:
            self._weights_hash = weights_hash(self.model)
        return {
            "architecture": type(self.model).__name__,
            "weights": self._weights_hash,
            "vocabulary": vocabulary_hash(tokenizer) if tokenizer is not None else None,
        }

    # Pages

    def allocate(self, num_blocks: int, block_size: int) -> KVCache:
        """Makes the pages (and drops those there were)."""
        self.cache = KVCache(self.layer_shapes, num_blocks, block_size, self.dtype, self.device, self.attention_backend)
        self._state.pages = self.cache.pages
        self._state.scratch = {}
        return self.cache

    def _pages(self) -> KVCache:
        if self.cache is None:
            raise VASError("no pages yet: call allocate(num_blocks, block_size) first")
        return self.cache

    # Running it

    @torch.inference_mode()
    def compile(self, states: Sequence[int] = ()) -> None:
        """Has :meth:`forward` and :meth:`logits` run code of torch.compile from now on.

        The code serves any number of rows and any pages, so this may come before :meth:`allocate`. Compiling
        takes about a second a layer in every process: torch keeps the kernels on disk, but not the graph
        around weights that are constants. Memory grows by a second copy of the weights. Results differ from
        the eager ones by rounding. The weights, and the number of threads torch uses, are to stay as they are.

        Args:
            states: hidden states that will be asked for; another set is compiled when it is first met.

        Raises:
            VASError: torch.compile does not work here, for want of a C++ compiler for one.
            UnsupportedModelError: several ranks share the model.
        """
        if self.tensor_parallel_size > 1:
            raise UnsupportedModelError(
                "a model that several ranks share is not compiled; leave out enforce_eager=False"
            )
        self._compiled_forward(self._captured_states(states))
        if self.head:
            self._compiled_logits()
        self.compiled = True

    @torch.inference_mode()
    def forward(
        self,
        token_ids: torch.Tensor,
        batch: AttentionBatch,
        states: Sequence[int] = (),
    ) -> ForwardOutput:
        """Runs R rows of any number of sequences at once; for logits of some see :meth:`logits`.

        Keys and values of slotted rows go to the pages; those of unslotted rows are kept until the next
        forward, for :meth:`commit`.

        Args:
            token_ids: int64 [R].
            batch: what each row sees and where it is written.
            states: indices of the hidden states that are wanted, of every row.
        """
        self._pages()
        if token_ids.shape != (batch.num_rows,):
            fix = f"needs one token for each of the batch's {batch.num_rows} rows"
            raise InvalidArgumentError("token_ids", tuple(token_ids.shape), fix)
        self._state.scratch = {}
        if self.compiled and 0 < batch.num_rows <= MAX_ROWS:
            return self._forward_compiled(token_ids, batch, states)
        self._watch(states)
        with self._state.running("paged", batch):
            self.backbone(input_ids=token_ids[None], position_ids=batch.positions[None], use_cache=False)
        hidden, last = self._take(states)
        return ForwardOutput({index: state[0] for index, state in hidden.items()}, last[0])

    @torch.inference_mode()
    def logits(self, last_hidden: torch.Tensor) -> torch.Tensor:
        """Logits [n, V] of states [n, H] after the final norm, by the model's own code behind its backbone.

        That code may do more than multiply (soft capping, scaling), so it is called rather than copied: the
        backbone is made to answer with the given states.
        """
        self._check_head()
        if self.compiled and 0 < len(last_hidden) <= MAX_ROWS:
            return self._compiled_logits()(last_hidden[None])[0]
        return self._head_of(last_hidden[None])[0]

    def commit(self, rows: torch.Tensor, slots: torch.Tensor) -> None:
        """Writes keys and values of rows (int64 [n]) of the last forward to slots (int64 [n]), in all layers."""
        cache, scratch = self._pages(), self._state.scratch
        if len(scratch) != self.num_layers:
            raise VASError("the last forward had no unslotted rows, so there is nothing to commit")
        keys, values = zip(*(scratch[layer] for layer in range(self.num_layers)), strict=True)
        cache.commit(keys, values, rows, slots)

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Input embeddings [..., H] of token_ids [...], as the model's own module gives them."""
        return self.model.get_input_embeddings()(token_ids)

    def rotate(
        self, queries: torch.Tensor, positions: torch.Tensor, layer: int, known: dict[Any, Any] | None = None
    ) -> torch.Tensor:
        """queries [R, Hq, D] at positions int64 [R], rotated as that layer's; as they are where nothing is rotated.

        Args:
            known: where cosines and sines are kept for other calls with the same positions.
        """
        self._check_layer(layer)
        return self._rotary.rotate(queries, positions, layer, {} if known is None else known)

    def attend(self, layer: int, queries: torch.Tensor, batch: AttentionBatch) -> torch.Tensor:
        """A reader's look at one layer's pages: queries [R, Hq, D] -> [R, Hq, D], scale 1 / sqrt(D), its window.

        Each row sees positions strictly below its own; one that stands at position 0 gets zeros.
        """
        self._check_layer(layer)
        spec, ranks = self.layers[layer], self.tensor_parallel_size
        own = own_heads(queries, ranks, 1)
        seen = self._pages().attend(layer, own, None, None, batch.strict, own.shape[-1] ** -0.5, 0.0, spec.window)
        return all_heads(seen, ranks, 1)

    def dense(
        self,
        token_ids: torch.Tensor,
        lengths: torch.Tensor | None = None,
        states: Sequence[int] = (),
        kv_layers: Sequence[int] = (),
        logits: bool = False,
        branches: Branches | None = None,
    ) -> DenseOutput:
        """Uncached forward over whole sequences, right padded; for training, and to test against.

        Args:
            token_ids: int64 [B, T]. lengths: int64 [B]; causality already hides the padding, so they are
                only checked.
            states: hidden states wanted. kv_layers: layers whose keys and values are wanted. logits:
                whether these are.
            branches: run behind the sequences, in the same pass; all results then have T + P K rows.

        Gradients flow if the model's parameters want them (they do not unless asked to).
        """
        if lengths is not None and bool(((lengths < 0) | (lengths > token_ids.shape[1])).any()):
            raise InvalidArgumentError("lengths", lengths.tolist(), f"each is in [0, {token_ids.shape[1]}]")
        for layer in kv_layers:
            self._check_layer(layer)
        self._watch(states)
        state = self._state
        state.keep, state.kept = frozenset(kv_layers), {}
        positions = positions_of(token_ids, branches)
        if logits:
            self._check_head()
        with state.running("dense", branches=branches):
            rows = token_ids if branches is None else branches.join(token_ids)
            run = self.model if logits else self.backbone
            output = run(input_ids=rows, position_ids=positions, use_cache=False)
        hidden, last = self._take(states)
        kept, state.kept, state.keep = state.kept, {}, frozenset()
        return DenseOutput(
            logits=output.logits if logits else None,
            hidden=hidden,
            last_hidden=last,
            keys={layer: all_heads(kept[layer][0], self.tensor_parallel_size, 1) for layer in kv_layers},
            values={layer: all_heads(kept[layer][1], self.tensor_parallel_size, 1) for layer in kv_layers},
        )

    # Inner workings

    def _check_head(self) -> None:
        if not self.head:
            raise UnsupportedModelError(f"{type(self.model).__name__} has no language-model head, so no logits")

    def _forward_backbone(self, *args: Any, **kwargs: Any) -> Any:
        if self._given is not None:
            return _Given(self._given)
        return self._run_backbone(*args, **kwargs)

    def _forward_compiled(self, token_ids: torch.Tensor, batch: AttentionBatch, states: Sequence[int]) -> ForwardOutput:
        wanted = self._captured_states(states)
        run = self._compiled_forward(wanted)
        with self._state.running("compiled", batch):
            last, *captured = run(token_ids[None], batch.positions[None])
        hidden = dict(zip((*wanted, self.num_layers), (*captured, last), strict=True))
        return ForwardOutput({index: hidden[index][0] for index in states}, last[0])

    def _captured_states(self, states: Sequence[int]) -> tuple[int, ...]:
        """The states among these that hooks capture, in order."""
        return tuple(sorted({index for index in states if index != self.num_layers}))

    def _compiled_forward(self, wanted: tuple[int, ...]) -> CompiledFunction:
        """[1, R] tokens and positions -> (last hidden state, *wanted states), each [1, R, H]."""
        if wanted in self._compiled:
            return self._compiled[wanted]
        self._watch(wanted)

        def run(token_ids: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, ...]:
            output = self._run_backbone(input_ids=token_ids, position_ids=positions, use_cache=False)
            captured = [self._captured[index] for index in wanted]
            self._captured.clear()
            return (output.last_hidden_state, *captured)

        made = CompiledFunction(run)
        example = torch.zeros(1, 1, dtype=torch.int64, device=self.device)
        with self._state.running("compiled"):
            made.compile(example, example)
        self._compiled[wanted] = made
        return made

    def _compiled_logits(self) -> CompiledFunction:
        if self._compiled_head is None:
            made = CompiledFunction(self._head_of)
            made.compile(torch.zeros(1, 1, self.hidden_size, dtype=self.dtype, device=self.device))
            self._compiled_head = made
        return self._compiled_head

    def _head_of(self, last_hidden: torch.Tensor) -> torch.Tensor:
        """[1, n, H] -> [1, n, V]."""
        places = torch.zeros(1, last_hidden.shape[1], dtype=torch.long, device=last_hidden.device)
        self._given = last_hidden
        try:
            return self.model(input_ids=places, position_ids=places, use_cache=False).logits
        finally:
            self._given = self._last = None

    def _check_shares(self) -> None:
        """The plan shards attention by whole heads, in order; what reads other ranks' heads counts on it."""
        heads, ranks = self.config.num_attention_heads, self.tensor_parallel_size
        whole = (heads, getattr(self.config, "num_key_value_heads", None) or heads)
        for index, spec in enumerate(self.layers if ranks > 1 else []):
            if (spec.num_heads * ranks, spec.kv_heads * ranks) != whole:
                raise UnsupportedModelError(
                    f"{type(self.model).__name__}: transformers' tensor-parallel plan gives a rank {spec.num_heads} "
                    f"query and {spec.kv_heads} key heads of layer {index}, not its share of {whole}; use one rank"
                )

    def _check_layer(self, layer: int) -> None:
        if not 0 <= layer < self.num_layers:
            raise InvalidArgumentError("layer", layer, f"this model has layers 0 to {self.num_layers - 1}")

    def _keep_last(self, module: nn.Module, args: Any, output: Any) -> None:
        self._last = output.last_hidden_state

    def _take(self, states: Sequence[int]) -> tuple[dict[int, torch.Tensor], torch.Tensor]:
        last, captured = self._last, self._captured
        self._last, self._captured = None, {}
        assert last is not None
        captured[self.num_layers] = last
        return {index: captured[index] for index in states}, last

    def _watch(self, states: Sequence[int]) -> None:
        """Installs a hook for each state that was never asked for before."""
        for index in states:
            if index in self._hooked or index == self.num_layers:
                continue
            if not 0 <= index < self.num_layers:
                raise InvalidArgumentError("states", index, f"hidden states are 0 to {self.num_layers}")
            self._hooked[index] = self._hook(index)

    def _hook(self, index: int) -> Any:
        def entering(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._captured[0] = args[0] if args else kwargs["hidden_states"]

        def leaving(module: nn.Module, args: Any, output: Any) -> None:
            self._captured[index] = output[0] if isinstance(output, tuple) else output

        if index == 0:
            return self._decoder[0].register_forward_pre_hook(entering, with_kwargs=True)
        return self._decoder[index - 1].register_forward_hook(leaving)
