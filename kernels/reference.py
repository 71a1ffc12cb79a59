"""Every kernel once more in plain torch: the definition the C++ and Triton versions are tested against.

Sampling is computed in float64 whatever the logits' dtype. Functions loop over sequences where that reads
better: this file is for being right.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# ------------------------------------------------------------------------------------------------------------
# Sampling
# ------------------------------------------------------------------------------------------------------------

# Multipliers and key increments of Philox4x32 (Salmon, Moraes, Dror & Shaw, "Parallel random numbers: as easy
# as 1, 2, 3", SC 2011).
_PHILOX_M0, _PHILOX_M1 = 0xD2511F53, 0xCD9E8D57
_PHILOX_W0, _PHILOX_W1 = 0x9E3779B9, 0xBB67AE85
_MASK32 = 0xFFFFFFFF

# top_p compares a sum of probabilities with p. Sums that equal p in exact arithmetic (ten equal tokens, p =
# 0.5) would be decided by the order of additions; this slack decides them the same way everywhere.
TOP_P_SLACK = 1e-12
MAX_CANDIDATES = 64
"""What the kernel that selects has room for."""


class Setting(IntEnum):
    """Lines of packed settings, int64 [SETTINGS, S]; the seed and numbers that are no integers by their bits."""

    ROW = 0  # of the logits
    TEMPERATURE = 1
    SEED = 2
    POSITION = 3
    CANDIDATES = 4
    KEEP_TAIL = 5
    TOP_K = 6
    TOP_P = 7
    MIN_P = 8


SETTINGS = len(Setting)


@dataclass
class SelectionTensors:
    """Result of `candidate_select`: one line a sequence; the fields are those of `sampling.Selection`."""

    token_ids: Tensor
    log_probs: Tensor
    noise: Tensor
    count: Tensor
    tail: Tensor
    tail_log_mass: Tensor
    finite: Tensor


@dataclass
class WinnerTensors:
    """Result of `choose_winner`; the fields are those of `sampling.Winners`."""

    column: Tensor
    token_id: Tensor
    log_prob: Tensor
    tilted_log_prob: Tensor
    kl: Tensor


def _multiply_high_low(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """The two 32-bit halves of a * b; int64 holds 63 bits, so b goes in as two 16-bit parts."""
    low_part = a * (b & 0xFFFF)
    high_part = a * (b >> 16) + (low_part >> 16)
    return high_part >> 16, ((high_part & 0xFFFF) << 16) | (low_part & 0xFFFF)


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Philox4x32 with 10 rounds.

    Args:
        counter: four int64 tensors that broadcast together, each holding a 32-bit word.
        key: two 32-bit words.

    Returns:
        Four int64 tensors, each a word of 32 random bits.
    """
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _multiply_high_low(_PHILOX_M0, c0)
        high1, low1 = _multiply_high_low(_PHILOX_M1, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _PHILOX_W0) & _MASK32, (k1 + _PHILOX_W1) & _MASK32
    return c0, c1, c2, c3


def gumbel_of_words(high: Tensor, low: Tensor) -> Tensor:
    """Gumbel variates of pairs of 32-bit words: with v = (high 2^32 + low + 1/2) / 2^64, -log(-log(1 - v)).

    A large variate belongs to v near 0, where float64 is dense. Above 1/2, 1 - v is built from the complements of the
    words rather than by subtraction, so the lower tail keeps its precision too: the range is about -3.8 to 45.05.
    """
    high, low = torch.broadcast_tensors(high, low)
    upper = high >= 2**31
    flip = torch.where(upper, _MASK32, 0)
    part = ((high ^ flip).double() * 2.0**32 + (low ^ flip).double() + 0.5) * 2.0**-64
    exponential = torch.where(upper, -torch.log(part), -torch.log1p(-part))
    return -torch.log(exponential)


