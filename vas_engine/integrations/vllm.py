"""vLLM: value-guided requests inside vLLM, as a logits processor of both of its interfaces.

    from vllm import LLM, SamplingParams
    llm = LLM("path/to/model", **engine_args({"kind": "path/to/value"}))
    llm.generate("Once", SamplingParams(seed=1, extra_args={"vas_weights": {"kind": 2.0}}))

vLLM finds the processor by its entry point wherever this package is installed; without `vas_values` among its
settings, and for requests without `vas_weights`, it does nothing. A guided request's token is drawn here, with the
noise keyed by its seed, and vLLM is left no other to choose: so top-p and its kin cut the base model's support before
the tilt, and the tokens are those of this engine under the same seed.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from vllm.v1.sample.logits_processor import LogitsProcessor as ProcessorV1
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from vas_engine.errors import InvalidArgumentError, NonFiniteError, VASError, nearest
from vas_engine.integrations.value_models import Host, PrefixValues, Values, check_finite, load_value_model
from vas_engine.integrations.vllm_states import SETTING, HeadValues, find_states, is_head, register
from vas_engine.params import SamplingParams
from vas_engine.sampling import SamplingArrays, Winners, choose, select
from vas_engine.tokenizer import load_tokenizer
from vas_engine.values.artifact import read_config
from vas_engine.values.network import ValueNetwork
from vas_engine.values.scorer import Scorer

try:
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as ProcessorV2
except ImportError:  # before Model Runner V2
    ProcessorV2 = object

__all__ = ["ValueLogitsProcessor", "engine_args", "register"]

log = logging.getLogger("vas_engine.vllm")

ARGUMENTS = {
    "vas_weights": "values",
    "vas_candidates": "num_candidates",
    "vas_tail": "tail",
    "vas_baseline": "baseline",
    "vas_tilt": "tilt",
    "vas_clip": "advantage_clip",
}
"""Keys in a request's `extra_args`, and what they are called here."""
UNSEEN = (
    "vLLM showed no hidden states for these logits; is `vas_engine` among the plugins that it loads (VLLM_PLUGINS), "
    "and no other plugin's LogitsProcessor?"
)
SHARED = ("temperature", "top_k", "top_p", "min_p")
PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")

_known: dict[str, Scorer] = {}  # values that this process has been told of


def engine_args(values: Mapping[str, str | Path]) -> dict[str, Any]:
    """Arguments of `vllm.LLM` that load values: ``{"additional_config": {"vas_values": {name: folder}}}``.

    Weights for other names are then refused when a request is made. A server takes the same by
    ``--additional-config '{"vas_values": {"kind": "path"}}'``.

    Raises:
        InvalidArgumentError, ValueArtifactError: a folder that holds no value model and no action head.
    """
    folders = {name: str(Path(folder).absolute()) for name, folder in values.items()}
    for name, folder in folders.items():
        _known[name] = ValueNetwork(read_config(folder)) if is_head(folder) else load_value_model(folder)
    return {"additional_config": {SETTING: folders}}


@dataclass(eq=False)
class _Request:
    """A guided request: its settings and what it has come to.

    Attributes:
        tokens: prompt and response so far.
        output: vLLM's own list of the response (V1), which it appends to.
        drawn: the last token drawn for it.
        error: why it is being ended.
    """

    params: SamplingParams
    seed: int
    tokens: list[int]
    prompt_len: int = 0
    output: list[int] | None = None
    drawn: int = -1
    counts: dict[int, int] = field(default_factory=dict)
    error: Exception | None = None

    def catch_up(self) -> None:
        """Takes over the tokens that vLLM has appended.

        Where it schedules ahead it appends -1 and puts that right only if another request needs it, all that are left
        at once, which shortens the list: so they are put right here, each in its step.
        """
        if self.output is None:
            return
        start = len(self.tokens) - self.prompt_len
        self.output[start:] = [self.drawn if token < 0 else token for token in self.output[start:]]
        self.tokens += self.output[start:]

    def history(self) -> dict[int, int]:
        """Token -> times generated; 0 if it is in the prompt only."""
        for place in range(sum(self.counts.values()) + self.prompt_len, len(self.tokens)):
            token = self.tokens[place]
            self.counts[token] = self.counts.get(token, 0) + 1
        return {**dict.fromkeys(self.tokens[: self.prompt_len], 0), **self.counts}


