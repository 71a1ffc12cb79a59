"""Bodies of requests and answers. Names are OpenAI's, then vLLM's; what is this engine's own starts with `vas_`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from vas_engine.errors import nearest

MOST_ITEMS = 4096  # of a list or map that is not tokens; a server's own limits are lower


def _few(value: Any) -> Any:
    """Refuses a large map before its entries are looked at: each bad one would leave an error."""
    if isinstance(value, dict) and len(value) > MOST_ITEMS:
        raise PydanticCustomError("too_long", "has too many entries")
    return value


Name = Annotated[str, Field(max_length=256)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Weights = Annotated[dict[Name, Finite], BeforeValidator(_few), Field(max_length=MOST_ITEMS)]
Bias = Annotated[
    dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]],
    BeforeValidator(_few),
    Field(max_length=MOST_ITEMS),
]
TokenIds = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(fail_fast=True)]
Texts = Annotated[list[str], Field(fail_fast=True, max_length=MOST_ITEMS)]


class Body(BaseModel):
    """A request: JSON types are taken as they are, and an unknown field names the nearest known one."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _known_fields(cls, data: Any) -> Any:
        if isinstance(data, dict):
            for name in data:
                if name not in cls.model_fields:
                    short = str(name)[:60]
                    message = f"unknown field; {nearest(short, cls.model_fields)}"
                    raise PydanticCustomError("unknown_field", "{message}", {"message": message, "field": short})
        return data


class StreamOptions(Body):
    """`include_usage`: a last chunk tells what the request used."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class Sampling(Body):
    """What completions and chat completions have in common."""

    model: Name
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, lt=2**31)
    min_p: float | None = Field(None, ge=0, le=1)
    n: int | None = Field(None, ge=1, le=1024)
    seed: int | None = Field(None, ge=0, lt=2**64)
    max_tokens: int | None = Field(None, ge=1, lt=2**31)
    min_tokens: int | None = Field(None, ge=0, lt=2**31)
    stop: str | Texts | None = None
    stop_token_ids: TokenIds | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    logit_bias: Bias | None = Field(None, description="token id: number added to its logit; -100 bans it")
    priority: int | None = Field(None, ge=0, lt=2**31, description="larger gives way to smaller")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    cache_salt: Name | None = Field(None, description="only requests of the same salt share cached prefixes")

    vas_weights: Weights | None = Field(None, description="weight of each value; 0 watches without steering")
    vas_profile: Name | None = Field(None, description="a named set of weights; vas_weights come on top")
    vas_candidates: int | None = Field(None, ge=1, lt=2**31, description="tokens the values look at in each step")
    vas_min_candidates: int | None = Field(
        None, ge=1, lt=2**31, description="of them this many in any case, whatever the server's latency bound"
    )
    vas_deadline_ms: float | None = Field(
        None, gt=0, le=86_400_000, description="ends the request with what it has, so long after it came"
    )
    vas_tail: Literal["keep", "drop"] | None = None
    vas_baseline: Literal["state", "candidate-mean"] | None = None
    vas_tilt: Literal["mean", "optimal"] | None = None
    vas_clip: float | None = Field(None, gt=0, allow_inf_nan=False, description="bound of each value's advantage")
    vas_return_values: bool | None = Field(None, description="V after each token, of each value in use")
    vas_return_kl: bool | None = Field(None, description="the exact KL spent, in nats")
    vas_return_candidates: int | None = Field(
        None, ge=0, description="for each token this many alternatives with both log-probabilities and V"
    )

    # What clients send along and what makes no difference here.
    user: str | None = None
    metadata: Annotated[dict[str, str], BeforeValidator(_few)] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


class CompletionRequest(Sampling):
    """POST /v1/completions."""

    prompt: str | TokenIds | Texts | Annotated[list[TokenIds], Field(fail_fast=True, max_length=MOST_ITEMS)]
    best_of: int | None = Field(None, ge=1, le=1024)
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=1024)
    vas_best_of: Name | None = Field(None, description="value that ranks the best_of completions")


class TextPart(Body):
    """A part of a message. Text is all there is: no image and no address is ever fetched."""

    type: Literal["text"]
    text: str


class Message(Body):
    """A message of a conversation."""

    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: str | Annotated[list[TextPart], Field(fail_fast=True, max_length=MOST_ITEMS)]
    name: Name | None = None


Messages = Annotated[list[Message], Field(fail_fast=True, min_length=1, max_length=MOST_ITEMS)]


class ResponseFormat(Body):
    """Text is the only format."""

    type: Literal["text"]


class ChatCompletionRequest(Sampling):
    """POST /v1/chat/completions."""

    messages: Messages
    max_completion_tokens: int | None = Field(None, ge=1, lt=2**31)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=1024)
    response_format: ResponseFormat | None = None


class TokenizeRequest(Body):
    """POST /tokenize: a prompt or messages."""

    model: Name | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(Body):
    """POST /detokenize."""

    model: Name | None = None
    tokens: TokenIds


class Profile(Body):
    """A named set of weights."""

    weights: Weights
    description: Annotated[str, Field(max_length=1000)] = ""


class LoadValueRequest(Body):
    """POST /admin/values: `path` is relative to the server's folder of values."""

    name: Annotated[str, Field(min_length=1, max_length=100, pattern=r"^[A-Za-z0-9_-]+$")]
    path: Annotated[str, Field(min_length=1, max_length=1000)]


