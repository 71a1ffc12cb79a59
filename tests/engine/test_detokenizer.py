"""Incremental text equals one-shot text, shows whole characters only, and never costs more as it grows."""

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tests.tiny import byte_alphabet
from vas_engine.engine.detokenizer import (
    CONTEXT_TOKENS,
    MAX_PENDING,
    REPLACEMENT,
    Detokenizer,
    StopMatcher,
    without_incomplete,
)

SHARED = Path(os.environ.get("VAS_SHARED", Path(__file__).parents[3] / "shared"))
TEXTS = [
    'Once upon a time, there was a girl. She said: "Hello!"\n\n  Then?',
    "naïve café, Straße, 10 €, 你好世界, 👩‍👩‍👧 and 🎉🎉 done",
    " leading and trailing ",
    "日本語のテキスト",
]


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """A token for every byte, some for two bytes that cut characters, and an end token."""
    table = byte_alphabet()
    vocab = {character: byte for byte, character in enumerate(table)}
    for first, second in [(0x6F, 0xE4), (0xE4, 0xBD), (0xA0, 0xE5), (0x20, 0xF0), (0x9F, 0x8E)]:
        vocab[table[first] + table[second]] = len(vocab)
    vocab["<end>"] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


def metaspace_tokenizer() -> PreTrainedTokenizerFast:
    """Llama's way: words behind a space mark, and a token for every byte that falls back."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    for piece in ["▁", "▁Hello", "▁world", "!", "a", "€"]:
        vocab[piece] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", bos_token="<s>", unk_token="<unk>")


BYTE_LEVEL, METASPACE = byte_level_tokenizer(), metaspace_tokenizer()
WORDS = METASPACE.get_vocab()


def fallback(text: str) -> list[int]:
    return [3 + byte for byte in text.encode()]


def pieces(tokenizer, ids, prompt_ids=(), **options) -> list[str]:
    detokenizer = Detokenizer(tokenizer, prompt_ids, **options)
    return [*(detokenizer.push(token) for token in ids), detokenizer.flush()]


@pytest.mark.parametrize("model", ["stories3M", "stories260K", "tinystories-656k"])
@pytest.mark.parametrize("text", TEXTS)
def test_pieces_join_to_the_whole_text(model, text):
    folder = SHARED / "models" / model
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.encode(text)
    whole = tokenizer.decode(ids, skip_special_tokens=True)
    before = ""
    for cut in range(len(ids)):
        prompt = tokenizer.decode(ids[:cut], skip_special_tokens=True)
        before = before if REPLACEMENT in prompt else prompt  # a prompt cut inside a character ends before it
        assert before + "".join(pieces(tokenizer, ids[cut:], ids[:cut])) == whole


@given(st.text(st.characters(codec="utf-8"), max_size=40))
@settings(max_examples=150, deadline=None)
def test_any_text_byte_by_byte_shows_whole_characters(text):
    for tokenizer, ids in ((BYTE_LEVEL, list(text.encode())), (METASPACE, [WORDS["a"], *fallback(text)])):
        shown = "".join(pieces(tokenizer, ids))
        assert shown.removeprefix("a" if tokenizer is METASPACE else "") == text
        for count in range(len(ids)):
            so_far = "".join(pieces(tokenizer, ids[:count])[:-1])
            assert shown.startswith(so_far) or REPLACEMENT in text


@given(st.lists(st.integers(0, 260), max_size=120))
@settings(max_examples=300, deadline=None)
def test_any_bytes_even_broken_ones_join_to_the_whole(ids):
    assert "".join(pieces(BYTE_LEVEL, ids)) == BYTE_LEVEL.decode(ids, clean_up_tokenization_spaces=False)


def test_tokens_that_always_end_inside_a_character():
    # E4 BD A0 and E5 A5 BD are characters, the tokens A0 E5 and E4 BD lie across their borders.
    table = BYTE_LEVEL.get_vocab()
    across = table[byte_alphabet()[0xA0] + byte_alphabet()[0xE5]]
    assert across >= 256
    lead = [0xE4, 0xBD]
    ids = [*lead]
    for _ in range(200):
        ids += [across, 0xA5, table[byte_alphabet()[0xE4] + byte_alphabet()[0xBD]]]
    text = BYTE_LEVEL.decode(ids, clean_up_tokenization_spaces=False)
    assert "".join(pieces(BYTE_LEVEL, ids)) == text


def test_cost_does_not_grow_with_length():
    class Counting:
        all_special_ids = BYTE_LEVEL.all_special_ids
        longest = 0

        def decode(self, ids, **options):
            self.longest = max(self.longest, len(ids))
            return BYTE_LEVEL.decode(ids, **options)

    for ids in (list(b"plain text " * 300), [0x80] * 3000, [0xE4] * 3000):
        counting = Counting()
        pieces(counting, ids)
        assert counting.longest <= CONTEXT_TOKENS + MAX_PENDING + 1


def test_half_a_character_waits_for_the_rest():
    detokenizer = Detokenizer(BYTE_LEVEL)
    assert [detokenizer.push(byte) for byte in "é!".encode()] == ["", "é", "!"]
    assert detokenizer.flush() == ""


def test_half_a_character_at_the_end_is_flushed_once():
    detokenizer = Detokenizer(METASPACE)
    assert detokenizer.push(WORDS["▁Hello"]) == "Hello"
    assert detokenizer.push(fallback("€")[0]) == ""
    assert detokenizer.flush() == REPLACEMENT
    assert detokenizer.flush() == ""


def test_an_open_run_of_bytes_does_not_take_back_what_was_printed():
    # The decoder turns the whole run € + E2 into four replacement marks; the € stands printed already.
    ids = [*fallback("€"), fallback("€")[0], WORDS["a"]]
    assert "".join(pieces(METASPACE, ids)) == "€" + REPLACEMENT + "a"


def test_leading_space_follows_the_prompt():
    ids = [WORDS["▁world"], WORDS["!"]]
    assert "".join(pieces(METASPACE, ids, [1, WORDS["▁Hello"]])) == " world!"
    assert "".join(pieces(METASPACE, ids)) == "world!"


def test_a_prompt_that_ends_inside_a_character():
    ids = fallback("€")
    assert pieces(METASPACE, ids[2:], [WORDS["▁Hello"], *ids[:2]])[0] == "€"


def test_special_tokens_are_left_out_or_kept():
    end = BYTE_LEVEL.eos_token_id
    assert "".join(pieces(BYTE_LEVEL, [*b"a", end])) == "a"
    assert "".join(pieces(BYTE_LEVEL, [*b"a", end], skip_special_tokens=False)) == "a<end>"


def test_a_real_replacement_mark_is_text():
    assert "".join(pieces(BYTE_LEVEL, list("a\ufffdb".encode()))) == "a\ufffdb"


def test_without_incomplete():
    assert without_incomplete("ab" + REPLACEMENT * 2) == "ab"
    assert without_incomplete("ab" + REPLACEMENT * 5) == "ab" + REPLACEMENT * 2


def reference_stop(text: str, stops: list[str]) -> tuple[str, str | None]:
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            stop = max(ending, key=len)
            return text[: end - len(stop)], stop
    return text, None


STOPS = st.lists(st.text("ab", min_size=1, max_size=4), max_size=3)


@given(st.lists(st.text("ab", max_size=5), max_size=12), STOPS)
@settings(max_examples=500, deadline=None)
def test_stops_do_not_depend_on_where_tokens_end(chunks, stops):
    matcher = StopMatcher(stops)
    shown = ""
    for chunk in chunks:
        shown += matcher.push(chunk)
        text = reference_stop("".join(chunks), stops)[0]
        assert text.startswith(shown)
    shown += "" if matcher.matched else matcher.flush()
    assert (shown, matcher.matched) == reference_stop("".join(chunks), stops)


@given(st.text("ab", max_size=12), STOPS)
@settings(max_examples=300, deadline=None)
def test_no_more_is_held_back_than_could_begin_a_stop(text, stops):
    matcher = StopMatcher(stops)
    shown = "".join(matcher.push(character) for character in text)
    if matcher.matched is None:
        held = text[len(shown) :]
        assert held == "" or any(stop.startswith(held) and stop != held for stop in stops)


def test_the_stop_string_can_be_kept():
    matcher = StopMatcher(["END"], include=True)
    assert "".join(matcher.push(piece) for piece in ["one E", "N", "D two", "more"]) == "one END"
    assert matcher.matched == "END"


def test_skip_lets_a_stop_string_through():
    matcher = StopMatcher(["ab"])
    assert matcher.push("xa") == "x"
    assert matcher.skip("b") == "ab"
    assert matcher.push("ab") == ""
    assert matcher.matched == "ab"
