"""The block manager by itself: tables, sharing, copies on fork, the prefix cache, what it forgets first."""

from __future__ import annotations

import hashlib
import struct

import pytest

from vas_engine.engine.blocks import BlockManager
from vas_engine.engine.sequence import Sequence
from vas_engine.errors import InvalidArgumentError


def prompt(tokens: list[int], **fields: object) -> Sequence:
    return Sequence("r", len(tokens), list(tokens), **fields)


def fill(blocks: BlockManager, sequence: Sequence) -> Sequence:
    """What admission and a forward over the whole prompt do."""
    blocks.match_prefix(sequence, len(sequence.token_ids) - 1)
    assert blocks.grow(sequence, len(sequence.token_ids))
    sequence.num_computed = len(sequence.token_ids)
    blocks.register(sequence)
    return sequence


@pytest.mark.parametrize(("name", "args"), [("num_blocks", (0, 4)), ("block_size", (4, 0))])
def test_impossible_sizes_are_refused_by_name(name: str, args: tuple[int, int]) -> None:
    with pytest.raises(InvalidArgumentError, match=name):
        BlockManager(*args)


def test_grow_extends_the_same_list_and_only_when_needed() -> None:
    blocks, sequence = BlockManager(4, 2), prompt([1, 2, 3])
    table = sequence.block_table
    assert blocks.grow(sequence, 3)
    assert len(table) == 2
    assert blocks.num_used == 2
    assert blocks.grow(sequence, 4)
    assert len(table) == 2
    assert blocks.grow(sequence, 5)
    assert sequence.block_table is table
    assert len(set(table)) == 3
    blocks.check([sequence])


def test_grow_takes_all_or_nothing() -> None:
    blocks, first, second = BlockManager(3, 2), prompt([1] * 4), prompt([2] * 4)
    assert blocks.grow(first, 4)
    assert not blocks.grow(second, 4)
    assert second.block_table == []
    assert blocks.num_free == 1
    blocks.check([first, second])


def test_release_gives_everything_back() -> None:
    blocks = BlockManager(3, 2, enable_prefix_caching=False)
    sequence = fill(blocks, prompt([1, 2, 3, 4, 5]))
    assert blocks.num_free == 0
    blocks.release(sequence)
    assert (blocks.num_free, blocks.num_idle, sequence.block_table, sequence.num_computed) == (3, 0, [], 0)
    blocks.check([])


def test_equal_prefixes_share_whole_blocks_and_never_the_last_token() -> None:
    blocks = BlockManager(8, 2)
    first = fill(blocks, prompt([1, 2, 3, 4]))
    same, longer = prompt([1, 2, 3, 4]), prompt([1, 2, 3, 4, 5])
    assert blocks.match_prefix(same, 3) == 2
    assert same.block_table == first.block_table[:1]
    assert blocks.match_prefix(longer, 4) == 4
    assert longer.block_table == first.block_table
    assert blocks.num_owners(first.block_table[0]) == 3
    blocks.check([first, same, longer])


def test_the_prefix_must_agree_from_its_beginning() -> None:
    blocks = BlockManager(8, 2)
    fill(blocks, prompt([1, 2, 3, 4, 5]))
    assert blocks.match_prefix(prompt([9, 2, 3, 4, 5]), 4) == 0  # block [3, 4] is known, but after [1, 2]
    assert blocks.match_prefix(prompt([1, 2, 9, 4, 5]), 4) == 2


def test_salts_keep_prefixes_apart() -> None:
    blocks = BlockManager(8, 2)
    plain, salted = fill(blocks, prompt([1, 2, 3])), fill(blocks, prompt([1, 2, 3], salt=b"side"))
    assert salted.num_cached == 0
    assert not set(plain.block_table) & set(salted.block_table)
    assert blocks.match_prefix(prompt([1, 2, 3], salt=b"side"), 2) == 2


def test_a_digest_is_the_chained_sha256_of_salt_and_tokens() -> None:
    blocks = BlockManager(4, 2)
    sequence = fill(blocks, prompt([7, 2**40, 3, 4], salt=b"s"))
    digest = hashlib.sha256(b"s").digest()
    for pair in ((7, 2**40), (3, 4)):
        digest = hashlib.sha256(digest + struct.pack("<2q", *pair)).digest()
    assert sequence.digests[1] == digest


def test_a_sequence_may_decline_the_prefix_cache_and_still_serve_it() -> None:
    blocks = BlockManager(8, 2)
    fill(blocks, prompt([1, 2, 3]))
    declines = prompt([1, 2, 3], use_prefix_cache=False)
    assert blocks.match_prefix(declines, 2) == 0
    assert blocks.prefix_hit_tokens == 0
    fill(blocks, prompt([8, 8, 8], use_prefix_cache=False))
    assert blocks.match_prefix(prompt([8, 8, 8]), 2) == 2


def test_switched_off_nothing_is_found() -> None:
    blocks = BlockManager(8, 2, enable_prefix_caching=False)
    first = fill(blocks, prompt([1, 2, 3]))
    second = fill(blocks, prompt([1, 2, 3]))
    assert second.num_cached == 0
    assert first.digests == []
    assert blocks.prefix_queried_tokens == 0


def test_counters_of_the_prefix_cache() -> None:
    blocks = BlockManager(8, 2)
    fill(blocks, prompt([1, 2, 3, 4, 5]))
    fill(blocks, prompt([1, 2, 3, 9, 9]))
    assert (blocks.prefix_queried_tokens, blocks.prefix_hit_tokens) == (8, 2)


