"""The fused value head: features of candidate rows to tilts and winners, one launch; twin of
`reference.value_head_tilt`.

One program a sequence, so each reads all weights. A large hidden layer is therefore a matrix product of its own before,
spread over the whole device, and the kernel begins with the outputs. Tiles of a sequence's rows (the candidates of one
step) go through the hidden layer, the outputs and the heads, the weights streaming past them; what one stage leaves for
the next passes through scratch in global memory, which a block reads back from its own cache. Then the winner is an
arg max over all rows. A sequence without rows has its columns for rows.

float32 weights are multiplied to float32's precision (on NVIDIA as three tf32 products of split factors); tilts,
log-probabilities and the winner are float64 as on the CPU.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor
from vas_engine.kernels.device import where_tensors_lie
from vas_engine.kernels.reference import (
    DISTRIBUTIONAL,
    NORM_EPS,
    SCALAR,
    HeadWeights,
    SelectionTensors,
    ValueSettings,
    ValueTilt,
    WinnerTensors,
    head_hidden,
)

if TYPE_CHECKING:
    from vas_engine.kernels.compile import Variant

LARGEST_HIDDEN = 2**14
"""Numbers of a hidden layer up to which the kernel takes it in: some ten steps over tiles of weights, each of which has
to wait for its own."""
_SCALAR = tl.constexpr(SCALAR)
_DISTRIBUTIONAL = tl.constexpr(DISTRIBUTIONAL)
_EPS = tl.constexpr(NORM_EPS)
_NONE = tl.constexpr(2**31 - 1)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "relu":
        return tl.where(x < 0.0, 0.0, x)
    else:
        return x / (1.0 + tl.exp(-x))


@triton.jit
def _normaliser(x, stride, first, last, width, ROWS: tl.constexpr, K: tl.constexpr):
    """1 / root mean square of ROWS rows from `first` on, [ROWS]."""
    row, step = first + tl.arange(0, ROWS), tl.arange(0, K)
    x += row.to(tl.int64)[:, None] * stride + step[None, :]
    total = tl.zeros([ROWS], tl.float32)
    for k in range(0, width, K):
        part = tl.load(x + k, mask=(row[:, None] < last) & (k + step[None, :] < width), other=0.0).to(tl.float32)
        total += tl.sum(part * part, 1)
    return 1.0 / tl.sqrt(total / width + _EPS)


@triton.jit
def linear(
    x, stride, scale, first, last, weight, bias, result, inputs, outputs,
    ROWS: tl.constexpr, K: tl.constexpr, N: tl.constexpr,
    SCALED: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Rows of x, times scale [ROWS] if SCALED, through a linear layer and ACTIVATION to rows of `outputs` numbers."""
    row, step, unit = first + tl.arange(0, ROWS), tl.arange(0, K), tl.arange(0, N)
    x += row.to(tl.int64)[:, None] * stride + step[None, :]
    for n in range(0, outputs, N):
        mine = n + unit < outputs
        total = tl.zeros([ROWS, N], tl.float32)
        for k in range(0, inputs, K):
            inside = k + step < inputs
            part = tl.load(x + k, mask=(row[:, None] < last) & inside[None, :], other=0.0).to(tl.float32)
            w = weight + (n + unit)[None, :] * inputs + (k + step)[:, None]
            w = tl.load(w, mask=inside[:, None] & mine[None, :], other=0.0)
            if SCALED:
                part *= scale[:, None]
            total = tl.dot(part.to(w.dtype), w, total, input_precision=PRECISION)
        total += tl.load(bias + n + unit, mask=mine, other=0.0).to(tl.float32)[None, :]
        if ACTIVATION != "":
            total = activate(total, ACTIVATION)
        at = result + row.to(tl.int64)[:, None] * outputs + (n + unit)[None, :]
        tl.store(at, total, mask=(row[:, None] < last) & mine[None, :])


