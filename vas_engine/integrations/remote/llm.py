"""RemoteLLM: the guided policy of DESIGN.md, section 2, over a model that only an endpoint offers."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tqdm import tqdm

from vas_engine import arguments
from vas_engine.errors import InvalidArgumentError
from vas_engine.integrations.remote.endpoint import Endpoint, Limits, Spent
from vas_engine.integrations.remote.ends import Ends
from vas_engine.integrations.remote.journal import Journal
from vas_engine.integrations.remote.session import Session
from vas_engine.integrations.remote.values import Source, TextValues
from vas_engine.outputs import CompletionOutput, RequestOutput
from vas_engine.params import GUIDANCE, SamplingParams, read_params
from vas_engine.prompts import Prompt, read_prompts
from vas_engine.tokenizer import load_tokenizer

# Fields of SamplingParams that mean something here; the rest shape the base distribution inside the endpoint's model.
_SHAPE = ("n", "temperature", "seed", "max_tokens", "stop", "include_stop_str_in_output", "prune", "report_kl")
_USED = {*_SHAPE, "logprobs", "values", *GUIDANCE}


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
        self.limits = Limits(**limits)
        if max_model_len is not None:
            arguments.integer("max_model_len", max_model_len, 2)
        self.max_model_len = max_model_len
        self.tells_ids = False
        """Whether sequences are continued as token ids; known when the endpoint has told what it is."""
        self.spent = Spent()
        self._api_key, self._extra, self._state_file = api_key, dict(extra_body or {}), state_file
        # A journal can only be gone on with if the same seeds come again.
        self.seed = 0 if seed is None and state_file is not None else seed
        self.ends = Ends(self.tokenizer)

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
        params = read_params(sampling_params, len(read))
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
        settings = {"model": self.model, "seed": self.seed, "values": self.values.digests, "extra_body": self._extra}
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
