"""Log-probabilities of given continuations under the guided policy, exact; of the base model where nothing guides."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from vas_engine.engine.sequence import Sequence
from vas_engine.errors import InvalidArgumentError, NonFiniteError
from vas_engine.model.branches import Branches
from vas_engine.params import SamplingParams
from vas_engine.sampling import SamplingArrays, Selection, choose, select, value_tilt
from vas_engine.training.base import FrozenBase
from vas_engine.training.batches import Batch

if TYPE_CHECKING:
    from vas_engine.llm import LLM

__all__ = ["Likelihood", "likelihoods"]

BATCH_TOKENS = 4096
BATCH_LOGITS = 1 << 24
BRANCH_SCORES = 1 << 21
"""Rows of candidates times the tokens each looks back at, of one pass and one head at most."""


@dataclass(frozen=True, slots=True)
class Likelihood:
    """Of one continuation.

    Attributes:
        log_prob: log π(continuation | context), nats.
        greedy: whether each of its tokens is the most probable one at its place.
    """

    log_prob: float
    greedy: bool


def likelihoods(
    llm: LLM,
    contexts: Seq[Seq[int]],
    continuations: Seq[Seq[int]],
    params: SamplingParams | None = None,
    use_tqdm: bool = False,
) -> list[Likelihood]:
    """Log-probability of every continuation's tokens under π of DESIGN.md section 2, at temperature 1, nothing cut.

    Each text is run once, uncached, with all candidates of all its places beside it; continuations that differ in
    their last token only share that.

    Args:
        contexts: token ids, at least one each. continuations: token ids, at least one each.
        params: of it `values`, `num_candidates`, `tail`, `baseline`, `tilt` and `advantage_clip`; without values π
            is the base distribution.

    Raises:
        InvalidArgumentError: no tokens, or more than the model has positions; values that are not loaded.
        NonFiniteError: logits or values are not finite.
    """
    params = params or SamplingParams()
    params.check(vocab_size=llm.lm.vocab_size, value_names=llm.value_names)
    texts: dict[tuple[tuple[int, ...], int], list[int]] = {}
    for index, (context, continuation) in enumerate(zip(contexts, continuations, strict=True)):
        whole = (*context, *continuation)
        if not context or not continuation:
            raise InvalidArgumentError("continuations", list(whole), "context and continuation need a token each")
        # The last token is predicted and not read; while a candidate in its place is.
        if len(whole) - (not params.guided) > llm.lm.max_model_len:
            fix = f"this model reads up to {llm.lm.max_model_len} tokens; cut the context"
            raise InvalidArgumentError("contexts", f"[{len(whole)} tokens]", fix)
        texts.setdefault((whole[:-1], len(context)), []).append(index)
    policy = _Policy(llm, params)
    found = [Likelihood(0.0, True)] * len(contexts)
    with tqdm(total=len(contexts), disable=not use_tqdm, unit="request", desc="likelihood") as bar:
        for keys in _batches(list(texts), llm.lm.vocab_size):
            asked = [[(index, continuations[index][-1]) for index in texts[key]] for key in keys]
            for index, likelihood in policy.score(keys, asked):
                found[index] = likelihood
                bar.update()
    return found


def _batches(texts: list[tuple[tuple[int, ...], int]], vocab_size: int) -> Iterator[list[tuple[tuple[int, ...], int]]]:
    """Texts of like length together, longest first."""
    ordered = sorted(texts, key=lambda text: -len(text[0]))
    while ordered:
        longest = len(ordered[0][0])
        places = itertools.accumulate(len(tokens) - length + 1 for tokens, length in ordered)
        fits = [n for n, p in enumerate(places, 1) if n * longest <= BATCH_TOKENS and p * vocab_size <= BATCH_LOGITS]
        count = max(fits, default=1)
        yield ordered[:count]
        ordered = ordered[count:]


class _Policy:
    """π of one set of parameters."""

    def __init__(self, llm: LLM, params: SamplingParams) -> None:
        self.lm, self.params, self.guide = llm.lm, params, llm.engine.guide
        self.request = Sequence("likelihood", 0, [])
        self.guide.admit(self.request, params)
        self.networks = [self.guide.networks[index] for index in self.request.networks]
        self.base: Any = FrozenBase(self.lm, [network.scorer for network in self.networks], logits=True)

    @torch.inference_mode()
    def score(
        self, texts: Seq[tuple[Seq[int], int]], asked: Seq[Seq[tuple[int, int]]]
    ) -> Iterator[tuple[int, Likelihood]]:
        """(number, likelihood) of every continuation.

        Args:
            texts: all tokens but the last, and how many of them are the context.
            asked: for each text the last tokens to be tried, as (number, token).
        """
        batch = _pad(texts, self.lm.device)
        counts = [len(tokens) - length + 1 for tokens, length in texts]
        row = np.repeat(np.arange(len(texts)), counts)
        place = np.concatenate([np.arange(length - 1, len(tokens)) for tokens, length in texts])
        self.base.take(batch)
        final = self.base.final_states(batch)[torch.from_numpy(row), torch.from_numpy(place)]
        logits = self.lm.logits(final)
        selection, tilt = self.tilted(batch, row, place, logits)
        winners = choose(selection, tilt)
        if not (winners.column >= 0).all():
            raise NonFiniteError("logits or values are not finite: check the dtype and the value's weights")
        each = np.arange(len(row))
        scores = logits.double().cpu().numpy()
        # log Z of the softmax and of the tilt.
        norm = scores[each, winners.token_id] - winners.log_prob
        log_z = winners.log_prob + tilt[each, winners.column] - winners.tilted_log_prob

        def log_prob(at: np.ndarray, tokens: np.ndarray) -> np.ndarray:
            mine = (selection.token_ids[at] == tokens[:, None]) & (
                np.arange(tilt.shape[1]) != selection.tail[at][:, None]
            )
            outside = 0.0 if self.params.tail == "keep" or not self.networks else -np.inf
            known = np.where(mine, tilt[at], -np.inf).max(1)
            return scores[at, tokens] - norm[at] + np.where(mine.any(1), known, outside) - log_z[at]

        start = 0
        for (tokens, length), count, wanted in zip(texts, counts, asked, strict=True):
            inner, last = np.arange(start, start + count - 1), start + count - 1
            start += count
            given = np.array(tokens[length:], np.int64)
            sum_inner = log_prob(inner, given).sum()
            greedy = bool((winners.token_id[inner] == given).all())
            ends = np.array([token for _, token in wanted], np.int64)
            totals = sum_inner + log_prob(np.full(len(ends), last), ends)
            for (number, token), total in zip(wanted, totals, strict=True):
                yield number, Likelihood(float(total), greedy and bool(winners.token_id[last] == token))

    def tilted(
        self, batch: Batch, row: np.ndarray, place: np.ndarray, logits: torch.Tensor
    ) -> tuple[Selection, np.ndarray]:
        """Candidates at each of S places with the best other token, free of noise, and T of each of the columns."""
        wanted = self.params.num_candidates if self.networks else 0
        keep = self.params.tail == "keep" or not self.networks
        arrays = SamplingArrays.build(len(row), temperature=0.0, num_candidates=wanted, keep_tail=keep)
        selection = select(logits, np.arange(len(row)), arrays)
        tilt = np.zeros(selection.token_ids.shape)
        if not self.networks:
            return selection, tilt
        candidates = selection.filled & (np.arange(selection.token_ids.shape[1]) != selection.tail[:, None])
        utilities, states = self.utilities(batch, row, place, np.where(candidates, selection.token_ids, 0)[:, :-1])
        owner, column = np.nonzero(candidates)
        taken = utilities[owner, column]
        if self.params.baseline == "candidate-mean":
            states = np.stack([taken[owner == s].mean(0) for s in range(len(row))])
        limits = np.broadcast_to(self.request.limits, states.shape)
        tilt[owner, column] = value_tilt(taken, states, limits, owner)
        return selection, tilt

    def utilities(
        self, batch: Batch, row: np.ndarray, place: np.ndarray, tokens: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """U after each of the tokens int64 [S, K] and before them: float32 [S, K, M], [S, M]."""
        device, (rows, length), width = self.lm.device, batch.token_ids.shape, tokens.shape[1]
        # The places as a rectangle [B, P]; what is missing in a short row repeats place 0.
        nth = np.concatenate([np.arange(n) for n in np.bincount(row, minlength=rows)])
        places = np.zeros((rows, nth.max() + 1), np.int64)
        trials = np.zeros((*places.shape, width), np.int64)
        places[row, nth], trials[row, nth] = place, tokens
        after = np.zeros((*trials.shape, len(self.request.weights)), np.float32)
        before = np.zeros((*places.shape, len(self.request.weights)), np.float32)
        step = max(1, BRANCH_SCORES // (rows * length * width))
        for start in range(0, places.shape[1], step):
            here = slice(start, start + step)
            branches = Branches(
                torch.from_numpy(places[:, here]).to(device), torch.from_numpy(trials[:, here]).to(device)
            )
            for network in self.networks:
                heads = network.scorer.heads
                output = network.scorer.train_values(self.base, batch.token_ids, batch.lengths, branches)
                at_states, at_trials = branches.split(output)
                at_states = at_states.gather(1, branches.places[..., None].expand(-1, -1, output.shape[-1]))
                for into, found in ((before, at_states), (after, at_trials)):
                    flat = found.flatten(0, -2)
                    weights = torch.from_numpy(self.request.weights[network.columns]).to(device)
                    optimal = torch.full((len(flat),), self.request.optimal, device=device)
                    utility = heads.utility(flat, weights.expand(len(flat), -1), optimal)
                    into[:, here, ..., network.columns] = utility.unflatten(0, found.shape[:-1]).float().cpu().numpy()
        return after[row, nth], before[row, nth]


def _pad(texts: Seq[tuple[Seq[int], int]], device: torch.device) -> Batch:
    rows = [torch.tensor(list(tokens)) for tokens, _ in texts]
    tokens = pad_sequence(rows, batch_first=True).to(device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    first = torch.tensor([length - 1 for _, length in texts], device=device)
    none = torch.zeros(len(rows), 0, device=device)
    return Batch(range(len(rows)), tokens, lengths, first, none, torch.ones(tokens.shape, device=device))