def test_freed_blocks_are_found_until_they_are_reused() -> None:
    blocks = BlockManager(3, 2)
    first = fill(blocks, prompt([1, 2, 3, 4, 5]))
    blocks.release(first)
    assert (blocks.num_free, blocks.num_idle) == (3, 2)
    again = prompt([1, 2, 3, 4, 5])
    assert blocks.match_prefix(again, 4) == 4
    blocks.release(again)
    other = fill(blocks, prompt([9] * 6))  # takes all three blocks
    blocks.check([other])
    assert blocks.find_prefix(again, 4) == []


def test_empty_blocks_go_first_then_the_longest_unused_and_a_prefix_after_its_continuation() -> None:
    blocks = BlockManager(5, 2)
    old, new = prompt([1, 2, 3, 4]), prompt([5, 6])
    fill(blocks, old), fill(blocks, new)
    head, tail = old.block_table
    newer = new.block_table[0]
    blocks.release(old), blocks.release(new)
    taker = prompt([0] * 10, use_prefix_cache=False)
    order = []
    for length in range(2, 11, 2):
        assert blocks.grow(taker, length)
        order.append(taker.block_table[-1])
    assert order[2:] == [tail, head, newer]
    assert not {head, tail, newer} & set(order[:2])


def test_being_found_again_makes_a_block_recent() -> None:
    blocks = BlockManager(2, 2)
    a, b = fill(blocks, prompt([1, 1])), fill(blocks, prompt([2, 2]))
    block_a = a.block_table[0]
    blocks.release(a), blocks.release(b)
    asker = prompt([1, 1, 1])
    blocks.match_prefix(asker, 2)
    blocks.release(asker)
    taker = prompt([3])
    blocks.grow(taker, 1)
    assert taker.block_table != [block_a]
    assert blocks.find_prefix(asker, 2) == [block_a]


def test_of_two_equal_blocks_the_first_stays_known() -> None:
    blocks = BlockManager(4, 2)
    first, second = prompt([1, 2]), prompt([1, 2])
    fill(blocks, first), fill(blocks, second)  # a two-token prompt matches nothing: its last token is needed
    assert first.block_table != second.block_table
    assert blocks.find_prefix(prompt([1, 2, 3]), 2) == first.block_table
    blocks.check([first, second])
    blocks.release(second)
    assert blocks.num_idle == 0
    blocks.check([first])


def test_fork_shares_full_blocks_and_copies_the_partial_one() -> None:
    blocks = BlockManager(8, 2)
    parent, child = fill(blocks, prompt([1, 2, 3, 4, 5])), prompt([1, 2, 3, 4, 5])
    copy = blocks.fork(parent, child)
    assert child.block_table[:2] == parent.block_table[:2]
    assert copy == (parent.block_table[2], child.block_table[2])
    assert copy[0] != copy[1]
    assert child.num_computed == 5
    blocks.check([parent, child])
    blocks.release(parent)
    blocks.check([child])
    blocks.release(child)
    assert blocks.num_free == 8


def test_fork_at_a_block_border_copies_nothing_and_skips_reserved_blocks() -> None:
    blocks = BlockManager(8, 2)
    parent, child = fill(blocks, prompt([1, 2, 3, 4])), prompt([1, 2, 3, 4])
    blocks.grow(parent, 5)
    assert blocks.fork(parent, child) is None
    assert child.block_table == parent.block_table[:2]
    blocks.check([parent, child])


def test_a_child_registers_what_it_adds() -> None:
    blocks = BlockManager(8, 2)
    parent, child = fill(blocks, prompt([1, 2, 3])), prompt([1, 2, 3])
    blocks.fork(parent, child)
    child.token_ids.append(4)
    child.num_computed = 4
    blocks.register(child)
    assert blocks.find_prefix(prompt([1, 2, 3, 4, 5]), 4) == child.block_table
    blocks.check([parent, child])


def test_forgotten_blocks_serve_nobody() -> None:
    blocks = BlockManager(8, 2)
    sequence = fill(blocks, prompt([1, 2, 3, 4, 5]))
    blocks.release(sequence, forget=True)
    assert blocks.num_idle == 0
    assert blocks.find_prefix(sequence, 4) == []
    blocks.check([])


def break_owner_count(blocks: BlockManager, sequence: Sequence) -> None:
    blocks._owners[sequence.block_table[0]] += 1


def break_table(blocks: BlockManager, sequence: Sequence) -> None:
    sequence.block_table.pop()


def break_free_list(blocks: BlockManager, sequence: Sequence) -> None:
    blocks._empty.append(sequence.block_table[0])


def break_hash_map(blocks: BlockManager, sequence: Sequence) -> None:
    blocks._block_of.popitem()


def break_tokens(blocks: BlockManager, sequence: Sequence) -> None:
    sequence.token_ids[0] += 1


def break_progress(blocks: BlockManager, sequence: Sequence) -> None:
    sequence.num_computed = 1  # a block with a hash would be written to


def break_duplicate(blocks: BlockManager, sequence: Sequence) -> None:
    sequence.block_table.append(sequence.block_table[0])
    blocks._owners[sequence.block_table[0]] += 1


@pytest.mark.parametrize(
    "damage",
    [
        break_owner_count,
        break_table,
        break_free_list,
        break_hash_map,
        break_tokens,
        break_progress,
        break_duplicate,
    ],
)
def test_check_finds_damage(damage) -> None:
    blocks = BlockManager(8, 2)
    sequence = fill(blocks, prompt([1, 2, 3, 4, 5]))
    blocks.check([sequence])
    damage(blocks, sequence)
    with pytest.raises(RuntimeError, match="block manager"):
        blocks.check([sequence])