@triton.jit
def _mean_and_lift(raw, atoms, bins, weight, live, BINS: tl.constexpr):
    """For each row of logits: sum p z, and log sum p exp(weight z), p the softmax; [ROWS] each."""
    bin = tl.arange(0, BINS)
    zero = tl.zeros_like(live.to(tl.float32))
    top, above, total, mean, lifted = zero - float("inf"), zero - float("inf"), zero, zero, zero
    for start in range(0, bins, BINS):
        inside = start + bin < bins
        z = tl.load(atoms + start + bin, mask=inside, other=0.0)[None, :]
        logits = tl.load(raw[:, None] + (start + bin)[None, :], mask=live[:, None] & inside[None, :], other=0.0)
        logits = tl.where(inside[None, :], logits, -float("inf"))
        # NaN and inf make NaN here and stay.
        larger = tl.maximum(top, tl.max(logits, 1))
        kept = tl.exp(top - larger)
        p = tl.exp(logits - larger[:, None])
        total = total * kept + tl.sum(p, 1)
        mean = mean * kept + tl.sum(p * z, 1)
        top = larger
        logits += weight * z
        larger = tl.maximum(above, tl.max(logits, 1))
        lifted = lifted * tl.exp(above - larger) + tl.sum(tl.exp(logits - larger[:, None]), 1)
        above = larger
    return mean / total, (above - top) + (tl.log(lifted) - tl.log(total))


