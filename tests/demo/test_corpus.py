"""The demo stories: the same for a seed, and truly varied in mood, length and subject."""

import re
import statistics

import pytest
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from vas_engine.demo.corpus import MAX_SENTENCES, OPENINGS, generate_texts
from vas_engine.demo.lexicon import BONDS, COLOURS, SUBJECTS


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return list(generate_texts(1500, seed=11))


@pytest.fixture(scope="module")
def moods(texts: list[str]) -> list[float]:
    analyzer = SentimentIntensityAnalyzer()
    return [analyzer.polarity_scores(text)["compound"] for text in texts]


def test_a_seed_means_the_same_stories_whatever_their_count() -> None:
    assert list(generate_texts(20, seed=3)) == list(generate_texts(50, seed=3))[:20]
    assert list(generate_texts(20, seed=3)) != list(generate_texts(20, seed=4))


def test_moods_vary_by_degrees(moods: list[float]) -> None:
    """VADER's compound score, -1 ... 1: both ends, the middle and what lies between are all common."""
    assert statistics.stdev(moods) > 0.5
    assert abs(statistics.mean(moods)) < 0.2
    bands = [(-1.0, -0.7), (-0.7, -0.2), (-0.2, 0.2), (0.2, 0.7), (0.7, 1.0)]
    for low, high in bands:
        assert sum(low <= mood <= high for mood in moods) > 0.07 * len(moods), (low, high)


def test_mood_turns_within_some_stories(texts: list[str]) -> None:
    """In a story whose halves both have a mood, these mostly agree, yet not always."""
    analyzer = SentimentIntensityAnalyzer()
    agreeing = opposed = 0
    for text in texts:
        cut = text.find(". ", len(text) // 2)
        if cut < 0:
            continue
        halves = [analyzer.polarity_scores(half)["compound"] for half in (text[:cut], text[cut:])]
        if min(map(abs, halves)) > 0.2:
            agreeing += halves[0] * halves[1] > 0
            opposed += halves[0] * halves[1] < 0
    assert 0.1 < opposed / (agreeing + opposed) < 0.4


def test_lengths_vary_and_do_not_give_the_mood_away(texts: list[str], moods: list[float]) -> None:
    words = [len(text.split()) for text in texts]
    assert statistics.stdev(words) > 12
    assert {text.count(".") for text in texts} == set(range(1, MAX_SENTENCES + 1))
    assert abs(statistics.correlation(words, moods)) < 0.1


def test_every_subject_and_every_place_occurs(texts: list[str]) -> None:
    everything = " ".join(texts)
    missing = [
        place for subject in SUBJECTS.values() for place in subject.places if place.split(" ", 1)[1] not in everything
    ]
    assert not missing


def test_texts_are_well_formed(texts: list[str]) -> None:
    for text in texts:
        assert text.endswith("."), text
        assert text.lstrip('"')[0].isupper(), text
        assert not re.search(r"[{}()|]|  | [.,]|,,|\b[Aa] [aeiou]", text), text


def test_texts_do_not_look_alike(texts: list[str]) -> None:
    assert len(set(texts)) > 0.99 * len(texts)
    assert len({tuple(text.split()[:4]) for text in texts}) > 0.5 * len(texts)


def test_friends_and_things_are_introduced_once(texts: list[str]) -> None:
    """Tom comes in as "her friend Tom", a kite as "a red kite"; they are "Tom" and "the kite" ever after."""
    friends = re.compile(rf"\b(?:her|his|its) (?:{'|'.join(BONDS)}|sister|aunt) [A-Z]")
    kites = re.compile(rf"\b(?:{'|'.join(COLOURS)}) (?:kite|spade|basket|boat|lantern|letter|umbrella|book|pencil)\b")
    for text in texts:
        assert len(friends.findall(text)) <= 1, text
        assert len(kites.findall(text)) <= 1, text


def test_openings_are_the_beginnings_of_texts() -> None:
    """Short, distinct, and made of words that the stories use."""
    vocabulary = set(re.findall(r"\w+", " ".join(generate_texts(5000, seed=7))))
    assert len(set(OPENINGS)) == len(OPENINGS) >= 16
    for opening in OPENINGS:
        assert opening == opening.strip()
        assert set(re.findall(r"\w+", opening)) <= vocabulary, opening
