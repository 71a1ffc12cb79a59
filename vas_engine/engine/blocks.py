"""Who owns which block of the paged cache, and which blocks hold a prefix that somebody may ask for again."""

from __future__ import annotations

import hashlib
import struct
from collections import Counter, OrderedDict
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf

from vas_engine.engine.sequence import Sequence
from vas_engine.errors import InvalidArgumentError


class BlockManager:
    """Hands out the blocks of the cache and counts their owners.

    A block is *used* (in the table of one or more sequences), *idle* (nobody's, but its K/V are known by hash
    and can be taken over) or *empty*. Idle and empty blocks are free; empty ones are handed out first, then
    the idle one that was left the longest ago.

    Only full blocks are ever shared, and full blocks are never written again: so there is no copy on write.
    A partly filled block is copied when a sequence forks.

    Args:
        num_blocks: blocks in the cache.
        block_size: token positions a block.
        enable_prefix_caching: False: nothing is hashed or found again.
    """

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True) -> None:
        if num_blocks < 1:
            raise InvalidArgumentError("num_blocks", num_blocks, "the cache needs at least one block")
        if block_size < 1:
            raise InvalidArgumentError("block_size", block_size, "a block holds at least one token")
        self.num_blocks, self.block_size = num_blocks, block_size
        self.enable_prefix_caching = enable_prefix_caching
        self.prefix_queried_tokens = 0
        self.prefix_hit_tokens = 0
        self._owners = [0] * num_blocks
        self._empty = list(range(num_blocks - 1, -1, -1))  # a stack: block 0 goes out first
        self._idle: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._block_of: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}
        self._pack = struct.Struct(f"<{block_size}q").pack

    @property
    def num_free(self) -> int:
        """Blocks that no sequence holds, idle ones included."""
        return len(self._empty) + len(self._idle)

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_free

    @property
    def num_idle(self) -> int:
        """Free blocks that still hold a known prefix."""
        return len(self._idle)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    # -- a sequence's table ---------------------------------------------------------------------------------

    def grow(self, sequence: Sequence, num_tokens: int) -> bool:
        """Extends the table in place to cover `num_tokens` positions; False, and no change, if it cannot."""
        table = sequence.block_table
        missing = self.blocks_for(num_tokens) - len(table)
        if missing > self.num_free:
            return False
        for _ in range(missing):
            table.append(self._take())
        return True

    def release(self, sequence: Sequence, forget: bool = False) -> None:
        """Gives all blocks of the sequence back and marks nothing of it as computed.

        Its last blocks become idle first, so that a prefix outlives what followed it. With `forget` the
        blocks leave the prefix cache too (their contents are not to be trusted).
        """
        for block in reversed(sequence.block_table):
            if forget:
                self._forget(block)
            self._drop(block)
        sequence.block_table.clear()
        sequence.num_computed = sequence.num_registered = 0

    def fork(self, parent: Sequence, child: Sequence) -> tuple[int, int] | None:
        """Gives the child the K/V of all tokens the parent has computed.

        Full blocks are shared. Of a partly filled last block the child gets one of its own; the returned
        (source, destination) is the copy to make in every cache, None if there is nothing to copy. The caller
        sees to it that one block is free.
        """
        full, partial = divmod(parent.num_computed, self.block_size)
        child.block_table[:] = parent.block_table[:full]
        for block in child.block_table:
            self._owners[block] += 1
        child.num_computed = parent.num_computed
        child.digests = parent.digests[:full]
        child.num_registered = min(parent.num_registered, full)
        if not partial:
            return None
        child.block_table.append(self._take())
        return parent.block_table[full], child.block_table[full]

    # -- the prefix cache -----------------------------------------------------------------------------------

    def find_prefix(self, sequence: Sequence, limit: int) -> list[int]:
        """Blocks that hold the longest known prefix of at most `limit` tokens; takes nothing."""
        if not (self.enable_prefix_caching and sequence.use_prefix_cache):
            return []
        found: list[int] = []
        for index in range(limit // self.block_size):
            block = self._block_of.get(self._digest(sequence, index))
            if block is None:
                break
            found.append(block)
        return found

    def match_prefix(self, sequence: Sequence, limit: int) -> int:
        """Puts the longest known prefix of at most `limit` tokens in an empty table; returns its length."""
        found = self.find_prefix(sequence, limit)
        for block in found:
            self._share(block)
        sequence.block_table[:] = found
        sequence.num_registered = len(found)
        sequence.num_computed = sequence.num_cached = len(found) * self.block_size
        if self.enable_prefix_caching and sequence.use_prefix_cache:
            self.prefix_queried_tokens += limit
            self.prefix_hit_tokens += sequence.num_computed
        return sequence.num_computed

    def register(self, sequence: Sequence) -> None:
        """Makes the blocks that the computed tokens fill known to the prefix cache.

        Of two blocks with the same contents the first stays the known one.
        """
        full = sequence.num_computed // self.block_size
        if not self.enable_prefix_caching:
            return
        for index in range(sequence.num_registered, full):
            digest, block = self._digest(sequence, index), sequence.block_table[index]
            if digest not in self._block_of and block not in self._digest_of:
                self._block_of[digest] = block
                self._digest_of[block] = digest
        sequence.num_registered = max(full, sequence.num_registered)

    def num_idle_of(self, blocks: Iterable[int]) -> int:
        """How many of the blocks are free now."""
        return sum(self._owners[block] == 0 for block in blocks)

    def num_owners(self, block: int) -> int:
        """How many tables hold the block."""
        return self._owners[block]

    # -- invariants -----------------------------------------------------------------------------------------

    def check(self, sequences: SequenceOf[Sequence]) -> None:
        """Compares all bookkeeping with the live sequences; RuntimeError says what is broken."""
        held = Counter(block for sequence in sequences for block in sequence.block_table)
        for block, owners in enumerate(self._owners):
            _require(owners == held[block], f"block {block}: counted owners {owners}, tables {held[block]}")
        free = [*self._empty, *self._idle]
        used = [block for block, owners in enumerate(self._owners) if owners]
        everything = list(range(self.num_blocks))
        _require(sorted(free + used) == everything, "a block is not exactly once either free or used")
        _require(
            {digest: block for block, digest in self._digest_of.items()} == self._block_of,
            "the two directions of the prefix cache differ",
        )
        _require(all(block in self._digest_of for block in self._idle), "an idle block holds no known prefix")
        _require(not any(block in self._digest_of for block in self._empty), "an empty block has a hash")
        for sequence in sequences:
            self._check_table(sequence)

    def _check_table(self, sequence: Sequence) -> None:
        name, table = f"{sequence.request_id}/{sequence.index}", sequence.block_table
        _require(len(set(table)) == len(table), f"{name}: a block is twice in the table")
        _require(sequence.num_computed <= len(table) * self.block_size, f"{name}: computed beyond the table")
        _require(sequence.num_computed <= len(sequence.token_ids), f"{name}: computed beyond the tokens")
        full, parent = sequence.num_computed // self.block_size, self._root(sequence)
        for index, block in enumerate(table):
            if index >= full:
                _require(self._owners[block] == 1, f"{name}: block {block} is shared and still written to")
                _require(block not in self._digest_of, f"{name}: block {block} has a hash and is not full")
                continue
            parent = self._hash(parent, sequence.token_ids, index)
            known = self._digest_of.get(block, parent)
            _require(known == parent, f"{name}: block {block} is known by the hash of other tokens")

    # -- single blocks --------------------------------------------------------------------------------------

    def _take(self) -> int:
        if self._empty:
            block = self._empty.pop()
        else:
            block, _ = self._idle.popitem(last=False)
            del self._block_of[self._digest_of.pop(block)]
        self._owners[block] = 1
        return block

    def _share(self, block: int) -> None:
        if self._owners[block] == 0:
            del self._idle[block]
        self._owners[block] += 1

    def _drop(self, block: int) -> None:
        self._owners[block] -= 1
        if self._owners[block] == 0:
            if block in self._digest_of:
                self._idle[block] = None
            else:
                self._empty.append(block)

    def _forget(self, block: int) -> None:
        digest = self._digest_of.pop(block, None)
        if digest is not None:
            del self._block_of[digest]

    def _digest(self, sequence: Sequence, index: int) -> bytes:
        digests = sequence.digests
        while len(digests) <= index:
            parent = digests[-1] if digests else self._root(sequence)
            digests.append(self._hash(parent, sequence.token_ids, len(digests)))
        return digests[index]

    def _hash(self, parent: bytes, token_ids: list[int], index: int) -> bytes:
        start = index * self.block_size
        return hashlib.sha256(parent + self._pack(*token_ids[start : start + self.block_size])).digest()

    @staticmethod
    def _root(sequence: Sequence) -> bytes:
        return hashlib.sha256(sequence.salt).digest()


def _require(holds: bool, broken: str) -> None:
    if not holds:
        raise RuntimeError(f"block manager: {broken}")