# -- answers -----------------------------------------------------------------------------------------------


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    error: ErrorDetail


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Candidate(BaseModel):
    """An alternative of a position.

    `logprob` is the base model's, `tilted_logprob` that of the distribution drawn from; null is not known.
    """

    id: int | None
    token: str | None
    logprob: float | None
    tilted_logprob: float | None
    values: dict[str, float | None]


class ChoiceGuidance(BaseModel):
    """What the values did for one completion (in a stream: for the tokens of the chunk).

    Attributes:
        seed: repeats this very completion.
        prompt_values: V of the prompt.
        values: V after each token.
        candidates: of each token, the drawn one first.
        kl: sum over the tokens of KL(tilted || base), nats.
        cumulative_logprob, cumulative_tilted_logprob: of the whole completion.
    """

    seed: int | None = None
    token_ids: list[int | None] | None = None
    prompt_values: dict[str, float | None] | None = None
    values: dict[str, list[float | None]] | None = None
    candidates: list[list[Candidate]] | None = None
    kl: float | None = None
    cumulative_logprob: float | None = None
    cumulative_tilted_logprob: float | None = None


class Guidance(BaseModel):
    """What the values did for a request.

    Attributes:
        weights: in force, the profile's included.
        value_evaluations: rows that value networks scored for it.
        limited_tokens: tokens for which the latency bound or the deadline left out candidates.
    """

    weights: dict[str, float]
    profile: str | None
    value_evaluations: int
    limited_tokens: int


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float | None]]
    text_offset: list[int]
    vas_tilted_token_logprobs: list[float | None]
    vas_tilted_top_logprobs: list[dict[str, float | None]]


class CompletionChoice(BaseModel):
    index: int
    text: str
    finish_reason: str | None
    stop_reason: str | int | None
    logprobs: CompletionLogprobs | None
    vas: ChoiceGuidance | None = None


class CompletionResponse(BaseModel):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage
    vas: Guidance


class ChatAlternative(BaseModel):
    token: str
    logprob: float | None
    bytes: list[int] | None
    vas_tilted_logprob: float | None


class ChatTokenLogprob(ChatAlternative):
    top_logprobs: list[ChatAlternative]


class ChatLogprobs(BaseModel):
    content: list[ChatTokenLogprob]
    refusal: None


class ChatMessage(BaseModel):
    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(BaseModel):
    index: int
    message: ChatMessage
    finish_reason: str | None
    stop_reason: str | int | None
    logprobs: ChatLogprobs | None
    vas: ChoiceGuidance | None = None


class ChatCompletionResponse(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    vas: Guidance


class ValueScale(BaseModel):
    """What is known of the size of a value, in its reward's units.

    Attributes:
        reward: that it was trained on.
        std: standard deviation of the reward; null for a head with an interval.
        interval: that V cannot leave.
    """

    reward: str
    std: float | None
    interval: tuple[float, float] | None


class CardLimits(BaseModel):
    """The most alternatives and candidates that a request may ask for."""

    logprobs: int
    candidates: int


class ModelCard(BaseModel):
    """`vas_values`: names that vas_weights may use; `vas_scales`: in which range their weights make sense.

    `max_model_len` is null where a server does not know the context of the endpoint behind it; `vas_token_ids` is false
    where it continues texts there: it takes no token ids then, and tells none.
    """

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int | None
    vas_token_ids: bool
    vas_values: list[str]
    vas_scales: dict[str, ValueScale]
    vas_limits: CardLimits


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[ModelCard]


class TokenizeResponse(BaseModel):
    count: int
    max_model_len: int | None
    tokens: list[int]
    token_strs: list[str | None] | None


class DetokenizeResponse(BaseModel):
    prompt: str


class VersionResponse(BaseModel):
    version: str


class ProfileList(BaseModel):
    profiles: dict[str, Profile]


class LoadedValue(BaseModel):
    """A network that is loaded; `values` are the names that vas_weights may use.

    `unloading`: it goes when the last request that uses it has ended.
    """

    name: str
    kind: str
    values: list[str]
    unloading: bool


class ValueList(BaseModel):
    values: list[LoadedValue]


class HealthResponse(BaseModel):
    """`status`: "ok", "draining", "stuck" or "failed"."""

    status: str