def gumbel_noise(seed: int, position: int | Tensor, token: int | Tensor) -> Tensor:
    """The noise of a token: a pure function of (seed, position, token), so no batch or order can change it.

    Philox4x32-10 under the seed's two words, counter (token // 2, position's two words, 0); an even token
    takes the first two output words, an odd one the last two.

    Args:
        seed: 0 <= seed < 2^64.
        position: non-negative, int or int64 tensor.
        token: non-negative, int or int64 tensor; broadcasts with position.

    Returns:
        float64 tensor, Gumbel(0, 1) distributed.
    """
    places = torch.as_tensor(position, dtype=torch.int64)
    tokens = torch.as_tensor(token, dtype=torch.int64)
    device = tokens.device if tokens.dim() else places.device
    places, tokens = torch.broadcast_tensors(places.to(device), tokens.to(device))
    counter = (tokens >> 1, places & _MASK32, places >> 32, torch.zeros_like(tokens))
    words = philox4x32(counter, (seed & _MASK32, seed >> 32))
    odd = (tokens & 1).bool()
    return gumbel_of_words(torch.where(odd, words[2], words[0]), torch.where(odd, words[3], words[1]))


def process_scores(logits: Tensor, arrays: Any, index: int) -> Tensor:
    """Bias, then repetition, frequency and presence penalty, then temperature of one sequence, in float64.

    The repetition penalty multiplies negative and divides other scores of every token seen (prompt or
    generated); the frequency penalty is taken once per time a token was generated, the presence penalty once
    if it was at all. Temperature 0 leaves the scores as at temperature 1.

    Args:
        logits: [V], any float dtype.
        arrays: a `sampling.SamplingArrays`.
        index: the sequence.

    Returns:
        float64 [V].
    """
    scores = logits.double().clone()
    device = scores.device

    def span(name: str) -> slice:
        offsets = getattr(arrays, name)
        return slice(int(offsets[index]), int(offsets[index + 1]))

    bias = span("bias_offsets")
    ids = torch.as_tensor(arrays.bias_ids[bias].astype(np.int64), device=device)
    scores[ids] += torch.as_tensor(arrays.bias_values[bias].astype(np.float64), device=device)
    history = span("history_offsets")
    ids = torch.as_tensor(arrays.history_ids[history].astype(np.int64), device=device)
    counts = torch.as_tensor(arrays.history_counts[history].astype(np.float64), device=device)
    seen, penalty = scores[ids], float(arrays.repetition_penalty[index])
    seen = torch.where(seen < 0, seen * penalty, seen / penalty)
    seen = seen - float(arrays.frequency_penalty[index]) * counts
    scores[ids] = seen - float(arrays.presence_penalty[index]) * (counts > 0)
    return scores / (float(arrays.temperature[index]) or 1.0)


def support_order(scores: Tensor, top_k: int, top_p: float, min_p: float) -> Tensor:
    """Token ids that top_k, top_p and min_p leave, most probable first, equal scores by smaller id.

    top_k keeps every token that ties with the k-th. top_p keeps a token while the probability of the tokens
    before it, renormalised over what top_k left, is below top_p; the first always stays. min_p drops tokens
    whose probability is below min_p times the largest. That is what the Hugging Face warpers compute, in
    their order; where equal scores straddle the border of top_p theirs depends on the sort, ours takes the
    smaller ids.

    Args:
        scores: float64 [V]; -inf is a banned token.
        top_k: 0 is off.
        top_p: 1 is off.
        min_p: 0 is off.

    Returns:
        int64 [n], n >= 1 if any score is finite.
    """
    values, ids = torch.sort(scores, descending=True, stable=True)
    keep = values > -math.inf
    if 0 < top_k < len(values):
        keep &= values >= values[top_k - 1]
    values, ids = values[keep], ids[keep]
    if top_p < 1 and len(values):
        probabilities = torch.softmax(values, 0)
        keep = probabilities.cumsum(0) - probabilities < top_p - TOP_P_SLACK
        keep[0] = True
        values, ids = values[keep], ids[keep]
    if min_p > 0 and len(values):
        ids = ids[values >= values[0] + math.log(min_p)]
    return ids


