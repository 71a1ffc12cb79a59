"""The fused value head and the networks' input: the twins against the engine's steps, the kernels against the twins."""

from __future__ import annotations

import copy
from dataclasses import dataclass, fields, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vas_engine.kernels import reference
from vas_engine.kernels.reference import HeadWeights, SelectionTensors, ValueSettings, ValueTilt

from vas_engine.sampling import SamplingArrays, Selection, choose, select, value_tilt
from vas_engine.values import HeadConfig, Heads, Support, ValueConfig

pytest.importorskip("triton")

from vas_engine.kernels import candidate_input as input_kernel
from vas_engine.kernels import value_tilt as kernels

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"  # the interpreter's
PLAIN, BOUNDED = HeadConfig("plain", mean=0.5, std=2.0), HeadConfig("bounded", bounds=(-1.0, 3.0))
SMALL, LARGE = (HeadConfig(f"of{n}", support=Support(-2.0, 1.0, n)) for n in (3, 41))
HEADS = [(PLAIN,), (BOUNDED,), (LARGE,), (PLAIN, SMALL, BOUNDED), (LARGE, SMALL), (SMALL, PLAIN)]
seeds = st.integers(0, 2**32 - 1)
# The interpreter is NumPy, which warns of the infinities that are meant.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(autouse=True)
def poison():
    """What a kernel forgets to write is NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@dataclass
class Case:
    """Candidate rows of several requests: some guided and pruned, some plain, some that cannot be sampled."""

    heads: Heads
    features: torch.Tensor
    settings: ValueSettings
    offsets: torch.Tensor
    columns: torch.Tensor
    selection: Selection
    tilt: torch.Tensor

    @property
    def tensors(self) -> SelectionTensors:
        return SelectionTensors(*map(torch.from_numpy, vars(self.selection).values()))

    def twin(self, **changes) -> tuple[ValueTilt, torch.Tensor]:
        tilt = self.tilt.clone()
        result = reference.value_head_tilt(
            self.features, HeadWeights.of(self.heads), self.settings, self.offsets, self.columns, self.tensors, tilt,
            **changes,
        )  # fmt: skip
        return result, tilt

    def triton(self, **changes) -> tuple[ValueTilt, torch.Tensor]:
        tilt = self.tilt.to(DEVICE, copy=True)
        result = kernels.value_head_tilt(
            self.features.to(DEVICE), _on_device(HeadWeights.of(self.heads)), _on_device(self.settings),
            self.offsets.to(DEVICE), self.columns.to(DEVICE), _on_device(self.tensors), tilt, **changes,
        )  # fmt: skip
        winners = None if result.winners is None else _moved(result.winners, "cpu")
        return _moved(replace(result, winners=winners), "cpu"), tilt.cpu()


def _moved(group, device):
    """A dataclass with its tensors on another device."""
    values = {f.name: getattr(group, f.name) for f in fields(group)}
    return replace(group, **{k: v.to(device) for k, v in values.items() if isinstance(v, torch.Tensor)})


def _on_device(group):
    return _moved(group, DEVICE)


def make_heads(configs, width: int, hidden: int, norm: bool = True, activation: str = "gelu") -> Heads:
    config = ValueConfig(
        "lookahead", configs, hidden_size=width, vocab_size=5, states=(1,), width=width, head_hidden=hidden,
        head_norm=norm, activation=activation,
    )  # fmt: skip
    heads = Heads(config, width).requires_grad_(False)
    heads.output.weight.mul_(10)  # values that differ
    heads.output.bias.normal_()
    if heads.hidden is not None:
        heads.hidden.bias.normal_()
    return heads


def make_case(seed: int, configs=None, width: int | None = None, hidden: int | None = None) -> Case:
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    configs = configs or HEADS[rng.integers(len(HEADS))]
    width, hidden = (
        width or int(rng.choice([5, 17, 40])),
        int(rng.choice([0, 6, 70, 1200])) if hidden is None else hidden,
    )
    heads = make_heads(configs, width, hidden, bool(rng.random() < 0.7), str(rng.choice(["gelu", "relu", "silu"])))
    count, vocabulary = int(rng.integers(1, 5)), int(rng.choice([2, 60]))
    arrays = SamplingArrays.build(
        count, seed=rng.integers(0, 2**63, count, dtype=np.uint64), temperature=rng.choice([0, 1], count),
        num_candidates=rng.choice([1, 5, 20] if seed % 5 else [40], count), keep_tail=rng.random(count) < 0.6,
    )  # fmt: skip
    logits = torch.randn(count, vocabulary)
    if rng.random() < 0.3:
        logits[0] = torch.nan
    selection = select(logits, np.arange(count), arrays)
    guided, needed = rng.random(count) < 0.8, selection.filled & (rng.random(selection.token_ids.shape) < 0.7)
    needed |= selection.filled & (rng.random((count, 1)) < 0.5)
    needed &= guided[:, None]
    needed[:, 0] = guided & selection.finite
    owner, columns = np.nonzero(needed)
    padding = int(rng.integers(3))
    tilt = np.where(needed | ~guided[:, None] | ~selection.filled, 0.0, -np.inf)
    weights = torch.from_numpy(rng.choice([0.0, 1.0, -2.0, 3.5], (count, len(configs))).astype(np.float32))
    optimal = torch.from_numpy(rng.random(count) < 0.5)
    for m, config in enumerate(configs):
        if config.support is None:
            weights[optimal, m] = 0
    clip = torch.from_numpy(rng.choice([np.inf, 0.3], (count, 1)))
    limits = torch.where(weights != 0, weights.double().abs() * clip, 0.0)
    ask = ValueSettings(
        weights, limits, torch.randn(count, len(configs)), optimal, torch.from_numpy(rng.random(count) < 0.5)
    )
    features = torch.randn(len(owner) + padding, width)
    features[len(owner) :] = torch.nan
    offsets = np.concatenate([[0], needed.sum(1).cumsum()]).astype(np.int32)
    columns = np.concatenate([columns, np.full(padding, 2**30)]).astype(np.int32)
    return Case(
        heads, features, ask, torch.from_numpy(offsets), torch.from_numpy(columns), selection, torch.from_numpy(tilt)
    )


def make_settings(count: int, heads: int, optimal: bool = False) -> ValueSettings:
    return ValueSettings(
        torch.rand(count, heads) * 4 - 2,
        torch.full((count, heads), torch.inf, dtype=torch.float64),
        torch.randn(count, heads),
        torch.full((count,), optimal),
        torch.zeros(count, dtype=torch.bool),
    )


def whole_case(heads: Heads, width: int, count: int, candidates: int, optimal: bool = False) -> Case:
    """Requests with nothing pruned, the champion of the tail among the rows."""
    arrays = SamplingArrays.build(count, num_candidates=candidates, seed=range(count))
    selection = select(torch.randn(count, candidates + 30), np.arange(count), arrays)
    columns = candidates + 1
    return Case(
        heads, torch.randn(columns * count, width), make_settings(count, len(heads.configs), optimal),
        torch.arange(0, columns * count + 1, columns, dtype=torch.int32),
        torch.arange(columns, dtype=torch.int32).repeat(count), selection,
        torch.zeros(count, columns, dtype=torch.float64),
    )  # fmt: skip


@settings(max_examples=80, deadline=None)
@given(seeds)
def test_the_twin_is_what_the_engine_does(seed):
    case = make_case(seed)
    rows, s = int(case.offsets[-1]), case.settings
    owner = np.repeat(np.arange(len(case.tilt)), np.diff(case.offsets.numpy()))
    column = case.columns[:rows].numpy()
    output = case.heads(case.features[:rows])
    utilities = case.heads.utility(output, s.weights[owner], s.optimal[owner])
    is_tail = column == case.selection.tail[owner]
    baselines = s.baselines.numpy().copy()
    for i in np.flatnonzero(s.candidate_mean.numpy()):
        if ((owner == i) & ~is_tail).any():
            baselines[i] = utilities.numpy()[(owner == i) & ~is_tail].mean(0)
    tilt = case.tilt.numpy().copy()
    tilt[owner, column] = np.where(is_tail, 0.0, value_tilt(utilities.numpy(), baselines, s.limits.numpy(), owner))
    winners = choose(case.selection, tilt)

    result, changed = case.twin()
    torch.testing.assert_close(result.values[:rows], case.heads.mean(output), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(result.utilities[:rows], utilities, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(changed, tilt, rtol=1e-4, atol=1e-4)
    assert result.winners is not None
    np.testing.assert_array_equal(result.winners.column, winners.column)
    np.testing.assert_allclose(result.winners.kl, winners.kl, rtol=1e-3, atol=1e-3)
    for i, row in enumerate(result.row.tolist()):
        guided = winners.column[i] >= 0 and (owner == i).any()
        assert (row >= 0) == guided
        assert not guided or (owner[row], column[row]) == (i, winners.column[i])


def assert_equals_twin(case: Case, tolerance: float = 1e-5) -> None:
    ours, tilt = case.triton()
    twin, expected = case.twin()
    rows = int(case.offsets[-1])
    for name in ("values", "utilities"):
        left, right = getattr(ours, name)[:rows], getattr(twin, name)[:rows]
        torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(tilt, expected, rtol=tolerance, atol=10 * tolerance, equal_nan=True)
    # From the kernel's own tilt, the winner and its statistics are exact.
    exact = reference.choose_winner(case.tensors, tilt)
    assert ours.winners is not None
    for field in fields(exact):
        left, right = getattr(ours.winners, field.name), getattr(exact, field.name)
        torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12, equal_nan=True)
    if torch.equal(exact.column, twin.winners.column):
        assert torch.equal(ours.row, twin.row)


@settings(max_examples=60, deadline=None)
@given(seeds)
def test_the_kernel_equals_its_twin(seed):
    assert_equals_twin(make_case(seed))


def test_sixty_four_candidates():
    """More rows than a tile, and more outputs than a tile of them, of two distributional heads."""
    torch.manual_seed(0)
    assert_equals_twin(whole_case(make_heads((LARGE, SMALL), 40, 70), 40, 2, 64, optimal=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_hidden_layers_of_half_precision(dtype):
    """Judged against float32 by relative norm."""
    torch.manual_seed(0)
    case = whole_case(make_heads((PLAIN, LARGE), 40, 70), 40, 2, 5)
    exact, _ = case.twin()
    case.heads = copy.deepcopy(case.heads)
    case.heads.hidden.to(dtype)
    ours, _ = case.triton()
    assert 0 < (ours.values - exact.values).norm() / exact.values.norm() < 1e-2


@pytest.mark.parametrize("poisoned", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("at", ["features", "baselines"])
def test_what_is_not_finite_stays_with_its_request(poisoned, at):
    torch.manual_seed(0)
    case = whole_case(make_heads((LARGE, PLAIN), 17, 6), 17, 3, 4)
    clean, _ = case.triton()
    # The champion's tilt is 0 whatever its value; a value that is not finite still ends the request.
    if at == "features":
        case.features[9, 3] = poisoned
    else:
        case.settings.baselines[1, 0] = poisoned
    ours, tilt = case.triton()
    twin, expected = case.twin()
    torch.testing.assert_close(tilt.isnan(), expected.isnan())
    assert ours.winners.column.tolist() == [clean.winners.column[0], -1, clean.winners.column[2]]
    assert ours.winners.token_id[1] == -1
    assert ours.row[1] == -1
    assert twin.winners.column[1] == -1


def test_bounds_hold_in_floating_point():
    """Of saturated heads, whose ends do not add up exactly."""
    torch.manual_seed(0)
    ends = np.random.default_rng(0).uniform(-3, 3, (20, 2)).astype(np.float32)
    ends.sort(1)
    heads = make_heads([HeadConfig(f"head{i}", bounds=(float(a), float(b))) for i, (a, b) in enumerate(ends)], 5, 0)
    for bias in (200.0, -200.0):
        heads.output.bias.fill_(bias)
        ours, _ = whole_case(heads, 5, 1, 3).triton()
        assert torch.equal(ours.values, torch.from_numpy(ends[:, int(bias > 0)]).expand(4, -1))


def test_networks_add_up():
    """Two networks one after the other are one network with the heads of both."""
    case = make_case(3, (PLAIN, LARGE), width=17, hidden=6)
    first, second = make_heads((PLAIN,), 17, 6), make_heads((LARGE,), 17, 6)
    whole = make_heads((PLAIN, LARGE), 17, 6)
    for part in (first, second):
        part.load_state_dict({k: whole.state_dict()[k] for k in ("hidden.weight", "hidden.bias")}, strict=False)
        part.norm, part.activation = whole.norm, whole.activation
    for part, own in ((first, slice(0, 1)), (second, slice(1, None))):
        part.output.weight.copy_(whole.output.weight[own])
        part.output.bias.copy_(whole.output.bias[own])

    def narrowed(m: int) -> ValueSettings:
        s, own = case.settings, slice(m, m + 1)
        narrow = (x[:, own].contiguous() for x in (s.weights, s.limits, s.baselines))
        return ValueSettings(*narrow, s.optimal, s.candidate_mean)

    both, expected = replace(case, heads=whole).triton()
    partial, tilt = replace(case, heads=first, settings=narrowed(0)).triton(choose=False)
    assert partial.winners is None
    last, tilt = replace(case, heads=second, settings=narrowed(1), tilt=tilt).triton()
    torch.testing.assert_close(tilt, expected, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert torch.equal(last.winners.column, both.winners.column)


def test_no_sequences_and_the_operators_schema():
    case = make_case(4, (PLAIN,), width=5, hidden=0)
    w, s, t = _on_device(HeadWeights.of(case.heads)), _on_device(case.settings), _on_device(case.tensors)
    arguments = (
        case.features.to(DEVICE), w.norm, w.hidden, w.hidden_bias, w.activation,
        [w.output, w.output_bias, w.kinds, w.scales, w.starts, w.atoms], list(vars(s).values()),
        case.offsets.to(DEVICE), case.columns.to(DEVICE), list(vars(t).values()), case.tilt.to(DEVICE), True,
    )  # fmt: skip
    torch.library.opcheck(kernels._operator, arguments, test_utils=("test_schema", "test_faketensor"))
    nobody = select(torch.zeros(1, 5), np.zeros(0, np.int64), SamplingArrays.build(0))
    empty = replace(
        case, features=torch.zeros(0, 5), settings=make_settings(0, 1), selection=nobody,
        offsets=torch.zeros(1, dtype=torch.int32), columns=torch.zeros(0, dtype=torch.int32),
        tilt=torch.zeros(0, 1, dtype=torch.float64),
    )  # fmt: skip
    result, _ = empty.triton()
    assert result.values.shape == (0, 1)
    assert result.row.shape == (0,)


# -- candidate_input ---------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(seeds, st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_input_equals_its_twin(seed, dtype):
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    width, rows = int(rng.choice([1, 7, 64, 530])), int(rng.integers(0, 9))
    states, table = torch.randn(4, width + 3)[:, :width], torch.randn(9, width).to(dtype)
    index, tokens = torch.randint(0, 4, (rows,)), torch.randint(0, 9, (rows,))
    places, where = torch.randn(3, width), torch.randint(0, 3, (rows,))
    arguments = [states.to(dtype), index]
    arguments += [table, tokens] if rng.random() < 0.7 else [None, None]
    own = torch.randn(rows, width)
    arguments += [(places, where), (own, None), (None, None)][rng.choice(3, p=[0.4, 0.4, 0.2])]
    ours = input_kernel.candidate_input(*(a if a is None else a.to(DEVICE) for a in arguments))
    # Two or three float32 additions in the same order: bit for bit.
    torch.testing.assert_close(ours.cpu(), reference.candidate_input(*arguments), rtol=0, atol=0)


def test_input_operator_is_what_it_says():
    arguments = torch.randn(2, 5, device=DEVICE), torch.tensor([1, 0, 1], device=DEVICE)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(input_kernel.candidate_input, arguments, test_utils=checks)


# -- on a GPU ----------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="no CUDA device")
@pytest.mark.parametrize("configs", [(PLAIN,), (LARGE,), (PLAIN, SMALL, BOUNDED, LARGE)])
@pytest.mark.parametrize("hidden", [0, 24, 256])
def test_real_sizes(configs, hidden):
    assert_equals_twin(whole_case(make_heads(configs, 640, hidden), 640, 32, 20), tolerance=3e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="no CUDA device")
def test_a_graph_replays_it():
    case = whole_case(make_heads((PLAIN, LARGE), 40, 70), 40, 4, 20)
    weights, ask = _on_device(HeadWeights.of(case.heads)), _on_device(case.settings)
    selection = _on_device(case.tensors)
    features, tilt, places = case.features.cuda(), case.tilt.cuda(), (case.offsets.cuda(), case.columns.cuda())
    kernels.value_head_tilt(features, weights, ask, *places, selection, tilt.clone())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = kernels.value_head_tilt(features, weights, ask, *places, selection, tilt)
    case.features = torch.randn_like(case.features)
    features.copy_(case.features)
    tilt.copy_(case.tilt)
    graph.replay()
    expected, _ = case.twin()
    assert torch.equal(result.winners.column.cpu(), expected.winners.column)
