"""A completion by an endpoint's model: what is asked for each token, and what is drawn."""

from __future__ import annotations

import dataclasses
import math
import time
import zlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from vas_engine.engine.detokenizer import StopMatcher
from vas_engine.integrations.remote.endpoint import TOKEN_ID, Alternative, NextToken
from vas_engine.integrations.remote.errors import EndpointAnswerError
from vas_engine.integrations.remote.policy import Policy
from vas_engine.integrations.remote.values import Ask
from vas_engine.outputs import CompletionOutput, Logprob, RequestMetrics
from vas_engine.params import SamplingParams
from vas_engine.sampling import fork_seed, gumbel_noise

if TYPE_CHECKING:
    from vas_engine.integrations.remote.session import Session

_PIECES = ("bytes:", "<0x")
_DECISION = 2**31 - 1  # stands for a token id in the noise of the decision between candidates and tail
MAX_TAIL_DRAWS = 200
MAX_END_DRAWS = 50
BANNED = -100.0


class Completion:
    """One completion, token by token: a request that shows the candidates, their values, a draw.

    Args:
        session: asks the endpoint and the values.
        text, ids: the prompt; ids are None where texts are what is sent.
        output, metrics: are kept up to date by `take`.

    Attributes:
        key: of the sequence, in the journal and for the values.
        position: tokens so far.
    """

    def __init__(
        self,
        session: Session,
        text: str,
        ids: list[int] | None,
        params: SamplingParams,
        output: CompletionOutput,
        metrics: RequestMetrics,
    ) -> None:
        self.session, self.params, self.output, self.metrics = session, params, output, metrics
        self.ends = session.ends
        self.prompt, self.text = text, text
        self.prompt_ids = ids
        self.ids = None if ids is None else list(ids)
        self.position = 0
        self.stops = StopMatcher(tuple(params.stop or ()), params.include_stop_str_in_output)
        self.key = session.unique([text, ids, params.to_dict() | {"seed": output.seed, "n": 1}])

    async def next_step(self) -> dict[str, Any]:
        """Draws a token: what the journal keeps of it."""
        params, seed = self.params, self.output.seed or 0
        fresh = fork_seed(fork_seed(seed, 1), self.position)
        found = await self._ask(fresh)
        if found.ended and not found.top:
            found = await self._ask_before_the_end(found, fresh)
        candidates = self._candidates(found)
        if not candidates:
            raise EndpointAnswerError("none of the most probable tokens is whole text; give the endpoint's tokenizer")
        log_probs = np.array([c.logprob for c in candidates])
        tilt, values = np.zeros(len(candidates)), np.zeros((1 + len(candidates), 0), np.float32)
        if params.values:
            spelled = self.ids is None or self.session.llm.values.read_text
            known = [(self._text_of(c) if spelled else "", c.id, c in self.ends) for c in candidates]
            tilt, values = await self.session.tilt(Ask(self.key, self.text, self.ids, known, params))
            self.metrics.value_evaluations += len(candidates)
        steps = Policy(log_probs, tilt, params)
        # Keyed like the engine's noise where ids are known, else by the token's text.
        tokens = np.array([zlib.crc32(c.text.encode()) >> 1 if c.id is None else c.id for c in candidates])
        noise = gumbel_noise(seed, self.position, tokens)
        place: int | None = int(np.argmax(steps.scores + (noise if params.temperature else 0.0)))
        drawn = candidates[place]  # type: ignore[index]
        if params.tail == "keep" and not params.temperature:
            best_of_tail = await self._best_outside(found, float(steps.scores.max()), fresh)
            if best_of_tail is not None:
                drawn, place = best_of_tail, None
        elif params.tail == "keep":
            names = {_name(c) for c in candidates}
            outside = _name(found.drawn) not in names
            decision = float(np.exp(-np.exp(-gumbel_noise(seed, self.position, np.array([_DECISION]))[0])))
            if decision < steps.tail_chance(outside):
                drawn, place = await self._draw_outside(found, names, fresh, steps.tail_log_mass), None
        step = self._step(drawn, place, found, steps, values)
        if params.logprobs is not None:
            step["top"] = self._alternatives(drawn, found.top, candidates, steps, values, step)
        return step

    async def _ask(self, seed: int, bias: Mapping[str, float] | None = None, more: int = 0) -> NextToken:
        prompt = self.ids if self.ids is not None else self.text
        count = max(self.params.num_candidates + more, self.params.logprobs or 0)
        fields = {**(self.session.id_fields or {}), **({"logit_bias": bias} if bias else {})}
        found = await self.session.endpoint.next_token(prompt, count, seed % 2**31, fields)
        if not found.ended:
            written = found.drawn.text
            if self.ids is None and written != found.text and written.strip() == found.text.strip():
                raise EndpointAnswerError(
                    f"the endpoint writes the token {found.text!r} as {written!r}, so its alternatives cannot be put "
                    "behind the text; give the endpoint's tokenizer, or another server"
                )
            self.session.check_count(found, count)
            return found
        self.ends.learn(found.drawn)
        # An end that goes without a token of its own may stand among the alternatives.
        end = next((c for c in found.top if c in self.ends), found.drawn)
        return found if math.isfinite(found.drawn.logprob) else dataclasses.replace(found, drawn=end)

    async def _ask_before_the_end(self, found: NextToken, seed: int) -> NextToken:
        """A draw of the end that came without alternatives (llama.cpp), with those of a draw of something else."""
        self.ends.learn_silence()
        for attempt in range(1, MAX_END_DRAWS):
            again = await self._ask(fork_seed(seed, attempt))
            if again.top:
                end = next((c for c in again.top if c in self.ends), found.drawn)
                return dataclasses.replace(again, drawn=end, ended=True)
        return dataclasses.replace(found, top=[Alternative("", 0.0)])  # next to nothing else comes

    def _candidates(self, found: NextToken) -> list[Alternative]:
        """The most probable tokens that can be continued."""
        # A token that the endpoint drew from farther down is told behind them.
        best = found.top[: self.params.num_candidates]
        return [c for c in best if self._usable(c) and math.isfinite(c.logprob)]

    def _usable(self, token: Alternative) -> bool:
        """Whether a token is whole text, or has an id."""
        if self.ids is not None:
            return token.id is not None
        # Half of a character is U+FFFD, half of JSON's pair of escapes for one, or nothing.
        half = any(c == "\ufffd" or is_half(c) for c in token.text)
        piece = not token.text or half or token.text.startswith((*_PIECES, TOKEN_ID))
        return not piece or token in self.ends

    def _text_of(self, token: Alternative) -> str:
        """What a token adds to the text."""
        if self.ids is None or token.id is None:
            return "" if token in self.ends else token.text
        return self._decoded([*self.ids, token.id])[len(self.text) :]

    def _decoded(self, ids: list[int]) -> str:
        assert self.prompt_ids is not None
        tokenizer: Any = self.session.llm.tokenizer
        # Decoders may strip a space at the beginning: what is new stands between two decodings.
        start = tokenizer.decode(self.prompt_ids, skip_special_tokens=True)
        whole = tokenizer.decode(ids, skip_special_tokens=True)
        return self.prompt + whole[len(start) :].rstrip("\ufffd")

    async def _best_outside(self, found: NextToken, score: float, seed: int) -> Alternative | None:
        """The most probable token of the tail, if it is more probable than `score`."""
        best = found.top[: self.params.num_candidates]
        if best[-1].logprob <= score:  # the tail's are below it
            return None
        # Asked for only now: as many candidates as servers usually show are then not one too many.
        shown = found.top[len(best) :] or (await self._ask(seed, more=1)).top[len(best) :]
        outside = next((token for token in shown if self._usable(token)), None)
        return outside if outside is not None and outside.logprob > score else None

    async def _draw_outside(self, found: NextToken, names: set[Any], seed: int, tail_log_mass: float) -> Alternative:
        """A token of the tail, drawn by the endpoint."""
        if self.ids is not None and (_name(found.drawn) in names or found.drawn.id is None):
            again = await self._ask(fork_seed(seed, 1), {str(token): BANNED for token in names})
            # Some servers tell log-probabilities from before the bias, others from after it: of the tail alone.
            raw = any(_name(token) in names and token.logprob > BANNED / 2 for token in again.top)
            drawn = again.drawn
            return drawn if raw else dataclasses.replace(drawn, logprob=drawn.logprob + tail_log_mass)
        for attempt in range(1, MAX_TAIL_DRAWS):
            if _name(found.drawn) not in names and (found.ended or self._usable(found.drawn)):
                return found.drawn
            found = await self._ask(fork_seed(seed, attempt))
        raise EndpointAnswerError(
            f"{MAX_TAIL_DRAWS} draws met no token besides the candidates; use tail='drop', or give the tokenizer"
        )

    def _step(
        self, drawn: Alternative, place: int | None, found: NextToken, policy: Policy, values: np.ndarray
    ) -> dict[str, Any]:
        ended = drawn in self.ends or not math.isfinite(drawn.logprob)
        context = self.session.llm.max_model_len
        read = found.read if self.ids is None else len(self.ids)
        self.metrics.prompt_tokens = self.metrics.prompt_tokens or found.read or 0
        length = self.position + 1 == self.params.max_tokens
        full = context is not None and read is not None and read + 1 >= context
        step: dict[str, Any] = {"text": self._text_of(drawn), "id": drawn.id}
        step["logprob"] = drawn.logprob if math.isfinite(drawn.logprob) else policy.tail_log_mass
        gained = 0.0 if place is None else float(policy.tilt[place])
        step["tilted_logprob"] = step["logprob"] + gained - policy.log_z
        step["kl"] = policy.kl
        if values.shape[1]:
            names = self.session.llm.value_names
            step["state"] = dict(zip(names, values[0].tolist(), strict=True))
            if place is not None:
                step["values"] = dict(zip(names, values[1 + place].tolist(), strict=True))
        if ended or length or full:
            step["finish_reason"] = "stop" if ended else "length"
        return step

    def _alternatives(
        self,
        drawn: Alternative,
        top: list[Alternative],
        candidates: list[Alternative],
        policy: Policy,
        values: np.ndarray,
        step: Mapping[str, Any],
    ) -> list[dict[str, Any]]:
        """The drawn token, then the most probable ones in order, as `Logprob` has them."""
        names = self.session.llm.value_names if values.shape[1] else []
        places = {_name(c): place for place, c in enumerate(candidates)}
        outside = -policy.log_z if self.params.tail == "keep" else -math.inf
        ranks = {_name(token): rank for rank, token in enumerate(top[: self.params.logprobs], start=1)}
        records = []
        for token in (drawn, *(t for t in top[: self.params.logprobs] if _name(t) != _name(drawn))):
            place = places.get(_name(token))
            record: dict[str, Any] = {"token": self._piece(token), "id": token.id, "rank": ranks.get(_name(token))}
            record["logprob"] = token.logprob
            record["tilted_logprob"] = token.logprob + outside
            if place is not None:
                record["tilted_logprob"] = float(policy.scores[place] - policy.log_z)
                record["values"] = dict(zip(names, values[1 + place].tolist(), strict=bool(names)))
            records.append(record)
        records[0] |= {name: step[name] for name in ("logprob", "tilted_logprob")}
        return records

    def _piece(self, token: Alternative) -> str | None:
        return token.text if token.id is None else self.session.pieces[token.id]

    def end(self, reason: str, stop_reason: str | None = None) -> None:
        """Ends the completion with what it has."""
        more = self.stops.flush()
        self.output.text += more
        self.output.delta_text += more
        self.output.finish_reason, self.output.stop_reason = reason, stop_reason

    def take(self, step: Mapping[str, Any]) -> None:
        """Adds a token to the output."""
        output = self.output
        self.position += 1
        self.metrics.generated_tokens += 1
        self.metrics.first_token = self.metrics.first_token or time.monotonic()
        token = -1 if step["id"] is None else step["id"]
        output.token_ids.append(token)
        output.delta_token_ids.append(token)
        if self.ids is not None:
            self.ids.append(token)
        self.text += step["text"]
        output.cumulative_logprob += step["logprob"]
        assert output.cumulative_tilted_logprob is not None
        assert output.kl is not None
        output.cumulative_tilted_logprob += step["tilted_logprob"]
        output.kl += step["kl"]
        for name, series in output.values.items():
            if not series and "state" in step:
                output.prompt_values[name] = step["state"][name]
            # A token of the tail has no value until it is the state of the next step.
            series.append(step.get("values", {}).get(name, math.nan))
            if len(series) > 1 and math.isnan(series[-2]) and "state" in step:
                series[-2] = step["state"][name]
        if output.logprobs is not None:
            output.logprobs.append(_logprobs(step["top"]))
        more = self.stops.push(step["text"])
        output.text += more
        output.delta_text += more
        if self.stops.matched is not None:
            output.finish_reason, output.stop_reason = "stop", self.stops.matched
        elif "finish_reason" in step:
            self.end(step["finish_reason"])


def _logprobs(top: Sequence[Mapping[str, Any]]) -> dict[int, Logprob]:
    """A step's alternatives by token id, the drawn one first; what has no id goes by -1 (drawn), -2, -3 ..."""
    return {
        -1 - place if record["id"] is None else record["id"]: Logprob(
            record["logprob"], record["tilted_logprob"], record["rank"], record["token"], record.get("values", {})
        )
        for place, record in enumerate(top)
    }


def is_half(character: str) -> bool:
    """Whether it is a surrogate, which no text on its way can hold."""
    return "\ud800" <= character <= "\udfff"


def _name(token: Alternative) -> int | str:
    return token.text if token.id is None else token.id
