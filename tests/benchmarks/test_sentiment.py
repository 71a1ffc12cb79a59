import json
import zipfile

import pytest

from benchmarks import sentiment
from tests.conftest import SHARED
from vas_engine.training.rewards import load_reward, score

GOOD, BAD, PLAIN = ["glad", "bright", "warm"], ["grim", "dull", "cold"], ["film", "dog", "day", "tale", "song"]


@pytest.fixture
def archives(tmp_path):
    """Sentences, words and reviews of two labels that a word tells apart."""
    folder = tmp_path / "data"
    folder.mkdir()
    sentences = {
        ending: [f"the {plain} was {mood} and {other}" for plain in PLAIN for mood in words for other in PLAIN]
        for ending, words in (("pos", GOOD), ("neg", BAD))
    }
    with zipfile.ZipFile(folder / "sentence_polarity.zip", "w") as archive:
        for ending, lines in sentences.items():
            archive.writestr(f"sentence_polarity/rt-polarity.{ending}", "\n".join(lines))
    with zipfile.ZipFile(folder / "opinion_lexicon.zip", "w") as archive:
        archive.writestr("opinion_lexicon/positive-words.txt", "; a comment\n\n" + "\n".join(GOOD))
        archive.writestr("opinion_lexicon/negative-words.txt", "; a comment\n\n" + "\n".join(BAD))
    with zipfile.ZipFile(folder / "movie_reviews.zip", "w") as archive:
        for ending, lines in sentences.items():
            for number in range(20):
                archive.writestr(f"movie_reviews/{ending}/cv{number}.txt", " ".join(lines[number : number + 10]))
    return folder


def test_learns_and_becomes_a_reward(archives, tmp_path):
    settings = sentiment.Settings(vocabulary=200, width=16, epochs=12, batch=16, lr=5e-3, dropout=0.0)
    report = sentiment.run(archives, tmp_path / "classifier", settings)
    assert report["heldout_sentences"] == 15
    assert report["sentences"] == 1.0
    assert report["passages"] == 1.0
    assert json.loads((tmp_path / "classifier" / "training.json").read_text()) == report
    mood = load_reward(f"hf:{tmp_path / 'classifier'}#positive")
    assert mood.bounds == (0.0, 1.0)
    glad, grim = score(mood, ["", ""], ["the dog was glad", "the dog was grim"])
    assert glad > 0.7 > 0.3 > grim


def test_no_review_is_on_both_sides(archives):
    corpus = sentiment.read_corpus(archives, sentiment.Settings(passage_words=1000))
    assert len(corpus.passages) + len(corpus.heldout_passages) == 0  # none is as long as half of that
    corpus = sentiment.read_corpus(archives, sentiment.Settings(passage_words=50))
    assert len(corpus.heldout_passages) == 4
    assert len(corpus.words) == 6
    assert not {text for text, _ in corpus.sentences} & {text for text, _ in corpus.heldout_sentences}


@pytest.mark.slow
def test_the_real_thing_is_right_most_of_the_time(tmp_path):
    data = SHARED / "data" / "sentiment"
    if not data.is_dir():
        pytest.skip(f"{data} is absent; point VAS_SHARED at the folder that holds data/sentiment")
    report = sentiment.run(data, tmp_path / "classifier", sentiment.Settings(epochs=3))
    assert report["sentences"] > 0.74
