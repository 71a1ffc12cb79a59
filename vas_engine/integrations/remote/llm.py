"""RemoteLLM: the guided policy of DESIGN.md, section 2, over a model that only an endpoint offers."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import json
import math
import random
import time
import warnings
import zlib
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from tqdm import tqdm

from vas_engine import arguments
from vas_engine.engine.detokenizer import StopMatcher
from vas_engine.engine.output import Pieces
from vas_engine.errors import InvalidArgumentError
from vas_engine.integrations.remote.endpoint import TOKEN_ID, Alternative, Endpoint, Limits, NextToken, Spent
from vas_engine.integrations.remote.errors import EndpointAnswerError
from vas_engine.integrations.remote.journal import Journal
from vas_engine.integrations.remote.values import Ask, Source, TextValues
from vas_engine.integrations.value_models import check_finite
from vas_engine.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from vas_engine.params import SamplingParams
from vas_engine.prompts import Prompt, read_prompts
from vas_engine.sampling import fork_seed, gumbel_noise
from vas_engine.tokenizer import load_tokenizer

# How tokenizers write the end of a text; the endpoint's tokenizer, where given, and its answers add theirs.
END_TEXTS = frozenset(
    {"</s>", "<|endoftext|>", "<|im_end|>", "<|eot_id|>", "<|end_of_text|>", "<eos>", "<end_of_turn>"}
)
# Fields of SamplingParams that mean something here; the rest shape the base distribution inside the endpoint's model.
_SHAPE = ("n", "temperature", "seed", "max_tokens", "stop", "include_stop_str_in_output", "prune", "report_kl")
_USED = {*_SHAPE, "logprobs", "values", "num_candidates", "tail", "baseline", "tilt", "advantage_clip"}
_PIECES = ("bytes:", "<0x")
_DECISION = 2**31 - 1  # stands for a token id in the noise of the decision between candidates and tail
MAX_TAIL_DRAWS = 200
MAX_END_DRAWS = 50
BANNED = -100.0
ALL_TOLD = 1e-3
"""Probability that alternatives may lack and still be all there are."""
MAX_TOGETHER = 64
"""Most sequences that one pass of the values takes."""


class RemoteLLM:
    """Completes prompts by an endpoint's model, guided by local value models.

    Every token is one request for the `num_candidates` most probable next tokens and one that the endpoint draws; the
    values score the candidates here; one is drawn by noise keyed as in LLM. With tail="keep" the endpoint's own draw
    stands for the tail; where it is not of the tail and should be, another is asked for: as ids one request (with a
    `logit_bias`), as text one after another, max(0, 1/Z - 1) a token on average, Z being the tilt's normaliser.

    Args:
        base_url: of an OpenAI-compatible API with `logprobs` on /completions, such as http://127.0.0.1:8000/v1.
        model: as the endpoint calls it.
        values: {name: folder} of values of kind "model" (others read the base model's states, which no endpoint shows).
        tokenizer: of the endpoint's model, folder or hub name. With it, and a server that tells token ids (this
            engine's, vLLM), sequences are continued as ids: exact. Without it they are continued as text.
        value_tokenizers: {name: folder} of the values' tokenizers; default: in the value's folder, then `tokenizer`.
        api_key: sent as a bearer token.
        max_model_len: tokens that prompt and completion may have together; default: what the endpoint says.
        extra_body: fields of every request, such as {"top_k": 0, "min_p": 0} for a server with such defaults.
        state_file: a journal of every token, from which a run that ended early goes on.
        seed: makes requests without a seed of their own repeatable.
        limits: fields of Limits: timeout, max_retries, backoff, max_wait, concurrency, requests_per_second,
            max_requests, max_spent_tokens.

    Raises:
        VASError: an argument or a value that cannot work.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        values: str | Path | Mapping[str, Source] | None = None,
        *,
        tokenizer: Any | None = None,
        value_tokenizers: Mapping[str, Any] | None = None,
        api_key: str | None = None,
        max_model_len: int | None = None,
        extra_body: Mapping[str, Any] | None = None,
        state_file: str | Path | None = None,
        seed: int | None = None,
        **limits: Any,
    ) -> None:
        _check_address(base_url, api_key)
        if isinstance(values, str | Path):
            values = {"": values}
        self.base_url, self.model = base_url, model
        self.tokenizer = None if tokenizer is None else load_tokenizer(None, tokenizer, None, required=True)
        self.values = TextValues(values or {}, value_tokenizers, self.tokenizer)
        self.limits = _read_limits(limits)
        if max_model_len is not None:
            arguments.integer("max_model_len", max_model_len, 2)
        self.max_model_len = max_model_len
        self.tells_ids = False
        """Whether sequences are continued as token ids; known when the endpoint has told what it is."""
        self.spent = Spent()
        self._api_key, self._extra, self._state_file = api_key, dict(extra_body or {}), state_file
        # A journal can only be gone on with if the same seeds come again.
        self._seed = 0 if seed is None and state_file is not None else seed
        self._ends = set(END_TEXTS)
        self._end_ids = set()
        if self.tokenizer is not None and self.tokenizer.eos_token_id is not None:
            self._ends.add(self.tokenizer.eos_token)
            self._end_ids.add(self.tokenizer.eos_token_id)

    @property
    def value_names(self) -> list[str]:
        """Names that a request's `values` may weight."""
        return self.values.names

    def generate(
        self,
        prompts: Any,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        on_error: str = "raise",
    ) -> list[RequestOutput]:
        """Completes prompts, all at once over one pool of connections.

        Args: as of `LLM.generate`. `max_tokens` has to be set, for every token is a request. Of SamplingParams, n,
            temperature, seed, max_tokens, stop, logprobs and what guides are honoured; the rest is refused by name.
            The temperature is 0, 1, or with tail="drop" any.

        Returns:
            One output a prompt; `kl` is the exact KL(pi || pi0) of the steps in nats. Where the endpoint tells no ids,
            `token_ids` are -1 and the other entries of `logprobs` go by -2, -3 and so on.

        Raises:
            InvalidArgumentError: arguments that cannot work, before any request. VASError: with on_error="raise", the
                first request's error (an empty prompt, say), when the others are done; its attribute `outputs` holds
                all of them.
        """
        arguments.choice("on_error", on_error, ("raise", "return"))
        read = read_prompts(prompts)
        given: Any = SamplingParams() if sampling_params is None else sampling_params
        params: list[SamplingParams] = list(given) if isinstance(given, list | tuple) else [given] * len(read)
        if len(params) != len(read):
            raise InvalidArgumentError("sampling_params", len(params), f"give one for all prompts, or {len(read)}")
        for one in params:
            self.check(one)
        outputs = asyncio.run(self._generate(read, params, use_tqdm))
        failed = [output.error for output in outputs if output.error is not None]
        if failed and on_error == "raise":
            failed[0].outputs = outputs  # type: ignore[attr-defined]
            raise failed[0]
        return outputs

    def check(self, params: SamplingParams) -> None:
        """Raises InvalidArgumentError for settings that an endpoint cannot honour."""
        default = SamplingParams()
        for name, value in params.to_dict().items():
            if name not in _USED and value != default.to_dict()[name]:
                raise InvalidArgumentError(
                    name, value, "an endpoint's base distribution is taken as it is; leave it out"
                )
        if params.max_tokens is None and self.max_model_len is None:
            raise InvalidArgumentError("max_tokens", None, "every token is a request; say how many there may be")
        if params.temperature not in (0.0, 1.0) and params.tail == "keep":
            fix = "the tail cannot be drawn at another temperature than 1; use tail='drop', or temperature 0 or 1"
            raise InvalidArgumentError("temperature", params.temperature, fix)
        params.check(vocab_size=2**31, value_names=self.value_names)
        self.values.values.check(params)

    @contextlib.asynccontextmanager
    async def session(self) -> AsyncIterator[Session]:
        """A pool of connections in the running event loop; its `stream` completes one prompt."""
        settings = {"model": self.model, "seed": self._seed, "values": self.values.digests, "extra_body": self._extra}
        journal = Journal(self._state_file, settings)
        try:
            async with Endpoint(
                self.base_url, self.model, self._api_key, self.limits, self._extra, self.spent
            ) as endpoint:
                session = Session(self, endpoint, journal)
                try:
                    yield session
                finally:
                    await session.close()
        finally:
            journal.close()

    async def models(self) -> list[str]:
        """Names of the models that the endpoint lists; raises EndpointError without such a list."""
        async with Endpoint(self.base_url, self.model, self._api_key, self.limits, self._extra) as endpoint:
            return [str(card.get("id")) for card in await endpoint.models()]

    async def _generate(
        self, prompts: list[Prompt], params: list[SamplingParams], use_tqdm: bool
    ) -> list[RequestOutput]:
        bar = tqdm(total=sum(p.max_tokens or 0 for p in params), disable=not use_tqdm, unit="token", desc="generate")

        async def run(session: Session, index: int) -> RequestOutput:
            output, known = None, 0
            try:
                async for output in session.stream(prompts[index], params[index], index):
                    bar.update(output.metrics.generated_tokens - known)
                    known = output.metrics.generated_tokens
            except InvalidArgumentError as error:  # of this prompt; the others go on
                failed = [CompletionOutput(i, finish_reason="error") for i in range(params[index].n)]
                return RequestOutput(str(index), prompts[index].text, prompts[index].token_ids or [], failed, error)
            assert output is not None
            return output

        with bar:
            async with self.session() as session:
                return await asyncio.gather(*(run(session, index) for index in range(len(prompts))))