class ValueLogitsProcessor(ProcessorV1, ProcessorV2):
    """Guides the requests that ask for it; for Model Runner V2 and for the older interface.

    Args:
        vllm_config: its `additional_config["vas_values"]` names the value models.
        place: of the older interface ``device, is_pin_memory``, of V2 ``req_states``.
    """

    def __init__(self, vllm_config: Any, *place: Any) -> None:
        folders = (vllm_config.additional_config or {}).get(SETTING) or {}
        self._requests: dict[int, _Request] = {}
        self._states: Any = place[0] if len(place) == 1 else None
        self._config = vllm_config
        self._values: Values | None = None
        self._models: list[tuple[PrefixValues | HeadValues, list[str]]] = []  # with the names of their values
        self._held: set[_Request] = set()
        if not folders:
            return
        if getattr(vllm_config, "speculative_config", None) is not None:
            raise InvalidArgumentError(SETTING, folders, "speculative decoding draws tokens before values see them")
        model = vllm_config.model_config
        device = self._states.device if self._states is not None else torch.device(place[0])
        host = Host(model.get_vocab_size(), model.dtype, device)
        tokenizer = load_tokenizer(model.tokenizer, None, None, required=False)
        readers: dict[str, PrefixValues | HeadValues] = {}
        for name, folder in folders.items():
            if is_head(folder):
                register()  # for vLLM that did not load the plugin, where models come after processors
                readers[name] = HeadValues(folder, model.model, model.revision, model.dtype, device, tokenizer)
            else:
                readers[name] = PrefixValues(load_value_model(folder, host, tokenizer))
        self._values = Values({name: reader.value for name, reader in readers.items()})
        self._models = [(reader, self._values.names_of[name]) for name, reader in readers.items()]
        rooms = [reader.value.max_model_len for reader, _ in self._models if isinstance(reader, PrefixValues)]
        self._room = min(rooms, default=math.inf)
        self._end = _end_token(model)

    # -- what both interfaces ask ----------------------------------------------------------------------------

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Refuses wrong `vas_*` arguments when a request is made.

        Raises:
            InvalidArgumentError: naming the argument (a ValueError, which vLLM answers with status 400).
        """
        _read_params(sampling_params, Values(_known) if _known else None)

    def is_argmax_invariant(self) -> bool:
        """Without values it changes nothing."""
        return self._values is None

    def apply(self, logits: torch.Tensor, ctx: Any = None) -> torch.Tensor:
        """Draws the guided requests' tokens: their rows of logits [rows, vocabulary] are left one finite entry."""
        if self._values is None or not self._requests:
            return logits
        if ctx is None:
            rows = {row: request for row, request in self._requests.items() if row < len(logits)}
            for request in rows.values():
                request.catch_up()
        else:
            rows = self._find_rows(ctx)
        self._hold(set(rows.values()))
        if rows:
            tokens = self._draw(logits, list(rows), list(rows.values()))
            for request, token in zip(rows.values(), tokens, strict=True):
                request.drawn = token
            index = torch.tensor(list(rows), device=logits.device)
            logits[index] = float("-inf")
            logits[index, torch.tensor(tokens, device=logits.device)] = 0.0
        return logits

    def _hold(self, requests: set[_Request]) -> None:
        """Gives back the pages of requests that are not in this step: ended, or preempted and to be filled again."""
        for gone in self._held - requests:
            for reader, _ in self._models:
                if isinstance(reader, PrefixValues):
                    reader.forget(gone)
        self._held = requests

    # -- the older interface ---------------------------------------------------------------------------------

    def update_state(self, batch_update: Any) -> None:
        """Follows requests that come, go and move between rows."""
        process_dict_updates(self._requests, batch_update, self._new_request)

    def _new_request(self, params: Any, prompt_ids: list[int] | None, output_ids: list[int]) -> _Request | None:
        request = self._admit(params, PENALTIES)
        if request is None:
            return None
        if not prompt_ids:
            # Without this the error of the value model, which has nothing to read, would be that of all requests.
            fix = "values read token ids, not embeddings; give the prompt as text or ids, or leave the weights out"
            request.error = request.error or InvalidArgumentError("prompt", None, fix)
        request.tokens, request.output = list(prompt_ids or ()), output_ids
        request.prompt_len = len(request.tokens)
        return request

    # -- Model Runner V2 -------------------------------------------------------------------------------------

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """Whether the request that now has this slot is guided. Its penalties are in the logits already."""
        request = self._admit(sampling_params, ())
        if request is None:
            self._requests.pop(req_idx, None)
            return False
        self._requests[req_idx] = request
        return True

    def _find_rows(self, ctx: Any) -> dict[int, _Request]:
        """Rows that belong to guided requests whose prompt is complete, with their tokens brought up to date."""
        if not any(int(slot) in self._requests for slot in ctx.idx_mapping_np):
            return {}
        states, found = self._states, {}
        for row, (slot, position) in enumerate(zip(ctx.expanded_idx_mapping.tolist(), ctx.pos.tolist(), strict=True)):
            request = self._requests.get(slot)
            if request is None or position + 1 < int(states.prefill_len.np[slot]):
                continue
            request.tokens += states.all_token_ids.gpu[slot, len(request.tokens) : position + 1].tolist()
            request.prompt_len = int(states.prompt_len.np[slot])
            found[row] = request
        return found

    # -- drawing ---------------------------------------------------------------------------------------------

    def _admit(self, given: Any, penalties: Sequence[str]) -> _Request | None:
        if self._values is None:
            return None
        error = None
        try:
            params = _read_params(given, self._values, penalties)
        except InvalidArgumentError as problem:  # the process that took the request did not know the names
            params, error = SamplingParams(), problem
        if params is None:
            return None
        seed = params.seed if params.seed is not None else int.from_bytes(os.urandom(8), "little")
        return _Request(params, seed, [], error=error)

    def _draw(self, logits: torch.Tensor, rows: list[int], requests: list[_Request]) -> list[int]:
        """A token for each; one that cannot go on gets the end token, since a processor cannot fail a request."""
        selection = select(logits, np.array(rows, np.int64), _arrays(requests))
        tilt = np.where(selection.filled, 0.0, -np.inf)
        for request, finite in zip(requests, selection.finite, strict=True):
            self._check(request, bool(finite))
        sound = [s for s, request in enumerate(requests) if request.error is None]
        columns = [np.flatnonzero(selection.filled[s] & (np.arange(tilt.shape[1]) != selection.tail[s])) for s in sound]
        candidates = [selection.token_ids[s, c] for s, c in zip(sound, columns, strict=True)]
        outputs = self._score([requests[s] for s in sound], candidates, [rows[s] for s in sound], len(logits))
        assert self._values is not None
        tilts = self._values.tilts(outputs, [requests[s].params for s in sound])
        for s, places, (found, _) in zip(sound, columns, tilts, strict=True):
            try:
                check_finite(found)
                tilt[s, places] = found
            except NonFiniteError as error:
                requests[s].error = error
        winners: Winners = choose(selection, tilt)
        return [self._token(request, int(winners.token_id[s])) for s, request in enumerate(requests)]

    def _score(
        self, requests: list[_Request], candidates: list[np.ndarray], rows: list[int], count: int
    ) -> list[list[torch.Tensor]]:
        """Outputs of each value for every request, [1 + candidates, O]; values that no request weighs do not run.

        Args:
            rows: of each request among the `count` rows of logits.
        """
        results = []
        for reader, names in self._models:
            users = [
                i for i, request in enumerate(requests) if not (request.params.values or {}).keys().isdisjoint(names)
            ]
            tokens = [requests[i].tokens for i in users]
            found = [torch.zeros(1 + len(each), reader.value.config.outputs) for each in candidates]
            results.append(found)
            if not users:
                continue
            if isinstance(reader, HeadValues):
                states = find_states(self._config, count)
                if states is None:
                    for i in users:
                        requests[i].error = VASError(UNSEEN)
                    continue
                places = [rows[i] for i in users]
                scored = reader.score(states[places], [len(each) for each in tokens], [candidates[i] for i in users])
            else:
                ends = [[[token] for token in candidates[i].tolist()] for i in users]
                scored = reader.score([requests[i] for i in users], tokens, ends)
            for i, output in zip(users, scored, strict=True):
                found[i] = output
        return results

    def _check(self, request: _Request, finite: bool) -> None:
        if request.error is not None:
            return
        if not finite:
            request.error = NonFiniteError("the logits are not finite")
        elif len(request.tokens) + 1 > self._room:
            fix = f"a value model has {self._room} positions only; generate fewer tokens"
            request.error = InvalidArgumentError("max_tokens", len(request.tokens) + 1, fix)

    def _token(self, request: _Request, drawn: int) -> int:
        if request.error is None and drawn >= 0:
            return drawn
        log.error("a guided request is ended: %s", request.error or "no token can be drawn")
        return self._end