def _select_one(scores: Tensor, arrays: Any, index: int) -> tuple[Tensor, Tensor, Tensor, int, float]:
    """ids, log-probabilities, noise, column of the champion and log mass of the tail of one sequence."""
    limits = int(arrays.top_k[index]), float(arrays.top_p[index]), float(arrays.min_p[index])
    ids = support_order(scores, *limits)
    log_probs = torch.log_softmax(scores[ids], 0)
    noise = torch.zeros_like(log_probs)
    if arrays.temperature[index] > 0:
        noise = gumbel_noise(int(arrays.seed[index]), int(arrays.position[index]), ids)
    cut = min(int(arrays.num_candidates[index]), len(ids))
    columns, champion = list(range(cut)), -1
    if cut < len(ids) and (arrays.keep_tail[index] or arrays.num_candidates[index] == 0):
        perturbed = log_probs[cut:] + noise[cut:]
        best = torch.nonzero(perturbed == perturbed.max())[:, 0] + cut
        champion = cut
        columns.append(int(best[torch.argmin(ids[best])]))
    tail_log_mass = float(torch.logsumexp(log_probs[cut:], 0)) if cut < len(ids) else -math.inf
    tail_log_mass = 0.0 if cut == 0 else tail_log_mass
    return ids[columns], log_probs[columns], noise[columns], champion, tail_log_mass


def candidate_select(logits: Tensor, rows: np.ndarray, arrays: Any) -> SelectionTensors:
    """Candidates and the champion of the tail of every sequence.

    Args:
        logits: [B, V] float32, bfloat16 or float16.
        rows: int64 [S], the row of logits each sequence reads.
        arrays: a `sampling.SamplingArrays` of S sequences.

    Returns:
        A `SelectionTensors` whose fields are on the CPU; see `sampling.Selection`.
    """
    count = len(rows)
    width = min(int(arrays.num_candidates.max(initial=0)), logits.shape[1]) + 1
    out = SelectionTensors(
        torch.full((count, width), -1, dtype=torch.int64),
        torch.full((count, width), -math.inf, dtype=torch.float64),
        torch.zeros((count, width), dtype=torch.float64),
        torch.zeros(count, dtype=torch.int64),
        torch.full((count,), -1, dtype=torch.int64),
        torch.full((count,), -math.inf, dtype=torch.float64),
        torch.zeros(count, dtype=torch.bool),
    )
    for index, row in enumerate(rows.tolist()):
        scores = process_scores(logits[row], arrays, index)
        if not bool((scores < math.inf).all()) or not bool((scores > -math.inf).any()):
            continue
        ids, log_probs, noise, tail, tail_log_mass = _select_one(scores, arrays, index)
        filled = len(ids)
        out.token_ids[index, :filled], out.log_probs[index, :filled] = ids.cpu(), log_probs.cpu()
        out.noise[index, :filled], out.count[index] = noise.cpu(), filled
        out.tail[index], out.tail_log_mass[index], out.finite[index] = tail, tail_log_mass, True
    return out


def prune_candidates(
    log_probs: Tensor,
    noise: Tensor,
    count: Tensor,
    tail: Tensor,
    low: Tensor,
    high: Tensor,
    all_needed: Tensor,
) -> Tensor:
    """Which columns can still win when every candidate's tilt lies in [low, high] and the champion's is 0.

    Args:
        log_probs: float64 [S, W].
        noise: float64 [S, W].
        count: int64 [S], columns in use.
        tail: int64 [S], the champion's column or -1.
        low: float64 [S].
        high: float64 [S].
        all_needed: bool [S], True keeps every column in use.

    Returns:
        bool [S, W].
    """
    columns = torch.arange(log_probs.shape[1])
    filled, champion = columns < count[:, None], columns == tail[:, None]
    base = (log_probs + noise).masked_fill(~filled, -math.inf)
    worst = base + torch.where(champion, 0.0, low[:, None])
    best = base + torch.where(champion, 0.0, high[:, None])
    floor = worst.masked_fill(~filled, -math.inf).amax(1, keepdim=True)
    return filled & ((best >= floor) | all_needed[:, None])


