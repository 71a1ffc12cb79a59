"""How a server is run: names, keys, limits and times."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Limits:
    """The most that one request may ask for; whatever is above is refused before anything is allocated for it.

    Attributes:
        body_bytes: of a request's body.
        json_items: commas of a body outside its texts: entries of lists and objects.
        json_depth: nested arrays and objects of a body.
        prompts: of one /v1/completions request.
        n: completions of one prompt, best_of included.
        candidates: `vas_candidates`.
        logprobs: alternatives a token is reported with.
        stop: stop strings, and stop token ids.
        stop_chars: of one stop string.
        logit_bias: entries.
        messages: of a conversation.
    """

    body_bytes: int = 4 * 2**20
    json_items: int = 2**18
    json_depth: int = 32
    prompts: int = 64
    n: int = 16
    candidates: int = 100
    logprobs: int = 20
    stop: int = 16
    stop_chars: int = 256
    logit_bias: int = 300
    messages: int = 1024


@dataclass(frozen=True)
class Settings:
    """What a server is told beside its model.

    Attributes:
        model_name: as clients call the model.
        chat_template: Jinja text in place of the tokenizer's own; the operator's, never a client's.
        api_keys: with none, whoever reaches the port may use it.
        hosts: names that a request may call this server by while there is no key, so that no web page can reach it
            under a name of its own; empty allows all.
        admin_key: opens /admin; None leaves it closed.
        salt_per_key: no prefix is shared between keys.
        profiles: YAML file of named weights; None keeps those made by the admin API in memory.
        values_dir: the only folder that values may be loaded from while serving; None: none may.
        limits: of a single request.
        max_waiting: completions that may wait beyond those that run; more are answered with 429.
        itl_slo: seconds that a step may take, which bounds the time between two tokens; None is no bound, and then no
            result depends on the load.
        request_timeout: seconds a request may take.
        write_timeout: seconds a client may leave a stream unread before its connection is given up.
        drain_timeout: seconds that requests have to finish after SIGTERM.
        step_timeout: seconds after which a step counts as stuck.
    """

    model_name: str
    chat_template: str | None = None
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    hosts: tuple[str, ...] = ()
    admin_key: str | None = field(default=None, repr=False)
    salt_per_key: bool = False
    profiles: Path | None = None
    values_dir: Path | None = None
    limits: Limits = Limits()
    max_waiting: int = 256
    itl_slo: float | None = None
    request_timeout: float = 600.0
    write_timeout: float = 60.0
    drain_timeout: float = 60.0
    step_timeout: float = 60.0