@triton.jit
def score_rows(
    raw, outputs, first, last, kinds, scales, starts, atoms, heads, asked, exactly, values, utilities,
    ROWS: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    """Values and utilities of a tile of rows; `asked`: the request's weights."""
    row = first + tl.arange(0, ROWS)
    live = row < last
    for m in range(heads):
        start, kind = tl.load(starts + m), tl.load(kinds + m)
        bins = tl.load(starts + m + 1) - start
        low, high, weight = tl.load(scales + 2 * m), tl.load(scales + 2 * m + 1), tl.load(asked + m)
        at = raw + row.to(tl.int64) * outputs + start
        one = tl.load(at, mask=live, other=0.0)
        value = one * high + low
        utility = value * weight
        if kind != _SCALAR:
            value = low + (high - low) / (1.0 + tl.exp(-one))
            lift = value
            if kind == _DISTRIBUTIONAL:
                value, lift = _mean_and_lift(at, atoms + start, bins, weight, live, BINS)
            # Rounding must not leave the bounds, which are promised.
            value += tl.where(value < low, low - value, tl.where(value > high, high - value, 0.0))
            utility = value * weight
            if exactly & (kind == _DISTRIBUTIONAL):
                utility = lift
        tl.store(values + row * heads + m, value, mask=live)
        tl.store(utilities + row * heads + m, utility, mask=live)


# A selection lies in one buffer, its fields anywhere.
@triton.jit(
    do_not_specialize=[
        "token_ids", "log_probs", "noise", "count", "tail", "tail_log_mass", "finite", "sequences", "choose"
    ]
)  # fmt: skip
def _fused(
    features, stride, hidden, hidden_bias, output, output_bias, kinds, scales, starts, atoms,
    asked, limits, baselines, optimal, candidate_mean, row_offsets, columns,
    token_ids, log_probs, noise, count, tail, tail_log_mass, finite, tilt,
    values, utilities, winner, statistics, middle, raw,
    sequences, width, hidden_size, outputs, heads, selected, choose,
    COLUMNS: tl.constexpr, ROWS: tl.constexpr, K: tl.constexpr, H: tl.constexpr, N: tl.constexpr, BINS: tl.constexpr,
    NORM: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sequence `program_id(0)`. `selected` is W; winner: int64 [3, S], column, token and row; statistics: float64
    [3, S], log-probability, tilted log-probability and KL; middle, raw: scratch float32 [R, H] and [R, O]."""
    s = tl.program_id(0)
    first, last = tl.load(row_offsets + s), tl.load(row_offsets + s + 1)
    for start in range(first, last, ROWS):
        scale = tl.full([ROWS], 1.0, tl.float32)
        if NORM:
            scale = _normaliser(features, stride, start, last, width, ROWS, K)
        if ACTIVATION == "":
            linear(
                features, stride, scale, start, last, output, output_bias, raw, width, outputs,
                ROWS, K, N, NORM, "", PRECISION,
            )  # fmt: skip
        else:
            linear(
                features, stride, scale, start, last, hidden, hidden_bias, middle, width, hidden_size,
                ROWS, K, H, NORM, ACTIVATION, PRECISION,
            )  # fmt: skip
            tl.debug_barrier()
            linear(
                middle, hidden_size, scale, start, last, output, output_bias, raw, hidden_size, outputs,
                ROWS, K, N, False, "", PRECISION,
            )  # fmt: skip
        tl.debug_barrier()
        score_rows(
            raw, outputs, start, last, kinds, scales, starts, atoms, heads, asked + s * heads,
            tl.load(optimal + s) != 0, values, utilities, ROWS, BINS,
        )  # fmt: skip
        tl.debug_barrier()

    settle(
        s, first, last, asked, limits, baselines, candidate_mean, columns,
        token_ids, log_probs, noise, count, tail, tail_log_mass, finite, tilt, values, utilities, winner, statistics,
        sequences, heads, selected, choose, COLUMNS,
    )  # fmt: skip


@triton.jit
def settle(
    s, first, last, asked, limits, baselines, candidate_mean, columns,
    token_ids, log_probs, noise, count, tail, tail_log_mass, finite, tilt, values, utilities, winner, statistics,
    sequences, heads, selected, choose, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Tilts and the winner of sequence s, whose rows [first, last) have their values and utilities."""
    row = tl.arange(0, COLUMNS)
    rows = last - first
    filled = tl.load(count + s).to(tl.int32)
    champion = tl.load(tail + s).to(tl.int32)
    live = row < tl.where(rows > 0, rows, filled)
    column = tl.where(rows > 0, tl.load(columns + first + row, mask=row < rows, other=0), row)
    line = s.to(tl.int64) * selected + column
    shift = tl.load(tilt + line, mask=live, other=0.0)
    if rows > 0:
        candidate = live & (column != champion)
        candidates = tl.maximum(tl.sum(candidate.to(tl.int32), 0), 1)
        about_mean = tl.load(candidate_mean + s) != 0
        terms = tl.zeros([COLUMNS], tl.float64)
        wrong = tl.zeros([COLUMNS], tl.int32)
        for m in range(heads):
            at = (first + row) * heads + m
            value = tl.load(values + at, mask=live, other=0.0)
            utility = tl.load(utilities + at, mask=live, other=0.0)
            baseline = tl.load(baselines + s * heads + m)
            if about_mean:
                baseline = tl.sum(tl.where(candidate, utility, 0.0), 0) / candidates
            limit = tl.load(limits + s * heads + m)
            advantage = utility.to(tl.float64) - baseline.to(tl.float64)
            terms += tl.where(advantage > limit, limit, tl.where(advantage < -limit, -limit, advantage))
            wrong += tl.where(tl.abs(value) < float("inf"), 0, 1)
        terms = tl.where(candidate, terms, 0.0)
        wrong += tl.where(tl.abs(terms) < float("inf"), 0, 1)
        shift += tl.where(wrong == 0, terms, float("nan"))
        tl.store(tilt + line, shift, mask=live)
    if choose != 0:
        base = tl.load(log_probs + line, mask=live, other=-float("inf"))
        score = base + tl.load(noise + line, mask=live, other=0.0) + shift
        wrong = tl.sum((live & ((shift < float("inf")) == 0)).to(tl.int32), 0)
        pruned = tl.sum((live & (shift > -float("inf"))).to(tl.int32), 0) < filled
        score = tl.where(live & (score < float("inf")), score, -float("inf"))
        best = tl.max(score, 0)
        legal = (tl.load(finite + s) != 0) & (wrong == 0) & (best > -float("inf"))
        won = tl.min(tl.where(score == best, column, _NONE), 0)
        taken = live & (column == won)

        mass = tl.where(champion >= 0, tl.load(tail_log_mass + s), -float("inf"))
        terms = tl.where(live & (column != champion), base + shift, -float("inf"))
        top = tl.maximum(tl.max(terms, 0), mass)
        top = tl.where(top > -float("inf"), top, 0.0)
        log_z = top + tl.log(tl.sum(tl.exp(terms - top), 0) + tl.exp(mass - top))
        policy = tl.exp(terms - log_z)
        kl = tl.sum(tl.where(policy > 0.0, policy * (shift - log_z), 0.0), 0) - tl.exp(mass - log_z) * log_z
        chosen = tl.sum(tl.where(taken, base, 0.0), 0)
        tilted = chosen + tl.sum(tl.where(taken, shift, 0.0), 0) - log_z
        place = tl.sum(tl.where(taken, row, 0), 0)

        nan = float("nan")
        token = tl.load(token_ids + s.to(tl.int64) * selected + tl.where(legal, won, 0))
        tl.store(winner + s, tl.where(legal, won, -1).to(tl.int64))
        tl.store(winner + sequences + s, tl.where(legal, token, -1))
        tl.store(winner + 2 * sequences + s, tl.where(legal & (rows > 0), first + place, -1).to(tl.int64))
        tl.store(statistics + s, tl.where(legal, chosen, nan))
        tl.store(statistics + sequences + s, tl.where(legal & (pruned == 0), tilted, nan))
        tl.store(statistics + 2 * sequences + s, tl.where(legal & (pruned == 0), tl.where(kl > 0.0, kl, 0.0), nan))


@torch.library.custom_op("vas_engine::value_head_tilt", mutates_args=("tilt",))
@where_tensors_lie
def _operator(
    features: Tensor,
    norm: bool,
    hidden: Tensor | None,
    hidden_bias: Tensor | None,
    activation: str,
    head_tensors: list[Tensor],
    settings: list[Tensor],
    row_offsets: Tensor,
    columns: Tensor,
    selection: list[Tensor],
    tilt: Tensor,
    choose: bool,
) -> list[Tensor]:
    output, output_bias, kinds = head_tensors[:3]
    (sequences, selected), heads, outputs = tilt.shape, len(kinds), len(output)
    if features.stride(1) != 1:
        features = features.contiguous()
    results = _empty(features, heads, sequences)
    if sequences == 0:
        return results
    hidden_size = 0 if hidden is None else len(hidden)
    raw = features.new_empty(len(features), outputs, dtype=torch.float32)
    middle = features.new_empty(len(features), hidden_size, dtype=torch.float32)
    _fused[(sequences,)](
        features, features.stride(0), output if hidden is None else hidden,
        output_bias if hidden_bias is None else hidden_bias, *head_tensors,
        *settings, row_offsets, columns, *selection, tilt, *results, middle, raw,
        sequences, features.shape[1], hidden_size, outputs, heads, selected, int(choose),
        NORM=norm, ACTIVATION="" if hidden is None else activation, PRECISION=precision(),
        **launch_of(selected, outputs, features.shape[1], hidden_size, hidden is None or hidden.dtype == torch.float32),
    )  # fmt: skip
    return results


@_operator.register_fake
def _(
    features, norm, hidden, hidden_bias, activation, head_tensors, settings, row_offsets, columns, selection, tilt,
    choose,
):  # fmt: skip
    return _empty(features, len(head_tensors[2]), len(tilt))


def _empty(features: Tensor, heads: int, sequences: int) -> list[Tensor]:
    """Values, utilities, winners (column, token, row) and their statistics."""
    return [
        features.new_empty(len(features), heads, dtype=torch.float32),
        features.new_empty(len(features), heads, dtype=torch.float32),
        features.new_empty(3, sequences, dtype=torch.int64),
        features.new_empty(3, sequences, dtype=torch.float64),
    ]


def launch_of(selected: int, outputs: int, width: int, hidden_size: int, wide: bool) -> dict[str, int]:
    """Sizes of tiles, warps and stages for W columns, outputs, features of a row and units of the hidden layer.

    Args:
        wide: whether the weights of the hidden layer are float32, of which fewer are held at a time.
    """

    def tile(size: int, most: int, least: int = 16) -> int:
        return min(most, max(least, triton.next_power_of_2(size)))

    return {
        "COLUMNS": tile(selected, 1 << 20, 32),
        "ROWS": 32 if hidden_size or outputs > 16 else 16,
        "K": tile(width, 32),
        "H": tile(hidden_size, 32 if wide else 64),
        "N": tile(outputs, 32),
        "BINS": tile(outputs, 32),
        "num_warps": 4,
        "num_stages": 2 if hidden_size or outputs > 16 else 4,
    }


def precision() -> str:
    return "ieee" if torch.version.hip else "tf32x3"


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
    """`reference.value_head_tilt` without synchronisation; in one launch unless the hidden layer is large.

    Args:
        features: [R, width] float32, bfloat16 or float16; columns adjacent, rows any stride apart.
        weights, settings: contiguous, on the features' device.
        row_offsets: int32 [S + 1], at most W rows a sequence.
        columns: int32 [R].
        selection: of S sequences, W columns, contiguous, on the features' device.
        tilt: float64 [S, W], contiguous, added to in place.
        choose: whether to choose winners.

    Returns:
        A `ValueTilt`; lines of rows that no sequence owns are not written.
    """
    w, s = weights, selection
    if w.hidden is not None and w.hidden.numel() > LARGEST_HIDDEN:
        features, w = head_hidden(features, w), replace(w, norm=False, hidden=None, hidden_bias=None)
    values, utilities, winner, statistics = _operator(
        features,
        w.norm,
        w.hidden,
        w.hidden_bias,
        w.activation,
        [w.output, w.output_bias, w.kinds, w.scales, w.starts, w.atoms],
        [settings.weights, settings.limits, settings.baselines, settings.optimal, settings.candidate_mean],
        row_offsets,
        columns,
        [s.token_ids, s.log_probs, s.noise, s.count, s.tail, s.tail_log_mass, s.finite],
        tilt,
        choose,
    )
    if not choose:
        return ValueTilt(values, utilities)
    return ValueTilt(values, utilities, WinnerTensors(winner[0], winner[1], *statistics), winner[2])


def variants() -> list[Variant]:
    """The shipped configurations: up to 31 and up to 64 candidates, few and many outputs, both widths of weights."""
    from vas_engine.kernels.compile import Variant

    integers = ("stride", "sequences", "width", "hidden_size", "outputs", "heads", "selected", "choose")
    float32 = ("features", "output", "output_bias", "scales", "atoms", "asked", "baselines", "values", "utilities")
    float64 = ("limits", "log_probs", "noise", "tail_log_mass", "tilt", "statistics")
    signature = dict.fromkeys(integers, "i32") | dict.fromkeys((*float32, "middle", "raw"), "*fp32")
    signature |= dict.fromkeys(float64, "*fp64") | dict.fromkeys(("token_ids", "count", "tail", "winner"), "*i64")
    signature |= dict.fromkeys(("kinds", "starts", "row_offsets", "columns"), "*i32")
    signature |= dict.fromkeys(("optimal", "candidate_mean", "finite"), "*i1")
    aligned = ("features", "stride", "width", "hidden", "output", "hidden_size", "middle", "raw")
    listed = []
    for selected, outputs, dtype, activation in itertools.product((21, 65), (1, 101), ("bf16", "fp32"), ("gelu", "")):
        launch = launch_of(selected, outputs, 1024, 256 if activation else 0, dtype == "fp32")
        warps, stages = launch.pop("num_warps"), launch.pop("num_stages")
        given = dict.fromkeys(("hidden", "hidden_bias"), f"*{dtype}")
        for precision, targets in (("tf32x3", ("sm_80", "sm_90", "sm_100")), ("ieee", ("gfx942",))):
            # Behind a hidden layer of its own rows are of its type, and not normalised.
            apart = dtype == "bf16" and not activation
            constants = launch | {"NORM": not apart, "ACTIVATION": activation, "PRECISION": precision}
            listed.append(
                Variant(
                    f"value_head_tilt {selected}x{outputs} {dtype} {activation or 'linear'}", _fused,
                    signature | given | ({"features": "*bf16"} if apart else {}), constants,
                    num_warps=warps, num_stages=stages, aligned=aligned, targets=targets,
                )
            )  # fmt: skip
    return listed
