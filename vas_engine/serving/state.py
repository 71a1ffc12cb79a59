"""What the routes of one server share: its backend, its tokenizer, whether it takes requests in."""

from __future__ import annotations

import asyncio
import copy
import logging
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from vas_engine.engine.detokenizer import decoder
from vas_engine.integrations.remote import RemoteLLM
from vas_engine.prompts import Prompt
from vas_engine.serving import errors, protocol, requests
from vas_engine.serving.backend import Backend, Observer
from vas_engine.serving.errors import ServingError, overloaded
from vas_engine.serving.metrics import Metrics
from vas_engine.serving.profiles import Profiles
from vas_engine.serving.relay import Relay
from vas_engine.serving.settings import Settings
from vas_engine.serving.worker import EngineThread
from vas_engine.tokenizer import render_chat

if TYPE_CHECKING:
    from vas_engine.llm import LLM

RETRY_SECONDS = 1

log = logging.getLogger("vas_engine.serving")


class State:
    """What the routes of one server share.

    Attributes:
        worker: runs the requests.
        draining: nothing new is taken in; what was accepted goes on.
        stuck: the present step takes longer than it may.
    """

    def __init__(self, llm: LLM | RemoteLLM, settings: Settings) -> None:
        self.llm, self.settings = llm, settings
        self.profiles = Profiles(settings.profiles, writable=settings.admin_key is not None)
        self.metrics = Metrics(settings.model_name)
        self.worker = _backend(llm, settings, self.metrics)
        self.metrics.include(self.worker)
        self.created = int(time.time())
        self.draining = self.stuck = False
        # One thread with a tokenizer of its own: the engine's thread decodes with the other one.
        self._tokenizer = copy.deepcopy(llm.tokenizer)
        self._tokenizing = ThreadPoolExecutor(1, "tokenizer")
        vocabulary = self._tokenizer.get_vocab() if self._tokenizer is not None else ()
        self._longest_token = max(map(len, vocabulary), default=None)

    @property
    def max_chars(self) -> int:
        """The longest text that may still fit the model's context."""
        context = self.llm.max_model_len
        if context is None or self._longest_token is None:
            return self.settings.limits.body_bytes
        return context * self._longest_token

    @property
    def status(self) -> str:
        if self.worker.broken is not None:
            return "failed"
        return "stuck" if self.stuck else "draining" if self.draining else "ok"

    async def encode(self, prompt: Prompt) -> Prompt:
        """The prompt with its token ids, if there is a tokenizer."""
        if self._tokenizer is None:
            return prompt
        return Prompt(prompt.text, await self._off_loop(prompt.encode, self._tokenizer))

    async def tokens(self, prompt: Prompt) -> list[int]:
        """The prompt's token ids."""
        ids = (await self.encode(prompt)).token_ids
        if ids is None:
            raise errors.bad_request("prompt", "no tokenizer is loaded")
        return ids

    async def render(self, messages: Sequence[protocol.Message]) -> Prompt:
        """A conversation by the model's own template, or the operator's."""
        read = requests.read_messages(list(messages))
        chars = sum(len(message["content"]) for message in read)
        requests.within("messages", chars, self.max_chars, "characters, the model's context")
        options = {"chat_template": self.settings.chat_template} if self.settings.chat_template else {}
        return await self._off_loop(lambda: render_chat(self._tokenizer, read, add_generation_prompt=True, **options))

    async def decode(self, tokens: list[int]) -> str:
        if self._tokenizer is None:
            raise errors.bad_request("tokens", "no tokenizer is loaded")
        return await self._off_loop(decoder(self._tokenizer), tokens)

    async def pieces(self, tokens: list[int]) -> list[str]:
        assert self._tokenizer is not None
        return await self._off_loop(self._tokenizer.convert_ids_to_tokens, tokens)

    async def _off_loop(self, function, *arguments) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._tokenizing, function, *arguments)

    def admit(self, completions: int) -> None:
        """Refuses a request that can never be taken in, and any while the server shuts down or too many wait."""
        most = self.worker.places + self.settings.max_waiting
        if completions > most:
            fix = f"{completions} completions (prompts times n, or best_of): this server never takes more than {most}"
            raise ServingError(400, f"n: {fix}; split the request", param="n", code="limit")
        if self.draining:
            raise overloaded(503, "the server is shutting down", 10)
        if self.worker.broken is not None:
            raise overloaded(503, "the engine has stopped", 60)
        waiting = self.worker.open_completions + completions - self.worker.places
        if waiting > self.settings.max_waiting:
            raise overloaded(429, "too many requests are waiting; come again later", RETRY_SECONDS)

    async def watch(self) -> None:
        """Reports a step that takes too long, once, and the end of it."""
        limit = self.settings.step_timeout
        while True:
            await asyncio.sleep(min(limit / 4, 1.0))
            stuck = self.worker.step_seconds > limit
            if stuck and not self.stuck:
                log.critical("step stuck", extra={"seconds": limit, "stack": self.worker.where()})
            self.stuck = stuck
            self.metrics.stuck.set(stuck)


def _backend(llm: LLM | RemoteLLM, settings: Settings, observer: Observer) -> Backend:
    if isinstance(llm, RemoteLLM):
        return Relay(llm, observer)
    llm.engine.bound_latency(settings.itl_slo)
    return EngineThread(llm.engine, llm.tokenizer, observer)
