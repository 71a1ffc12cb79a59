"""Text out of a growing sequence of token ids: whole characters only, stop strings held back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Protocol

REPLACEMENT = "\ufffd"  # what decoders print for bytes that are no character (yet)
CONTEXT_TOKENS = 6
# A character has at most four bytes, so at most three replacement marks can still become one.
MAX_INCOMPLETE = 3
# Tokens whose borders cut characters again and again never reach a clean border: the window is cut instead.
MAX_PENDING = 24


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that is used here."""

    all_special_ids: list[int]

    def decode(self, token_ids: list[int], *, clean_up_tokenization_spaces: bool) -> str: ...


class Detokenizer:
    """Incremental decoding of one sequence, at a cost that does not grow with its length.

    A token's text depends on its neighbours: a leading space is dropped at the start of a text, a character
    may be spread over tokens. So a window is decoded: a few tokens already printed as context, then the
    pending ones. The pieces that `push` and `flush` return join to the decoding of the whole. Bytes that
    could still grow into a character are kept until they do, or until `flush`.

    Args:
        tokenizer: a Hugging Face tokenizer.
        prompt_ids: tokens before the first one pushed; their text is context, it is not returned, except
            that a character they left incomplete is returned whole once it is complete.
        skip_special_tokens: leave special tokens out.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int] = (), skip_special_tokens: bool = True) -> None:
        self._decode_ids = decoder(tokenizer)
        self._skipped = frozenset(tokenizer.all_special_ids) if skip_special_tokens else frozenset()
        tail = [token for token in prompt_ids[-4 * CONTEXT_TOKENS :] if token not in self._skipped]
        self._window, self._read = self._split(tail[-CONTEXT_TOKENS - MAX_INCOMPLETE :])
        self._context = self._decode(self._window[: self._read])
        self._emitted = len(without_incomplete(self._pending_text()))

    def push(self, token_id: int) -> str:
        """The text that this token completes; may be empty."""
        if token_id in self._skipped:
            return ""
        self._window.append(token_id)
        text = self._pending_text()
        stable = without_incomplete(text)
        delta = stable[self._emitted :]
        self._emitted = max(self._emitted, len(stable))
        pending = len(self._window) - self._read
        if (text and len(stable) == len(text)) or pending > MAX_PENDING:
            self._advance(len(text) > len(stable))
        return delta

    def flush(self) -> str:
        """The rest at the end of the sequence, incomplete characters as replacement marks."""
        delta = self._pending_text()[self._emitted :]
        self._emitted += len(delta)
        return delta

    def _split(self, tail: list[int]) -> tuple[list[int], int]:
        """A window over the end of the prompt, and how much of it is context: both cut between characters."""
        for pending in range(min(MAX_INCOMPLETE, len(tail)) + 1):
            end = len(tail) - pending
            for start in range(min(MAX_INCOMPLETE + 1, end) or 1):
                if REPLACEMENT not in self._decode(tail[start:end]):
                    return tail[start:], end - start
        return tail, len(tail)

    def _pending_text(self) -> str:
        text = self._decode(self._window)
        if text.startswith(self._context):
            return text[len(self._context) :]
        # Bytes of one run are decoded together: a bad one can undo characters before it, printed already.
        return self._decode(self._window[self._read :])

    def _advance(self, inside_character: bool) -> None:
        """Makes the pending tokens the context of those to come."""
        if not inside_character:
            recent = self._window[self._read :]
            text = self._decode(recent)
            # Without a visible character the decoder may strip it all, and then it says nothing as context.
            if text.strip() or len(self._window) > MAX_PENDING:
                self._window, self._context = recent, text
            else:
                self._context = self._decode(self._window)
            self._read, self._emitted = len(self._window), 0
            return
        # No clean border to cut at: forget older tokens, and count what the younger ones have printed.
        self._window = self._window[-MAX_PENDING // 2 :]
        self._read, self._context = 0, ""
        self._emitted = len(without_incomplete(self._decode(self._window)))

    def _decode(self, ids: list[int]) -> str:
        return self._decode_ids(ids) if ids else ""


def decoder(tokenizer: Tokenizer) -> Callable[[list[int]], str]:
    """The tokenizer's plain decoding; straight from its backend where it has one, several times faster a call.

    Ids that it raises on (a model may have more tokens than its tokenizer) are replacement marks.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)

    def plain(ids: list[int]) -> str:
        if backend is not None:
            return backend.decode(ids, skip_special_tokens=False)
        return tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    def known(token: int) -> bool:
        try:
            plain([token])
        except Exception:
            return False
        return True

    def decode(ids: list[int]) -> str:
        try:
            return plain(ids)
        except Exception:
            runs = [(is_known, list(run)) for is_known, run in groupby(ids, known)]
            return "".join(plain(run) if is_known else REPLACEMENT * len(run) for is_known, run in runs)

    return decode


def without_incomplete(text: str) -> str:
    """The text without trailing replacement marks that further bytes could still turn into a character."""
    end = len(text)
    while end > max(len(text) - MAX_INCOMPLETE, 0) and text[end - 1] == REPLACEMENT:
        end -= 1
    return text[:end]


class StopMatcher:
    """Finds the first stop string in a text that arrives in pieces.

    The result is that of reading character by character: the stop string that is complete first ends the
    text, the longest of those that end together. What could be the beginning of one is held back, no more.
    """

    def __init__(self, stops: Sequence[str], include: bool = False) -> None:
        self._stops = tuple(stops)
        self._longest = max(map(len, stops), default=0)
        self._include = include
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """The text that is safe to show. After a match `matched` is set and the text ends before it."""
        if not self._stops or self.matched is not None:
            return text if not self._stops else ""
        text = self._held + text
        found = [(text.find(stop), stop) for stop in self._stops]
        complete = [(start + len(stop), start, stop) for start, stop in found if start >= 0]
        if complete:
            end, _, self.matched = min(complete)
            self._held = ""
            return text[: end if self._include else end - len(self.matched)]
        keep = self._possible_start(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def skip(self, text: str) -> str:
        """Lets text through unmatched (a completion that is still too short to stop)."""
        return self.flush() + text

    def flush(self) -> str:
        """What was held back, at the end of the text."""
        text, self._held = self._held, ""
        return text

    def _possible_start(self, text: str) -> int:
        for size in range(min(self._longest - 1, len(text)), 0, -1):
            suffix = text[-size:]
            if any(stop.startswith(suffix) for stop in self._stops):
                return size
        return 0