def value_tilt(utilities: Tensor, baselines: Tensor, limits: Tensor, row_sequence: Tensor) -> Tensor:
    """Tilt of every row: the clipped advantages of its values, summed in float64.

    Args:
        utilities: float32 [R, M], weighted utility of each value after the row's token.
        baselines: float32 [S, M], the same before it.
        limits: float64 [S, M], the largest size of each term; inf is no limit.
        row_sequence: int64 [R], the sequence a row belongs to.

    Returns:
        float64 [R].
    """
    bound = limits[row_sequence]
    advantage = utilities.double() - baselines[row_sequence].double()
    return torch.maximum(torch.minimum(advantage, bound), -bound).sum(1)


def choose_winner(selection: SelectionTensors, tilt: Tensor) -> WinnerTensors:
    """The sampled token and the exact statistics of the tilted distribution.

    With pi0 the base distribution and T the tilt (0 on the tail), pi = pi0 exp(T) / Z, where
    Z = sum over C of pi0 exp(T), plus pi0(tail) if the tail is kept; so log pi = log pi0 + T - log Z and
    KL(pi || pi0) = sum of pi (T - log Z).

    Args:
        selection: of S sequences, W columns.
        tilt: float64 [S, W]; 0 for the champion, -inf for columns that were pruned.

    Returns:
        A `WinnerTensors`; column and token -1 where a sequence is not finite, has no column left, or a tilt
        is NaN or inf. tilted_log_prob and kl are NaN where a column was pruned.
    """
    columns = torch.arange(tilt.shape[1])
    filled = columns < selection.count[:, None]
    log_probs = selection.log_probs.masked_fill(~filled, -math.inf)
    scores = (log_probs + selection.noise + tilt).masked_fill(~filled, -math.inf)
    legal = selection.finite & ~(filled & ~(tilt < math.inf)).any(1) & (scores > -math.inf).any(1)
    column = scores.nan_to_num(-math.inf).argmax(1)
    exact = ~(filled & (tilt == -math.inf)).any(1)

    in_tail, kept = columns == selection.tail[:, None], selection.tail >= 0
    terms = torch.where(filled & ~in_tail, log_probs + tilt, -math.inf)
    tail = torch.where(kept, selection.tail_log_mass, -math.inf)[:, None]
    log_z = torch.logsumexp(torch.cat([terms, tail], 1), 1, keepdim=True)
    policy = torch.exp(terms - log_z)
    kl = torch.where(policy > 0, policy * (tilt - log_z), 0.0).sum(1)
    kl = kl - (torch.exp(tail - log_z) * log_z)[:, 0]

    def pick(values: Tensor) -> Tensor:
        return values.gather(1, column[:, None])[:, 0]

    log_prob = pick(log_probs)
    tilted = log_prob + pick(tilt) - log_z[:, 0]
    return WinnerTensors(
        torch.where(legal, column, -1),
        torch.where(legal, pick(selection.token_ids), -1),
        torch.where(legal, log_prob, math.nan),
        torch.where(legal & exact, tilted, math.nan),
        torch.where(legal & exact, kl.clamp_min(0.0), math.nan),
    )


# ------------------------------------------------------------------------------------------------------------
# Attention
# ------------------------------------------------------------------------------------------------------------

# Twins of candidate_attention, write_pages and kv_commit.
# Pages are [num_blocks, block_size, kv_heads, head_dim]; a slot is block * block_size + offset.


def write_pages(k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, slots: Tensor) -> None:
    """Writes keys and values [R, KVH, D] to their slots (int64 [R]); rows of slot -1 are left out."""
    kept = (slots >= 0).nonzero().flatten()
    target = slots[kept]
    k_pages.view(-1, *k_pages.shape[2:])[target] = k[kept].to(k_pages.dtype)
    v_pages.view(-1, *v_pages.shape[2:])[target] = v[kept].to(v_pages.dtype)


def kv_commit(
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    key_pages: Sequence[Tensor],
    value_pages: Sequence[Tensor],
    rows: Tensor,
    slots: Tensor,
) -> None:
    """Copies the rows (int64 [n]) of every layer's scratch [R, KVH, D] to their slots (int64 [n])."""
    for k, v, k_pages, v_pages in zip(keys, values, key_pages, value_pages, strict=True):
        write_pages(k[rows], v[rows], k_pages, v_pages, slots)