def _read_params(given: Any, values: Values | None, penalties: Sequence[str] = PENALTIES) -> SamplingParams | None:
    """A vLLM request's settings as this engine's, checked as far as the values are known; None for one that is not
    guided."""
    extra = {key: value for key, value in (given.extra_args or {}).items() if key.startswith("vas_")}
    for key in extra:
        if key not in ARGUMENTS:
            raise InvalidArgumentError(key, extra[key], f"unknown argument; {nearest(key, ARGUMENTS)}")
    options = {ARGUMENTS[key]: value for key, value in extra.items()}
    if not options.get("values"):
        return None
    options["values"] = _weights(options["values"])
    shared = {name: getattr(given, name) for name in (*SHARED, *penalties)}
    seed = None if given.seed is None else given.seed % 2**64
    params = SamplingParams(**shared, **options, seed=seed)
    if values is not None:
        _check_values(params, values)
    return params


def _check_values(params: SamplingParams, values: Values) -> None:
    for name in params.values or ():
        if name not in values.names:
            fix = f"no value of this name is loaded; {nearest(name, values.names)}"
            raise InvalidArgumentError("vas_weights", name, fix)
    values.check(params)
    heads = {name for n, m in values.models.items() if m.input == "action" for name in values.names_of[n]}
    # Where only candidates are left, V(s) takes the same from all of them.
    needed = params.baseline == "state" and (params.tail == "keep" or params.advantage_clip is not None)
    if needed and (using := heads & (params.values or {}).keys()):
        fix = (
            f"the action head {min(using)!r} takes V(s) from the state before the prompt's last token, which vLLM does "
            "not show; use vas_baseline='candidate-mean', or vas_tail='drop' without vas_clip"
        )
        raise InvalidArgumentError("vas_baseline", params.baseline, fix)


