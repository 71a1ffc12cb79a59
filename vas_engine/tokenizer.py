"""Tokenizers and chat templates of Hugging Face."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from vas_engine.errors import InvalidArgumentError
from vas_engine.prompts import ChatPrompt, Prompt, read_prompt


def load_tokenizer(model: Any, tokenizer: Any, revision: str | None, required: bool) -> Any | None:
    """The tokenizer given, or the model's own; None where the model is no folder or hub name.

    Raises:
        InvalidArgumentError: none can be read, and it is `required` or was asked for.
    """
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        return tokenizer
    source = tokenizer if tokenizer is not None else model
    if not isinstance(source, str | Path):
        if tokenizer is not None:
            raise InvalidArgumentError("tokenizer", tokenizer, "must be a folder, a hub name or a tokenizer")
        return None
    try:
        return AutoTokenizer.from_pretrained(str(source), revision=revision, trust_remote_code=False)
    except Exception as error:  # whatever a broken file makes its parser raise
        if not required and tokenizer is None:
            return None
        why = f"no tokenizer can be read there ({_first_line(error)})"
        fix = f"{why}; pass tokenizer=folder, or skip_tokenizer_init=True"
        raise InvalidArgumentError("tokenizer", str(source), fix) from error


def render_chat(tokenizer: Any | None, messages: Any, **options: Any) -> Prompt:
    """A conversation as text and token ids, by a chat template.

    Args:
        messages: [{"role": ..., "content": ...}, ...].
        options: `chat_template`, `add_generation_prompt` and the template's own variables.

    Raises:
        InvalidArgumentError: no template, messages that are none, or a template that refuses them.
    """
    if tokenizer is None:
        raise InvalidArgumentError("messages", messages, "no tokenizer is loaded; chat needs one with a template")
    if not getattr(tokenizer, "chat_template", None) and not options.get("chat_template"):
        fix = (
            "the tokenizer has no chat template (a base model?): complete a text, or give chat_template= (vas serve "
            "--chat-template)"
        )
        raise InvalidArgumentError("messages", messages, fix)
    shape = isinstance(messages, list | tuple) and all(isinstance(m, dict) and "role" in m for m in messages)
    if not shape or not messages:
        fix = "must be a list such as [{'role': 'user', 'content': 'Hi'}]"
        raise InvalidArgumentError("messages", messages, fix)
    try:
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, **options)
    except Exception as error:  # templates raise what they like
        raise InvalidArgumentError("messages", messages, f"the chat template refuses them: {error}") from error
    try:
        # The template writes the special tokens itself.
        return Prompt(text, list(tokenizer.encode(text, add_special_tokens=False)))
    except (TypeError, ValueError, OverflowError) as error:
        fix = f"cannot be encoded ({error}); give valid Unicode text"
        raise InvalidArgumentError("messages", messages, fix) from error


def as_prompt(tokenizer: Any | None, prompt: Any, where: str = "prompt") -> Prompt:
    """One prompt in any of its forms, a conversation among them: for all who sample from a list of prompts.

    Args:
        prompt: a form that `read_prompts` takes, or ``[{"role": ..., "content": ...}, ...]``, in which an assistant's
            turn is opened, or the last one continued if it is the assistant's. Its text is a `ChatPrompt`.
        where: name of the prompt in errors.

    Raises:
        InvalidArgumentError: something that is no prompt, or a conversation that cannot be rendered.
    """
    if not (isinstance(prompt, list | tuple) and prompt and isinstance(prompt[0], dict)):
        return read_prompt(prompt, where)
    read = render_chat(tokenizer, prompt, **turn_of(prompt))
    return Prompt(ChatPrompt(read.text or "", list(prompt)), read.token_ids)


def turn_of(messages: Any) -> dict[str, bool]:
    """The option of `render_chat` by which the assistant speaks next: its turn is opened, or the last one goes on."""
    last = messages[-1] if isinstance(messages, list | tuple) and messages else None
    goes_on = isinstance(last, dict) and last.get("role") == "assistant"
    return {"continue_final_message" if goes_on else "add_generation_prompt": True}


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