def own_positions(prefix_lens: Tensor, see_self: Tensor | None, has_keys: bool) -> Tensor:
    """Position of each row, int64 [R]: the end of its prefix, or one before where its key is in the pages."""
    places = prefix_lens.to(torch.int64)
    if not has_keys or see_self is None:
        return places
    return places - (~see_self).to(torch.int64)


def candidate_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_tables: Tensor,
    group_offsets: Tensor,
    prefix_lens: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    see_self: Tensor | None = None,
    *,
    scale: float,
    softcap: float = 0.0,
    window: int = 0,
    positions: Tensor | None = None,
    slots: Tensor | None = None,
) -> Tensor:
    """Attention of rows in groups; a group's rows share one paged prefix and never see one another.

    Args:
        q: [R, H, D], any float dtype; H is a multiple of the kv heads.
        k_pages, v_pages: [num_blocks, block_size, KVH, D].
        block_tables: int32 [G, max_blocks]. group_offsets: int32 [G + 1]. prefix_lens: int32 [R].
        k, v: [R, KVH, D], the rows' own keys and values, or None (nothing but pages).
        see_self: bool [R], which rows see their own key besides the prefix; None: all (with keys given).
        scale: factor on the scores. softcap: scores become ``softcap * tanh(score / softcap)``; 0 is off.
        window: a row at position p sees keys at positions above ``p - window``; 0 is off.
        positions: int64 [R]; left out they follow from the prefix, see :func:`own_positions`.
        slots: int64 [R], of rows that are alone in their groups: their keys and values are written there first.
            Prefixes take them in, see_self is not asked.

    Returns:
        [R, H, D] in q's dtype; a row with nothing to see gives 0.
    """
    if k is not None and v is not None and slots is not None:
        write_pages(k, v, k_pages, v_pages, slots)
        k = v = see_self = None
        positions = prefix_lens.to(torch.int64) - 1 if positions is None else positions
    heads = q.shape[1]
    block_size, kv_heads = k_pages.shape[1:3]
    share = heads // kv_heads
    if positions is None:
        positions = own_positions(prefix_lens, see_self, k is not None)
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    offsets = group_offsets.tolist()
    for group, (first, last) in enumerate(pairwise(offsets)):
        if first == last:
            continue
        lens = prefix_lens[first:last].to(torch.int64)
        longest = int(lens.max())
        place = torch.arange(longest, device=q.device)
        blocks = block_tables[group, : -(-longest // block_size)].to(torch.int64)
        keys = k_pages[blocks].flatten(0, 1)[:longest].float()
        vals = v_pages[blocks].flatten(0, 1)[:longest].float()
        seen = place[None, :] < lens[:, None]
        if window > 0:
            seen &= place[None, :] > positions[first:last, None] - window
        query = q[first:last].float().unflatten(1, (kv_heads, share))
        scores = torch.einsum("rksd,pkd->rksp", query, keys)
        mask = seen[:, None, None, :]
        if k is not None and v is not None:
            own = torch.einsum("rksd,rkd->rks", query, k[first:last].float())
            scores = torch.cat([scores, own[..., None]], dim=-1)
            itself = torch.ones_like(lens, dtype=torch.bool) if see_self is None else see_self[first:last]
            mask = torch.cat([mask, itself[:, None, None, None]], dim=-1)
        scores = scores * scale
        if softcap > 0:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(~mask, float("-inf"))
        weights = torch.softmax(scores, dim=-1).masked_fill(~mask, 0.0)
        # A masked weight is 0, and 0 * NaN is NaN: what no row may see must not enter the product.
        vals = vals.masked_fill(~seen.any(0)[:, None, None], 0.0)
        result = torch.einsum("rksp,pkd->rksd", weights[..., :longest], vals)
        if k is not None and v is not None:
            mine = torch.where(itself[:, None, None], v[first:last].float(), 0.0)
            result = result + weights[..., longest:] * mine[:, :, None, :]
        out[first:last] = result.flatten(1, 2).to(q.dtype)
    return out


# ------------------------------------------------------------------------------------------------------------
# Value networks
# ------------------------------------------------------------------------------------------------------------

SCALAR, BOUNDED, DISTRIBUTIONAL = 0, 1, 2
"""Kinds of heads."""
NORM_EPS = 1e-6
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu}


@dataclass
class HeadWeights:
    """The heads of one network, M of them with O outputs together, as kernels read them.

    Attributes:
        norm: whether features are divided by their root mean square.
        hidden, hidden_bias: the hidden layer [H, width] and [H], any float dtype; None without one.
        activation: "gelu", "relu" or "silu", after the hidden layer.
        output, output_bias: float32 [O, H or width] and [O].
        kinds: int32 [M], SCALAR, BOUNDED or DISTRIBUTIONAL.
        scales: float32 [M, 2]: mean and standard deviation of a scalar head, lower and upper end of the others.
        starts: int32 [M + 1], the outputs of head m are [starts[m], starts[m + 1]).
        atoms: float32 [O], the return an output of a distributional head stands for, 0 elsewhere.
    """

    norm: bool
    hidden: Tensor | None
    hidden_bias: Tensor | None
    activation: str
    output: Tensor
    output_bias: Tensor
    kinds: Tensor
    scales: Tensor
    starts: Tensor
    atoms: Tensor

    @classmethod
    def of(cls, heads: Any) -> HeadWeights:
        """Those of a `values.Heads`, on its device; weights are shared, not copied, where the dtype allows."""
        device = heads.output.weight.device
        kinds, scales, starts, atoms = [], [], [0], []
        for index, config in enumerate(heads.configs):
            low, high = config.interval
            kind = DISTRIBUTIONAL if config.support else BOUNDED if config.bounds else SCALAR
            kinds.append(kind)
            scales.append((config.mean, config.std) if kind == SCALAR else (low, high))
            starts.append(starts[-1] + config.outputs)
            atoms.append(heads.atoms(index).to(device) if config.support else torch.zeros(1, device=device))
        hidden = heads.hidden
        return cls(
            heads.norm,
            None if hidden is None else hidden.weight.detach().contiguous(),
            None if hidden is None else hidden.bias.detach(),
            next(name for name, function in _ACTIVATIONS.items() if function is heads.activation),
            heads.output.weight.detach().float().contiguous(),
            heads.output.bias.detach().float(),
            torch.tensor(kinds, dtype=torch.int32, device=device),
            torch.tensor(scales, dtype=torch.float32, device=device),
            torch.tensor(starts, dtype=torch.int32, device=device),
            torch.cat(atoms),
        )


@dataclass
class ValueSettings:
    """What S requests ask of the M values of one network.

    Attributes:
        weights: float32 [S, M].
        limits: float64 [S, M], the largest size of each term of the tilt; inf is no limit.
        baselines: float32 [S, M], utility of the state the candidates continue.
        optimal: bool [S], utilities are log E[exp(w R)] where the head knows the distribution.
        candidate_mean: bool [S], the baseline is the mean utility of the request's candidates instead.
    """

    weights: Tensor
    limits: Tensor
    baselines: Tensor
    optimal: Tensor
    candidate_mean: Tensor


@dataclass
class ValueTilt:
    """Result of `value_head_tilt`.

    Attributes:
        values: float32 [R, M], V of each row in the reward's units. utilities: float32 [R, M], in nats.
        winners: of the S sequences, None unless asked for.
        row: int64 [S], the winner's row; -1 where it has none. None likewise.
    """

    values: Tensor
    utilities: Tensor
    winners: WinnerTensors | None = None
    row: Tensor | None = None


def head_hidden(features: Tensor, weights: HeadWeights) -> Tensor:
    """What the outputs of all heads are linear in: norm and hidden layer, [R, width] -> [R, H or width]."""
    x = features.float()
    if weights.norm:
        x = F.rms_norm(x, (x.shape[-1],), None, NORM_EPS)
    if weights.hidden is not None:
        x = F.linear(x.to(weights.hidden.dtype), weights.hidden, weights.hidden_bias)
        x = _ACTIVATIONS[weights.activation](x)
    return x


def head_output(features: Tensor, weights: HeadWeights) -> Tensor:
    """Raw outputs of all heads: [R, width] -> float32 [R, O]."""
    return F.linear(head_hidden(features, weights).float(), weights.output, weights.output_bias)


def head_values(output: Tensor, weights: HeadWeights, asked: Tensor, optimal: Tensor) -> tuple[Tensor, Tensor]:
    """Values and utilities, float32 [R, M] each.

    Args:
        output: float32 [R, O] from `head_output`.
        asked: float32 [R, M], the weights of each row's request.
        optimal: bool [R].
    """
    values, utilities = [], []
    starts = weights.starts.tolist()
    for index, (kind, (low, high)) in enumerate(zip(weights.kinds.tolist(), weights.scales, strict=True)):
        part = slice(starts[index], starts[index + 1])
        raw, atoms, weight = output[:, part], weights.atoms[part], asked[:, index]
        if kind == DISTRIBUTIONAL:
            value = torch.maximum(torch.minimum(torch.softmax(raw, 1) @ atoms, high), low)
        elif kind == BOUNDED:
            value = torch.lerp(low, high, torch.sigmoid(raw[:, 0]))
        else:
            value = raw[:, 0] * high + low
        utility = value * weight
        if kind == DISTRIBUTIONAL:
            exact = torch.logsumexp(torch.log_softmax(raw, 1) + weight[:, None] * atoms, 1)
            utility = torch.where(optimal, exact, utility)
        values.append(value)
        utilities.append(utility)
    return torch.stack(values, 1), torch.stack(utilities, 1)


def value_head_tilt(
    features: Tensor,
    weights: HeadWeights,
    settings: ValueSettings,
    row_offsets: Tensor,
    columns: Tensor,
    selection: SelectionTensors,
    tilt: Tensor,
    choose: bool = True,
) -> ValueTilt:
    """The heads of one network over all candidate rows, what they add to the tilt, and the winners.

    With several networks each adds its part to `tilt`, one after another, and the last one chooses. A row whose
    values or tilt are not finite leaves NaN in `tilt`, so that its sequence has no winner.

    Args:
        features: [R, width] float, the network's last row of features for each candidate.
        weights: the heads.
        settings: of S sequences.
        row_offsets: int32 [S + 1]; sequence s owns rows [row_offsets[s], row_offsets[s + 1]), none if it does not
            use the network. Rows beyond the last offset are padding.
        columns: int32 [R], the column of the selection each row values; a sequence with rows has one for every
            column that is not pruned.
        selection: of S sequences, W columns, on the features' device.
        tilt: float64 [S, W], added to in place: before the first network 0, -inf where a column was pruned.
        choose: whether to choose winners.

    Returns:
        A `ValueTilt`; lines of padding rows mean nothing.
    """
    values = features.new_zeros(len(features), len(weights.kinds), dtype=torch.float32)
    utilities = torch.zeros_like(values)
    offsets = row_offsets.tolist()
    for s, (first, last) in enumerate(pairwise(offsets)):
        if first == last:
            continue
        count, own, column = last - first, slice(first, last), columns[first:last].long()
        output = head_output(features[own], weights)
        asked, optimal = settings.weights[s].expand(count, -1), settings.optimal[s].expand(count)
        values[own], utilities[own] = head_values(output, weights, asked, optimal)
        champion = column == selection.tail[s]
        baselines = settings.baselines[s]
        if settings.candidate_mean[s]:
            baselines = utilities[own][~champion].mean(0)
        sequence = torch.zeros(count, dtype=torch.int64, device=features.device)
        terms = value_tilt(utilities[own], baselines[None], settings.limits[s : s + 1], sequence)
        fine = terms.isfinite() | champion
        fine &= values[own].isfinite().all(1)
        terms = torch.where(champion, 0.0, terms)
        tilt[s, column] += torch.where(fine, terms, math.nan)
    if not choose:
        return ValueTilt(values, utilities)
    winners = choose_winner(selection, tilt)
    row = torch.full_like(winners.column, -1)
    for s, (first, last) in enumerate(pairwise(offsets)):
        found = (columns[first:last] == winners.column[s]).nonzero()
        if len(found):
            row[s] = first + found[0, 0]
    return ValueTilt(values, utilities, winners, row)


@dataclass
class CandidateRows:
    """Result of `candidate_rows`: R rows of S sequences, those of one next to one another.

    Attributes:
        offsets: int32 [S + 1]; sequence s owns rows [offsets[s], offsets[s + 1]), and nobody those behind the last.
        groups: int32 [S + 1], the same, but the last sequence owns these too.
        owner: int64 [R]. column: int32 [R], which of its candidates a row is.
        token_ids, positions: int64 [R]. prefix_lens: int32 [R]. Rows that nobody owns stand at position 0.
    """

    offsets: Tensor
    groups: Tensor
    owner: Tensor
    column: Tensor
    token_ids: Tensor
    positions: Tensor
    prefix_lens: Tensor


def candidate_rows(
    count: Tensor, uses: Tensor | None, token_ids: Tensor, positions: Tensor, rows: int
) -> CandidateRows:
    """Lays the candidates of S sequences out as rows, without anything that depends on their number.

    Args:
        count: int64 [S], candidates of each; `rows` is at least their sum.
        uses: bool [S], the sequences that bring theirs; None: all do.
        token_ids: int64 [S, W], their candidates. positions: int64 [S], where these stand.
        rows: R.
    """
    if uses is not None:
        count = torch.where(uses, count, 0)
    sequences, width = token_ids.shape
    offsets = torch.nn.functional.pad(count.cumsum(0), (1, 0))
    row = torch.arange(rows, device=offsets.device)
    owner = torch.searchsorted(offsets[1:], row, right=True)
    owned, owner = owner < sequences, owner.clamp(max=sequences - 1)
    column = (row - offsets[owner]).clamp(max=width - 1)
    place = torch.where(owned, positions[owner], 0)
    groups = torch.cat([offsets[:-1], offsets.new_full((1,), rows)])
    tokens = token_ids[owner, column].clamp(min=0)
    return CandidateRows(offsets.int(), groups.int(), owner, column.int(), tokens, place, place.int())


@dataclass
class WinnerRows:
    """Result of `winner_rows`; a sequence that has no winner among the rows gets zeros, and slot -1.

    Attributes:
        rows, slots: int64 [S], the winner's row, and where its K/V go.
        values, utilities: float32 [S, heads], of that row.
    """

    rows: Tensor
    slots: Tensor
    values: Tensor
    utilities: Tensor


def winner_rows(
    column: Tensor, uses: Tensor, offsets: Tensor, slots: Tensor, values: Tensor, utilities: Tensor
) -> WinnerRows:
    """What the rows of the winners say.

    Args:
        column: int64 [S], of the winners, -1 where there is none.
        uses: bool [S], the sequences that have rows. offsets: int32 [S + 1], as `CandidateRows` has them.
        slots: int64 [S]. values, utilities: float32 [R, heads].
    """
    moves = uses & (column >= 0)
    rows = torch.where(moves, offsets[:-1] + column, 0)
    kept = (torch.where(moves[:, None], of[rows], 0.0) for of in (values, utilities))
    return WinnerRows(rows, torch.where(moves, slots, -1), *kept)


def candidate_input(
    states: Tensor,
    state_index: Tensor,
    table: Tensor | None = None,
    token_ids: Tensor | None = None,
    places: Tensor | None = None,
    place_index: Tensor | None = None,
) -> Tensor:
    """What a value network starts from: a projected state, the token's projected embedding, its place, summed.

    Args:
        states: [N, width] float, projected hidden states. state_index: int64 [R], the line a row takes.
        table: [V, width] float, projected embeddings. token_ids: int64 [R].
        places: [P, width] float, projected features of places. place_index: int64 [R]; None: row i takes line i.

    Returns:
        float32 [R, width].
    """
    x = states.index_select(0, state_index).float()
    if table is not None and token_ids is not None:
        x += table.index_select(0, token_ids)
    if places is not None:
        x += places if place_index is None else places.index_select(0, place_index)
    return x