class Session:
    """Completions in flight, in one event loop.

    Attributes:
        id_fields: how the endpoint is asked for token ids; None continues texts. Known when it has told its card.
        pieces: texts of single tokens, by id.
    """

    def __init__(self, llm: RemoteLLM, endpoint: Endpoint, journal: Journal) -> None:
        self.llm, self.endpoint, self.journal = llm, endpoint, journal
        self.id_fields: dict[str, Any] | None = None
        self.pieces = Pieces(llm.tokenizer)
        self._scoring = ThreadPoolExecutor(1, "values")
        self._meeting: asyncio.Task[None] | None = None
        self._asked: list[tuple[Ask, asyncio.Future[tuple[np.ndarray, np.ndarray]]]] = []
        self._passes: asyncio.Task[None] | None = None
        self._keys: dict[str, int] = {}
        self._warned = False

    def meet(self) -> asyncio.Task[None]:
        """Has the endpoint tell what it is: once, and anew if that failed."""
        if self._meeting is None or (self._meeting.done() and self._meeting.exception()):
            self._meeting = asyncio.create_task(self._meet())
        return self._meeting

    async def _meet(self) -> None:
        card = await self.endpoint.card()
        self.id_fields = card.id_fields if self.llm.tokenizer is not None else None
        self.llm.tells_ids = self.id_fields is not None
        self.llm.max_model_len = self.llm.max_model_len or card.max_model_len
        if card.silent_end:
            self.llm._ends.add("")

    async def stream(
        self, prompt: Prompt, params: SamplingParams, index: int = 0, deadline: float | None = None
    ) -> AsyncGenerator[RequestOutput]:
        """A request's output whenever it has grown; the same object each time, its error in `error`.

        Args:
            index: place of the prompt, from which requests without a seed get theirs.
            deadline: time of the monotonic clock at which the request ends with what it has.

        Raises:
            InvalidArgumentError: what cannot work. EndpointUnavailableError: the endpoint was never reached.
        """
        await asyncio.shield(self.meet())
        self.llm.check(params)
        seed = params.seed
        if seed is None:
            seed = random.getrandbits(63) if self.llm._seed is None else fork_seed(self.llm._seed, index + 1)
        text, ids = self._read(prompt)
        completions = [CompletionOutput(i, seed=fork_seed(seed, i), kl=0.0) for i in range(params.n)]
        for completion in completions:
            completion.values = {name: [] for name in params.values or ()}
            completion.logprobs = None if params.logprobs is None else []
        metrics = RequestMetrics(arrival=time.monotonic(), prompt_tokens=len(ids or ()))
        output = RequestOutput(str(index), prompt.text, ids or [], completions, metrics=metrics)
        grown: asyncio.Queue[CompletionOutput] = asyncio.Queue()
        runs = [
            asyncio.create_task(
                self._complete(_Text(self, text, ids, params, completion, metrics), output, grown, deadline)
            )
            for completion in completions
        ]
        try:
            finished = False
            while not finished:
                await grown.get()
                finished = output.finished  # as it is shown: it may end while the reader is busy
                shown = [(len(c.delta_text), len(c.delta_token_ids)) for c in completions]
                yield output
                # Others have had news of theirs shown beside it, and all may have grown since.
                for completion, (chars, tokens) in zip(completions, shown, strict=True):
                    completion.delta_text = completion.delta_text[chars:]
                    completion.delta_token_ids = completion.delta_token_ids[tokens:]
            metrics.finished = time.monotonic()
        finally:
            for run in runs:
                run.cancel()
            await asyncio.gather(*runs, return_exceptions=True)

    def _read(self, prompt: Prompt) -> tuple[str, list[int] | None]:
        """The prompt as text, and as token ids where they are what is sent."""
        tokenizer: Any = self.llm.tokenizer
        if prompt.text is None and tokenizer is None:
            raise InvalidArgumentError("prompt", prompt.token_ids, "token ids need the endpoint's tokenizer")
        text = prompt.text if prompt.text is not None else tokenizer.decode(prompt.token_ids)
        if self.id_fields is None and tokenizer is not None:
            text = _without_start(text, tokenizer)
        if not text:
            raise InvalidArgumentError("prompt", text, "is empty; give some text")
        if any(_is_half(c) for c in text):
            raise InvalidArgumentError("prompt", text, "cannot be encoded; give valid Unicode text")
        return text, prompt.encode(tokenizer) if self.id_fields is not None else None

    async def _complete(
        self, text: _Text, output: RequestOutput, grown: asyncio.Queue[CompletionOutput], deadline: float | None
    ) -> None:
        """One completion to its end."""
        try:
            for step in self.journal.steps.get(text.key, []):
                text.take(step)
                grown.put_nowait(text.output)
            left = None if deadline is None else max(deadline - time.monotonic(), 0.0)
            async with asyncio.timeout(left):
                while not text.output.finished:
                    step = await text.next_step()
                    self.journal.add(text.key, step)
                    text.take(step)
                    grown.put_nowait(text.output)
        except TimeoutError:
            text.end("length", "deadline")
            grown.put_nowait(text.output)
        except Exception as error:  # whatever it is: it is this request's, and its text so far is kept
            output.error = output.error or error
            text.output.finish_reason = "error"
            grown.put_nowait(text.output)
        finally:
            self._scoring.submit(self.llm.values.forget, text.key)

    async def close(self) -> None:
        for task in (self._meeting, self._passes):
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        self._scoring.shutdown(cancel_futures=True)

    def check_count(self, found: NextToken, count: int) -> None:
        """Warns, once, of an endpoint that tells fewer alternatives than it was asked for, though there are more."""
        told = sum(math.exp(token.logprob) for token in found.top)
        if not self._warned and len(found.top) < count and told < 1 - ALL_TOLD:
            self._warned = True
            warnings.warn(
                f"{self.endpoint.base_url} told {len(found.top)} alternatives where {count} were asked for: no other "
                "token can be a candidate; where it never tells more, num_candidates and logprobs can be no higher",
                stacklevel=2,
            )

    def unique(self, plan: Any) -> str:
        """The key of a sequence: what it is to be, and how many of the kind there were before in this run."""
        key = hashlib.sha256(json.dumps(plan).encode()).hexdigest()[:32] if self.journal.kept else ""
        self._keys[key] = self._keys.get(key, -1) + 1
        return f"{key}.{self._keys[key]}"

    async def tilt(self, ask: Ask) -> tuple[np.ndarray, np.ndarray]:
        """The values' tilt, off the event loop. Who asks while a pass is under way shares the next one.

        Raises:
            NonFiniteError, InvalidArgumentError: of this one alone.
        """
        found: asyncio.Future[tuple[np.ndarray, np.ndarray]] = asyncio.get_running_loop().create_future()
        self._asked.append((ask, found))
        if self._passes is None or self._passes.done():
            self._passes = asyncio.create_task(self._run_passes())
        tilt, values = await found
        check_finite(tilt)
        return tilt, values

    async def _run_passes(self) -> None:
        loop = asyncio.get_running_loop()
        while self._asked:
            # Who has gone since is not to come back to the pages that were given free.
            waiting = [(ask, found) for ask, found in self._asked if not found.done()]
            self._asked = waiting[MAX_TOGETHER:]
            asks = [ask for ask, _ in waiting[:MAX_TOGETHER]]
            results = await loop.run_in_executor(self._scoring, self._tilts, asks)
            for (_, found), result in zip(waiting, results, strict=False):
                if found.done():
                    continue
                if isinstance(result, Exception):
                    found.set_exception(result)
                else:
                    found.set_result(result)

    def _tilts(self, asks: list[Ask]) -> list[Any]:
        """What each asked for, or its error."""
        values = self.llm.values
        try:
            return list(values.tilts(asks))
        except Exception as error:
            # One of them cannot be valued; the others are to have theirs.
            return [error] if len(asks) == 1 else [self._tilts([ask])[0] for ask in asks]