def _weights(given: Any) -> Any:
    """Weights as a mapping. vLLM's server passes text and numbers only, so ``"kind=2,mood=-1"`` and JSON serve too."""
    if not isinstance(given, str):
        return given
    try:
        if given.lstrip().startswith("{"):
            return json.loads(given)
        return {name.strip(): float(weight) for name, weight in (part.split("=") for part in given.split(","))}
    except ValueError:
        raise InvalidArgumentError("vas_weights", given, 'write "name=weight,name=weight" or a JSON object') from None


def _arrays(requests: list[_Request]) -> SamplingArrays:
    params = [request.params for request in requests]
    columns: dict[str, Any] = {
        name: [getattr(each, name) for each in params] for name in (*SHARED, *PENALTIES, "num_candidates")
    }
    penalised = [
        any(getattr(each, name) != off for name, off in zip(PENALTIES, (1, 0, 0), strict=True)) for each in params
    ]
    return SamplingArrays.build(
        len(requests),
        history=[request.history() if wanted else {} for request, wanted in zip(requests, penalised, strict=True)],
        seed=np.array([request.seed for request in requests], np.uint64),
        position=[len(request.tokens) for request in requests],
        keep_tail=[each.tail == "keep" for each in params],
        **columns,
    )


def _end_token(model_config: Any) -> int:
    end = getattr(model_config.hf_config, "eos_token_id", None)
    return int(end[0] if isinstance(end, list | tuple) else end or 0)
