"""What a caller may give as a prompt, brought to one form."""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vas_engine.arguments import unknown_argument
from vas_engine.errors import InvalidArgumentError

_FORMS = "a text, a list of token ids, {'prompt': text} or {'prompt_token_ids': ids}"
_KEYS = ("prompt", "prompt_token_ids")


class ChatPrompt(str):
    """The text of a prompt that was a conversation: what the model read, with the messages it came from.

    Attributes:
        messages: ``[{"role": ..., "content": ...}, ...]``.
    """

    messages: list[dict[str, str]]

    def __new__(cls, text: str, messages: list[dict[str, str]]) -> ChatPrompt:
        prompt = super().__new__(cls, text)
        prompt.messages = messages
        return prompt

    def __getnewargs__(self) -> tuple[str, list[dict[str, str]]]:  # type: ignore[override]
        # For pickling: str's own would leave the messages out.
        return str(self), self.messages


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt as it was given: text (a `ChatPrompt` of a conversation), token ids, or ids with their text."""

    text: str | None = None
    token_ids: list[int] | None = None

    def encode(self, tokenizer: Any | None) -> list[int]:
        """Its token ids, with the special tokens that the tokenizer puts before a text.

        Raises:
            InvalidArgumentError: no text, no tokenizer for it, or text that cannot be encoded.
        """
        if self.token_ids is not None:
            return self.token_ids
        if not self.text:
            fix = "is empty; give some text, or {'prompt_token_ids': [id]} to start from one token such as BOS"
            raise InvalidArgumentError("prompt", self.text, fix)
        if tokenizer is None:
            fix = "no tokenizer is loaded; pass token ids, or LLM(..., tokenizer=folder)"
            raise InvalidArgumentError("prompt", _short(self.text), fix)
        try:
            return list(tokenizer.encode(self.text))
        except (TypeError, ValueError, OverflowError) as error:
            fix = f"cannot be encoded ({error}); give valid Unicode text"
            raise InvalidArgumentError("prompt", _short(self.text), fix) from error


def read_prompts(prompts: Any) -> list[Prompt]:
    """One prompt or a list of them, in any of their forms.

    Raises:
        InvalidArgumentError: something that is no prompt, named by its place in the list.
    """
    if isinstance(prompts, str | Mapping | Prompt) or _are_ids(prompts):
        return [read_prompt(prompts, "prompts")]
    if isinstance(prompts, Sequence) and not isinstance(prompts, bytes):
        return [read_prompt(prompt, f"prompts[{index}]") for index, prompt in enumerate(prompts)]
    raise InvalidArgumentError("prompts", prompts, f"must be {_FORMS}, or a list of these")


def read_prompt(prompt: Any, where: str = "prompt") -> Prompt:
    """One prompt in any of its forms.

    Raises:
        InvalidArgumentError: something that is no prompt, called `where`.
    """
    if isinstance(prompt, Prompt):
        return prompt
    if isinstance(prompt, str):
        return Prompt(text=prompt)
    if _are_ids(prompt) or _is_empty(prompt):
        return Prompt(token_ids=[int(token) for token in prompt])
    if not isinstance(prompt, Mapping):
        raise InvalidArgumentError(where, prompt, f"must be {_FORMS}")
    for key in prompt:
        if key not in _KEYS:
            unknown_argument(f"{where}[{key!r}]", prompt[key], _KEYS, {})
    text, ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
    if ids is None and text is None:
        raise InvalidArgumentError(where, dict(prompt), f"must be {_FORMS}")
    if text is not None and not isinstance(text, str):
        raise InvalidArgumentError(f"{where}['prompt']", text, "must be a text")
    if ids is not None and not _are_ids(ids) and not _is_empty(ids):
        raise InvalidArgumentError(f"{where}['prompt_token_ids']", ids, "must be a list of token ids")
    return Prompt(text, None if ids is None else [int(token) for token in ids])


def _are_ids(prompt: Any) -> bool:
    """Whether this is a non-empty list, array or tensor of integers."""
    if getattr(prompt, "ndim", 1) != 1 or isinstance(prompt, str | bytes | Mapping):
        return False
    items = prompt.tolist() if hasattr(prompt, "tolist") else prompt
    if not isinstance(items, Sequence) or not items:
        return False
    return all(isinstance(item, numbers.Integral) and not isinstance(item, bool) for item in items)


def _is_empty(prompt: Any) -> bool:
    """Whether this is an empty list: no ids, which the engine refuses."""
    return isinstance(prompt, Sequence) and not prompt


def _short(text: str, limit: int = 60) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"
