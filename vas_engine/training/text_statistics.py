"""Rewards that count: properties of a text that need no model."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

__all__ = ["STATISTICS", "Statistic"]

WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
SENTENCE_END = re.compile(r"[.!?]+(?=\s|[\"'”’)]|$)")
VOWELS = re.compile(r"[aeiouy]+")


class Statistic(NamedTuple):
    """A property of a text and the bounds it cannot leave (None when it has no upper bound)."""

    function: Callable[[str], float]
    bounds: tuple[float, float] | None


def words(text: str) -> list[str]:
    """Runs of letters and digits, an apostrophe inside included."""
    return WORD.findall(text)


def length(text: str) -> float:
    """Number of words."""
    return float(len(words(text)))


def characters(text: str) -> float:
    """Number of characters, spaces included."""
    return float(len(text))


def sentences(text: str) -> float:
    """Number of sentences; words after the last full stop count as one."""
    ends = list(SENTENCE_END.finditer(text))
    rest = text[ends[-1].end() :] if ends else text
    return float(len(ends) + bool(words(rest)))


def word_length(text: str) -> float:
    """Mean length of a word in characters; 0 without words."""
    found = words(text)
    return sum(map(len, found)) / len(found) if found else 0.0


def sentence_length(text: str) -> float:
    """Mean length of a sentence in words; 0 without sentences."""
    count = sentences(text)
    return length(text) / count if count else 0.0


def distinct_words(text: str) -> float:
    """Share of the words that differ from all words before them, case aside; 0 without words."""
    found = [word.lower() for word in words(text)]
    return len(set(found)) / len(found) if found else 0.0


def uppercase(text: str) -> float:
    """Share of the letters that are upper case; 0 without letters."""
    letters = [character for character in text if character.isalpha()]
    return sum(map(str.isupper, letters)) / len(letters) if letters else 0.0


def readability(text: str) -> float:
    """Flesch's reading ease for English, the higher the easier.

    It is 206.835 - 1.015 words per sentence - 84.6 syllables per word (Flesch 1948). Syllables are counted
    as groups of vowels, a silent final e left out. A text without words has 0.
    """
    found = words(text)
    if not found:
        return 0.0
    per_word = sum(map(_syllables, found)) / len(found)
    return 206.835 - 1.015 * len(found) / max(sentences(text), 1.0) - 84.6 * per_word


def _syllables(word: str) -> int:
    lowered = word.lower()
    groups = len(VOWELS.findall(lowered))
    silent = lowered.endswith("e") and not lowered.endswith(("le", "ee")) and groups > 1
    return max(groups - silent, 1)


STATISTICS = {
    "length": Statistic(length, None),
    "characters": Statistic(characters, None),
    "sentences": Statistic(sentences, None),
    "word-length": Statistic(word_length, None),
    "sentence-length": Statistic(sentence_length, None),
    "distinct-words": Statistic(distinct_words, (0.0, 1.0)),
    "uppercase": Statistic(uppercase, (0.0, 1.0)),
    "readability": Statistic(readability, None),
}