class _Text:
    """One completion as it grows."""

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
            known = [(self._text_of(c) if spelled else "", c.id, self._ends(c)) for c in candidates]
            tilt, values = await self.session.tilt(Ask(self.key, self.text, self.ids, known, params))
            self.metrics.value_evaluations += len(candidates)
        steps = _Policy(log_probs, tilt, params)
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
        llm = self.session.llm
        if found.drawn.id is not None:
            llm._end_ids.add(found.drawn.id)
        elif found.drawn.text:
            llm._ends.add(found.drawn.text)
        # An end that goes without a token of its own may stand among the alternatives.
        end = next((c for c in found.top if self._ends(c)), found.drawn)
        return found if math.isfinite(found.drawn.logprob) else dataclasses.replace(found, drawn=end)

    async def _ask_before_the_end(self, found: NextToken, seed: int) -> NextToken:
        """A draw of the end that came without alternatives (llama.cpp), with those of a draw of something else."""
        self.session.llm._ends.add("")
        for attempt in range(1, MAX_END_DRAWS):
            again = await self._ask(fork_seed(seed, attempt))
            if again.top:
                end = next((c for c in again.top if self._ends(c)), found.drawn)
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
        half = any(c == "\ufffd" or _is_half(c) for c in token.text)
        piece = not token.text or half or token.text.startswith((*_PIECES, TOKEN_ID))
        return not piece or self._ends(token)

    def _ends(self, token: Alternative) -> bool:
        llm = self.session.llm
        return token.id in llm._end_ids if token.id is not None else token.text in llm._ends

    def _text_of(self, token: Alternative) -> str:
        """What a token adds to the text."""
        if self.ids is None or token.id is None:
            return "" if self._ends(token) else token.text
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
        self, drawn: Alternative, place: int | None, found: NextToken, policy: _Policy, values: np.ndarray
    ) -> dict[str, Any]:
        ended = self._ends(drawn) or not math.isfinite(drawn.logprob)
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
        policy: _Policy,
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


