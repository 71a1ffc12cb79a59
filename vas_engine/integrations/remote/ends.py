"""Which tokens end a text, as far as an endpoint has shown."""

from __future__ import annotations

from typing import Any

from vas_engine.integrations.remote.endpoint import Alternative

END_TEXTS = frozenset(
    {"</s>", "<|endoftext|>", "<|im_end|>", "<|eot_id|>", "<|end_of_text|>", "<eos>", "<end_of_turn>"}
)
"""How tokenizers write the end of a text; the endpoint's tokenizer, where given, and its answers add theirs."""


class Ends:
    """Tokens that end a text: known by their ids where they have any, else by how the endpoint writes them.

    Args:
        tokenizer: of the endpoint's model; None where it is not given.
    """

    def __init__(self, tokenizer: Any | None) -> None:
        self._texts, self._ids = set(END_TEXTS), set()
        if tokenizer is not None and tokenizer.eos_token_id is not None:
            self._texts.add(tokenizer.eos_token)
            self._ids.add(tokenizer.eos_token_id)

    def __contains__(self, token: Alternative) -> bool:
        return token.id in self._ids if token.id is not None else token.text in self._texts

    def learn(self, token: Alternative) -> None:
        """Takes in a token that ended a text; one that has neither id nor text says nothing."""
        if token.id is not None:
            self._ids.add(token.id)
        elif token.text:
            self._texts.add(token.text)

    def learn_silence(self) -> None:
        """A token without text ends one, too."""
        self._texts.add("")
