"""Monte-Carlo tree search guided by a value (PPO-MCTS, Liu et al. 2023; PUCT, Silver et al. 2017)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from vas_engine import arguments
from vas_engine.evaluation.growing import Growing, finished_run, plant
from vas_engine.evaluation.measure import Meter, Run
from vas_engine.outputs import RequestOutput
from vas_engine.params import SamplingParams
from vas_engine.prompts import Prompt

if TYPE_CHECKING:
    from vas_engine.llm import LLM

__all__ = ["tree_search"]


class Node:
    """A state whose candidates have been scored.

    Attributes:
        token_ids: int64 [C], the candidates. log_probs: float64 [C], under the base.
        utilities: float64 [C], weighted sum of values behind each candidate, nats.
        visits: int64 [C]. totals: float64 [C], sum of the utilities that were found behind each.
        ends: bool [C], candidates behind which nothing comes.
        children: candidate's place -> node, once it was reached twice.
    """

    def __init__(self, token_ids: np.ndarray, log_probs: np.ndarray, utilities: np.ndarray, ends: np.ndarray) -> None:
        self.token_ids, self.log_probs, self.utilities, self.ends = token_ids, log_probs, utilities, ends
        self.visits = np.zeros(len(token_ids), np.int64)
        self.totals = np.zeros(len(token_ids))
        self.children: dict[int, Node] = {}

    def select(self) -> int:
        """The candidate of the highest Q + P sqrt(N) / (1 + n); one that was not visited has its own utility as Q."""
        worth = np.where(self.visits > 0, self.totals / np.maximum(self.visits, 1), self.utilities)
        priors = np.exp(self.log_probs)
        return int(np.argmax(worth + priors / priors.sum() * math.sqrt(1 + self.visits.sum()) / (1 + self.visits)))


class Tree:
    """The search of one response: a root that follows its chosen tokens, and the paths under it."""

    def __init__(self, response: Growing, random: np.random.Generator, longest: int) -> None:
        self.response, self.random, self.longest = response, random, longest
        self.root: Node | None = None
        self.path: list[tuple[Node, int]] = []

    def descend(self) -> list[int] | None:
        """Choose a path to a state that is not expanded yet; the tokens of it behind the root.

        None where it ends in one behind which nothing comes: that visit is counted at once.
        """
        self.path = []
        node = self.root
        while node is not None:
            place = node.select()
            self.path.append((node, place))
            if node.ends[place]:
                self.back_up()
                return None
            node = node.children.get(place)
        return [int(node.token_ids[place]) for node, place in self.path]

    def attach(self, node: Node) -> None:
        """A state that was expanded: the new root, or the end of the chosen path."""
        if not self.path:
            self.root = node
            return
        parent, place = self.path[-1]
        parent.children[place] = node
        self.back_up()

    def back_up(self) -> None:
        """The utility at the end of the path counts for every step of it."""
        last, place = self.path[-1]
        found = last.utilities[place]
        for node, chosen in self.path:
            node.visits[chosen] += 1
            node.totals[chosen] += found
        self.path = []

    def move(self, ends: frozenset[int]) -> None:
        """Draw a token by visits; what was found behind it is kept."""
        assert self.root is not None
        root, response = self.root, self.response
        policy = root.visits / root.visits.sum()
        place = int(self.random.choice(len(policy), p=policy))
        visited = policy > 0
        response.kl += float((policy * (np.log(np.where(visited, policy, 1.0)) - root.log_probs))[visited].sum())
        response.log_prob += float(root.log_probs[place])
        token = int(root.token_ids[place])
        response.token_ids.append(token)
        if token in ends:
            response.finish_reason = "stop"
        elif len(response.token_ids) >= self.longest:
            response.finish_reason = "length"
        self.root = root.children.get(place)


def tree_search(
    llm: LLM,
    prompts: Sequence[str | Prompt],
    weights: Mapping[str, float],
    simulations: int,
    params: SamplingParams,
    *,
    samples: int = 16,
    seed: int = 0,
    use_tqdm: bool = False,
) -> Run:
    """Responses whose every token is drawn by the visits of a search.

    One request of one token expands a state: it gives the base's probabilities of the candidates and, from the
    difference of tilted and plain log-probabilities, the value behind every one of them. The searches of all responses
    run side by side. Given the tokens before it a search draws nothing at random, so a step's policy (visits over
    their sum) is known, and so is the divergence.

    Args:
        weights: value -> weight, per unit of reward: the stronger, the less the priors say.
        simulations: visits per token, beside those that were kept from the token before.
        params: plain decoding: max_tokens, and num_candidates of a state.

    Raises:
        InvalidArgumentError: fewer than one simulation, or values that are not loaded.
    """
    arguments.integer("simulations", simulations, 1)
    ends = frozenset() if params.ignore_eos else frozenset(llm.lm.eos_token_ids)
    asked = params.replace(
        max_tokens=1,
        values=dict(weights),
        logprobs=params.num_candidates,
        tail="drop",
        seed=0,
    )
    responses = plant(llm, prompts, samples, seed)
    trees = []
    for response in responses:
        room = llm.max_model_len - len(response.prompt_ids)
        longest = min(params.max_tokens or room, room)
        trees.append(Tree(response, np.random.default_rng(response.seed), longest))
    meter = Meter(llm)
    with tqdm(total=len(trees), desc="tree search", unit="response", disable=not use_tqdm) as bar:
        while growing := [tree for tree in trees if tree.response.finish_reason is None]:
            _expand(llm, asked, ends, weights, [(tree, []) for tree in growing if tree.root is None])
            for _ in range(simulations):
                paths = [(tree, tree.descend()) for tree in growing]
                _expand(llm, asked, ends, weights, [(tree, path) for tree, path in paths if path is not None])
            for tree in growing:
                tree.move(ends)
                bar.update(tree.response.finish_reason is not None)
    return finished_run(llm, responses, meter, weights, meter.tokens, "exact")


def _expand(
    llm: LLM,
    params: SamplingParams,
    ends: frozenset[int],
    weights: Mapping[str, float],
    wanted: Sequence[tuple[Tree, list[int]]],
) -> None:
    """Score the candidates of states, each a path of tokens behind the root of a tree, in one batch."""
    if not wanted:
        return
    outputs = llm.generate([tree.response.all_ids + path for tree, path in wanted], params, use_tqdm=False)
    for (tree, path), output in zip(wanted, outputs, strict=True):
        last = len(tree.response.token_ids) + len(path) + 1 >= tree.longest
        tree.attach(_node(output, weights, ends, last))


def _node(output: RequestOutput, weights: Mapping[str, float], ends: frozenset[int], last: bool) -> Node:
    """From a request of one token that lists all its candidates: tilt = utility - a constant of the state."""
    completion = output.outputs[0]
    assert completion.logprobs is not None
    entries = {
        token: entry
        for token, entry in completion.logprobs[0].items()
        if entry.tilted_logprob is not None and math.isfinite(entry.tilted_logprob)
    }
    drawn = completion.token_ids[0]
    token_ids = np.array(sorted(entries))
    log_probs = np.array([entries[token].logprob for token in token_ids])
    tilts = np.array([entries[token].tilted_logprob for token in token_ids]) - log_probs
    known = sum(weight * completion.values[name][0] for name, weight in weights.items())
    utilities = tilts - tilts[np.flatnonzero(token_ids == drawn)[0]] + known
    return Node(token_ids, log_probs, utilities, np.array([last or int(token) in ends for token in token_ids]))