def _without_start(text: str, tokenizer: Any) -> str:
    """A text without the token at its start that an endpoint puts there itself, when it encodes the text."""
    start = tokenizer.bos_token
    if start and text.startswith(start) and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]:
        return text[len(start) :]
    return text


def _check_address(base_url: str, api_key: str | None) -> None:
    try:
        parts = urlsplit(base_url)
        whole = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number, say
        whole = False
    if not whole:
        raise InvalidArgumentError("base_url", base_url, "write it as http://host:port/v1")
    # Headers take no other characters; the key itself is not to be told.
    if api_key is not None and not (api_key.isascii() and api_key.isprintable()):
        raise InvalidArgumentError("api_key", "...", "holds characters that no header takes, such as a line end")


def _is_half(character: str) -> bool:
    """Whether it is a surrogate, which no text on its way can hold."""
    return "\ud800" <= character <= "\udfff"


def _name(token: Alternative) -> int | str:
    return token.text if token.id is None else token.id


class _Policy:
    """pi over the candidates C and the tail: pi(a) = pi0(a) exp T(a) / Z, Z the sum over C plus the tail's mass.

    Args:
        log_probs: log pi0 of the candidates at temperature 1, as the endpoint says.
        tilt: T of the candidates.

    Attributes:
        scores: what Gumbel noise is added to.
        log_z: log Z. tail_log_mass: log of the mass of everything else. kl: KL(pi || pi0) in nats.
    """

    def __init__(self, log_probs: np.ndarray, tilt: np.ndarray, params: SamplingParams) -> None:
        self.tilt = tilt
        heat = params.temperature or 1.0
        base = log_probs / heat
        mass = 0.0
        if params.tail == "keep":
            mass = max(1.0 - float(np.exp(log_probs).sum()), 0.0)
        elif heat != 1.0:
            base = base - np.logaddexp.reduce(base)  # over the candidates alone: the rest at this heat is not known
        self.scores = base + tilt
        self.mass = mass
        self.tail_log_mass = math.log(mass) if mass > 0 else -math.inf
        self.log_z = float(np.logaddexp(np.logaddexp.reduce(self.scores), self.tail_log_mass))
        policy = np.exp(self.scores - self.log_z)
        self.kl = float(policy @ (tilt - self.log_z)) - mass * math.exp(-self.log_z) * self.log_z

    def tail_chance(self, outside: bool) -> float:
        """Probability of leaving this step to the tail, given whether the endpoint's own draw is outside of C.

        pi(tail) = mass / Z. Where Z >= 1 a draw that is outside is kept with probability 1 / Z; where Z < 1 it always
        is, and of the draws inside as many more are given to the tail as pi wants.
        """
        z = math.exp(self.log_z)
        if outside:
            return min(1.0, 1.0 / z)
        inside = 1.0 - self.mass
        return max(self.mass / z - self.mass, 0.0) / inside if inside > 0 else 0.0


def _read_limits(limits: Mapping[str, Any]) -> Limits:
    known = Limits.__dataclass_fields__
    for name, value in limits.items():
        if name not in known:
            arguments.unknown_argument(name, value, known, {"max_tokens": "max_spent_tokens", "retries": "max_retries"})
        if value is None and name not in ("requests_per_second", "max_requests", "max_spent_tokens"):
            raise InvalidArgumentError(name, value, "must be a number")
        if value is None:
            continue
        if name in ("timeout", "backoff", "max_wait", "requests_per_second"):
            arguments.real(name, value, 0.0, above_low=name not in ("backoff", "max_wait"))
        else:
            arguments.integer(name, value, 0 if name == "max_retries" else 1)
    return Limits(**limits)
