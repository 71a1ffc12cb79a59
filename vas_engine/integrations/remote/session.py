"""Completions in flight: one pool of connections, one thread for the values, one journal."""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import random
import time
import warnings
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np

from vas_engine.engine.output import Pieces
from vas_engine.errors import InvalidArgumentError
from vas_engine.integrations.remote.completion import Completion, is_half
from vas_engine.integrations.remote.endpoint import Endpoint, NextToken
from vas_engine.integrations.remote.journal import Journal
from vas_engine.integrations.remote.values import Ask
from vas_engine.integrations.value_models import check_finite
from vas_engine.outputs import CompletionOutput, RequestMetrics, RequestOutput
from vas_engine.params import SamplingParams
from vas_engine.prompts import Prompt
from vas_engine.sampling import fork_seed

if TYPE_CHECKING:
    from vas_engine.integrations.remote.llm import RemoteLLM

ALL_TOLD = 1e-3
"""Probability that alternatives may lack and still be all there are."""
MAX_TOGETHER = 64
"""Most sequences that one pass of the values takes."""


class Session:
    """Completions in flight, in one event loop.

    Attributes:
        ends: what ends a text.
        id_fields: how the endpoint is asked for token ids; None continues texts. Known when it has told its card.
        pieces: texts of single tokens, by id.
    """

    def __init__(self, llm: RemoteLLM, endpoint: Endpoint, journal: Journal) -> None:
        self.llm, self.endpoint, self.journal, self.ends = llm, endpoint, journal, llm.ends
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
            self.ends.learn_silence()

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
            seed = random.getrandbits(63) if self.llm.seed is None else fork_seed(self.llm.seed, index + 1)
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
                self._complete(Completion(self, text, ids, params, own, metrics), output, grown, deadline)
            )
            for own in completions
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
        if any(is_half(c) for c in text):
            raise InvalidArgumentError("prompt", text, "cannot be encoded; give valid Unicode text")
        return text, prompt.encode(tokenizer) if self.id_fields is not None else None

    async def _complete(
        self,
        completion: Completion,
        output: RequestOutput,
        grown: asyncio.Queue[CompletionOutput],
        deadline: float | None,
    ) -> None:
        """One completion to its end."""
        try:
            for step in self.journal.steps.get(completion.key, []):
                completion.take(step)
                grown.put_nowait(completion.output)
            left = None if deadline is None else max(deadline - time.monotonic(), 0.0)
            async with asyncio.timeout(left):
                while not completion.output.finished:
                    step = await completion.next_step()
                    self.journal.add(completion.key, step)
                    completion.take(step)
                    grown.put_nowait(completion.output)
        except TimeoutError:
            completion.end("length", "deadline")
            grown.put_nowait(completion.output)
        except Exception as error:  # whatever it is: it is this request's, and its text so far is kept
            output.error = output.error or error
            completion.output.finish_reason = "error"
            grown.put_nowait(completion.output)
        finally:
            self._scoring.submit(self.llm.values.forget, completion.key)

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


def _without_start(text: str, tokenizer: Any) -> str:
    """A text without the token at its start that an endpoint puts there itself, when it encodes the text."""
    start = tokenizer.bos_token
    if start and text.startswith(start) and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]:
        return text[len(start) :]
    return text
