"""What a value network is made of: the settings behind ``config.json`` of a value folder."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vas_engine.errors import InvalidArgumentError, ValueArtifactError, nearest

if TYPE_CHECKING:
    from vas_engine.model.lm import CausalLM

FORMAT_VERSION = 1
ACTIVATIONS = ("gelu", "relu", "silu")


@dataclass(frozen=True)
class KindPreset:
    """What a kind fixes: where its rows come from and which layers it may have."""

    input: str
    reads_base: bool = False
    own_kv: bool = False


KINDS: dict[str, KindPreset] = {
    "action": KindPreset("action"),
    "reader": KindPreset("action", reads_base=True),
    "side": KindPreset("action", own_kv=True),
    "lookahead": KindPreset("lookahead"),
    "side-lookahead": KindPreset("lookahead", own_kv=True),
    "model": KindPreset("token", own_kv=True),
}


@dataclass(frozen=True)
class Support:
    """Equally spaced atoms of a distributional head, in the reward's units.

    Attributes:
        min: first atom.
        max: last atom.
        bins: number of atoms, at least 2.
    """

    min: float
    max: float
    bins: int

    def __post_init__(self) -> None:
        _integer("support.bins", self.bins, 2)
        _interval("support", (self.min, self.max))


@dataclass(frozen=True)
class HeadConfig:
    """One output of a network.

    A scalar head gives ``mean + std * raw``, or with ``bounds`` ``lo + (hi - lo) * sigmoid(raw)``, which can
    never leave the interval. A head with ``support`` gives logits over the atoms instead.

    Attributes:
        name: how requests name this value when the network has several heads.
        reward: name of the reward it was trained on.
        support: atoms of a distributional head; None for a scalar head.
        bounds: interval of a bounded scalar head, in the reward's units.
        mean, std: scale of an unbounded scalar head, in the reward's units.
    """

    name: str = "value"
    reward: str = ""
    support: Support | None = None
    bounds: tuple[float, float] | None = None
    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        if not self.name or not isinstance(self.name, str):
            raise InvalidArgumentError("head.name", self.name, "give every head a non-empty name")
        if self.bounds is not None:
            object.__setattr__(self, "bounds", tuple(self.bounds))
            _interval("head.bounds", self.bounds)
            if self.support is not None:
                raise InvalidArgumentError(
                    "head.bounds", self.bounds, "a distributional head is bounded by its support; drop bounds"
                )
        if not _finite(self.mean):
            raise InvalidArgumentError("head.mean", self.mean, "use a finite number")
        if not _finite(self.std) or self.std == 0:
            raise InvalidArgumentError("head.std", self.std, "use a finite number other than 0")

    @property
    def distributional(self) -> bool:
        """Whether the head predicts a distribution of returns and not only its mean."""
        return self.support is not None

    @property
    def outputs(self) -> int:
        """Columns of the network's output that belong to this head."""
        return self.support.bins if self.support else 1

    @property
    def scale(self) -> float:
        """Unit of errors: the width of a bounded head's interval or support, else ``std``. The reward's units."""
        low, high = self.interval
        return high - low if math.isfinite(high - low) else abs(self.std)

    @property
    def interval(self) -> tuple[float, float]:
        """Bounds of V in the reward's units, ``(-inf, inf)`` when there are none."""
        if self.support:
            return (float(self.support.min), float(self.support.max))
        if self.bounds:
            return (float(self.bounds[0]), float(self.bounds[1]))
        return (-math.inf, math.inf)


@dataclass(frozen=True)
class ValueConfig:
    """Settings of a value network or value model.

    Attributes:
        kind: preset of what the network sees, a key of ``KINDS``.
        heads: the outputs; names must differ.
        hidden_size: width of the base model's hidden states (of the backbone's own for kind "model").
        vocab_size: vocabulary of the base model.
        states: indices of the hidden states it reads, Hugging Face's numbering (0 embeddings, j after layer
            j, the number of layers = after the final norm). Empty for kind "model".
        state_norm: divide each hidden state (and the token's embedding) by its root mean square before
            projecting.
        width: width of the network; 0 hands the concatenated states to the heads as they are (lookahead
            only).
        layers: base layers whose K/V a reader looks at, one network layer each, in this order.
        queries: query heads of a reader layer, a multiple of the base layers' K/V heads.
        depth: number of layers of a side network.
        num_heads, kv_heads: attention heads of a side network's layers.
        head_dim: size of one attention head (a reader's must be the base layers').
        mlp: hidden width of the layers' feed-forward block; 0 leaves it out.
        head_norm: divide by the root mean square before the heads.
        head_hidden: hidden width that the heads share; 0 for linear heads.
        activation: "gelu", "relu" or "silu".
        base: fingerprint of the base model; empty until the network is bound.
        backbone: fingerprint of the value model's own LM (kind "model").
    """

    kind: str
    heads: tuple[HeadConfig, ...]
    hidden_size: int
    vocab_size: int
    states: tuple[int, ...] = ()
    state_norm: bool = True
    width: int = 0
    layers: tuple[int, ...] = ()
    queries: int = 0
    depth: int = 0
    num_heads: int = 0
    kv_heads: int = 0
    head_dim: int = 0
    mlp: int = 0
    head_norm: bool = True
    head_hidden: int = 0
    activation: str = "gelu"
    base: Mapping[str, Any] = field(default_factory=dict)
    backbone: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("heads", "states", "layers"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.kind not in KINDS:
            raise InvalidArgumentError("kind", self.kind, nearest(str(self.kind), KINDS))
        _check_common(self)
        if self.kind == "model":
            _check_model(self)
        else:
            _check_network(self)

    @property
    def preset(self) -> KindPreset:
        """What the kind fixes."""
        return KINDS[self.kind]

    @property
    def input(self) -> str:
        """ "action" (hidden states before the token + its embedding), "lookahead" (those after it) or "token"."""
        return self.preset.input

    @property
    def outputs(self) -> int:
        """Columns of the output of all heads together."""
        return sum(head.outputs for head in self.heads)

    def replace(self, **changes: Any) -> ValueConfig:
        """A copy with some settings changed, checked again."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, with the format's version."""
        values = dataclasses.asdict(self)
        values["heads"] = [dataclasses.asdict(head) for head in self.heads]
        return {"format_version": FORMAT_VERSION, **values}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ValueConfig:
        """Reads what ``to_dict`` wrote.

        Raises:
            ValueArtifactError: unknown or missing settings, settings that cannot work, another format's
                version.
        """
        values = dict(values)
        version = values.pop("format_version", None)
        if version != FORMAT_VERSION:
            raise ValueArtifactError(
                f"format_version={version!r}: this release reads {FORMAT_VERSION}; save the value again with it"
            )
        heads = values.get("heads")
        if not isinstance(heads, (list, tuple)):
            raise ValueArtifactError(f"heads={heads!r}: expected a list of heads")
        try:
            values["heads"] = tuple(_head_from_dict(head) for head in heads)
            return _build(cls, values, "config.json")
        except (InvalidArgumentError, TypeError) as error:
            raise ValueArtifactError(f"config.json: {error}") from error


def _head_from_dict(values: Any) -> HeadConfig:
    if not isinstance(values, Mapping):
        raise ValueArtifactError(f"heads: expected an object for each head, got {values!r}")
    values = dict(values)
    if values.get("support") is not None:
        values["support"] = _build(Support, values["support"], "support")
    return _build(HeadConfig, values, "head")


def _build(cls: type, values: Any, where: str) -> Any:
    if not isinstance(values, Mapping):
        raise ValueArtifactError(f"{where}: expected an object, got {values!r}")
    known = {item.name for item in dataclasses.fields(cls)}
    for name in values:
        if name not in known:
            raise ValueArtifactError(f"{where}: unknown setting {name!r}; {nearest(str(name), known)}")
    for item in dataclasses.fields(cls):
        required = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
        if required and item.name not in values:
            raise ValueArtifactError(f"{where}: setting {item.name!r} is missing")
    return cls(**values)


def _check_common(config: ValueConfig) -> None:
    if not config.heads:
        raise InvalidArgumentError("heads", config.heads, "give at least one head")
    names = [head.name for head in config.heads]
    if len(set(names)) < len(names):
        raise InvalidArgumentError("heads", names, "give every head another name")
    _integer("hidden_size", config.hidden_size, 1)
    _integer("vocab_size", config.vocab_size, 1)
    for name in ("width", "queries", "depth", "num_heads", "kv_heads", "head_dim", "mlp", "head_hidden"):
        _integer(name, getattr(config, name), 0)
    for name in ("state_norm", "head_norm"):
        if not isinstance(getattr(config, name), bool):
            raise InvalidArgumentError(name, getattr(config, name), "use true or false")
    if config.activation not in ACTIVATIONS:
        raise InvalidArgumentError("activation", config.activation, nearest(str(config.activation), ACTIVATIONS))


def _check_model(config: ValueConfig) -> None:
    for name in ("states", "layers", "width", "queries", "depth", "num_heads", "kv_heads", "head_dim", "mlp"):
        if getattr(config, name):
            raise InvalidArgumentError(
                name, getattr(config, name), 'a value model (kind "model") has its own LM; leave it out'
            )


def _check_network(config: ValueConfig) -> None:
    if not config.states:
        raise InvalidArgumentError("states", config.states, "name at least one hidden state to read")
    for name in ("states", "layers"):
        for index in getattr(config, name):
            _integer(name, index, 0)
    if len(set(config.states)) < len(config.states):
        raise InvalidArgumentError("states", config.states, "name each hidden state once")
    preset = config.preset
    if config.width == 0 and (preset.input != "lookahead" or preset.own_kv):
        raise InvalidArgumentError("width", 0, f"a network of kind {config.kind!r} needs a positive width")
    if preset.reads_base:
        if not config.layers:
            raise InvalidArgumentError(
                "layers", config.layers, "name at least one base layer for the reader to look at"
            )
        _integer("queries", config.queries, 1)
        _integer("head_dim", config.head_dim, 1)
    elif config.layers or config.queries:
        raise InvalidArgumentError(
            "layers",
            config.layers,
            f"kind {config.kind!r} does not read the base's K/V; use kind 'reader' or drop layers and queries",
        )
    if preset.own_kv:
        _check_side(config)
    elif config.depth or config.num_heads or config.kv_heads:
        raise InvalidArgumentError(
            "depth",
            config.depth,
            f"kind {config.kind!r} has no layers of its own; use kind 'side' or drop depth and heads",
        )


def _check_side(config: ValueConfig) -> None:
    for name in ("depth", "num_heads", "kv_heads", "head_dim"):
        _integer(name, getattr(config, name), 1)
    if config.num_heads % config.kv_heads:
        raise InvalidArgumentError("num_heads", config.num_heads, f"use a multiple of kv_heads={config.kv_heads}")
    if config.head_dim % 2:
        raise InvalidArgumentError("head_dim", config.head_dim, "use an even size: rotary positions turn pairs")


def _finite(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _integer(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise InvalidArgumentError(name, value, f"use an integer of at least {least}")


def _interval(name: str, values: tuple[float, float]) -> None:
    if len(values) != 2 or not all(_finite(value) for value in values) or values[0] >= values[1]:
        raise InvalidArgumentError(name, values, "use two finite numbers, the smaller first")


# ------------------------------------------------------------------------ default sizes


PLACE_FEATURES = 21
"""Numbers that tell a network where in the text a row stands (see `network.place_features`)."""
LEAST_WIDTH = 64
SMALL_BASE = 20_000_000
"""Parameters up to which networks get more of what they read than one hundredth of the base's cost would buy."""


def default_config(
    kind: str, lm: CausalLM, rewards: Iterable[str | HeadConfig], distributional: bool = False
) -> ValueConfig:
    """Settings of about one hundredth of the base's parameters, with a floor under which nothing is learnt.

    Args:
        kind: "action", "reader", "side", "lookahead" or "side-lookahead".
        lm: the base model.
        rewards: one head each: a name, or a complete HeadConfig.
        distributional: make heads given by name distributional, 51 atoms over [-1, 1]. Rewards on another
            scale need a HeadConfig with a support (or bounds, or mean and std) of their own.

    Raises:
        InvalidArgumentError: unknown kind, or "model" (a value model is built from its own checkpoint).
    """
    if kind == "model" or kind not in KINDS:
        options = [name for name in KINDS if name != "model"]
        raise InvalidArgumentError("kind", kind, nearest(str(kind), options))
    heads = tuple(_default_head(reward, distributional) for reward in rewards)
    base = lm.num_parameters
    roomy = base <= SMALL_BASE and lm.hidden_size >= 128 and not KINDS[kind].own_kv
    config = _sized(kind, lm, heads, 2 * LEAST_WIDTH if roomy else LEAST_WIDTH)
    # Steps of 32 keep the size of an attention head whole.
    while config_parameters(wider := _sized(kind, lm, heads, config.width + 32)) <= base // 100:
        config = wider
    return config.replace(base=dict(lm.fingerprint()))


def _sized(kind: str, lm: CausalLM, heads: tuple[HeadConfig, ...], width: int) -> ValueConfig:
    preset, depth, small = KINDS[kind], lm.num_layers, lm.num_parameters <= SMALL_BASE
    shape: dict[str, Any] = {}
    if preset.reads_base:
        # The base's K/V of these layers are read once more, which is most of what a reader costs: on a large base, few.
        looks = 5 if small else 2
        layers = sorted({(index + 1) * depth // looks - 1 for index in range(looks)} - {-1})
        first = lm.layers[layers[-1]]
        layers = [
            index
            for index in layers
            if (lm.layers[index].kv_heads, lm.layers[index].head_dim) == (first.kv_heads, first.head_dim)
        ]
        queries = max(1, round(16 / first.kv_heads)) * first.kv_heads
        shape = {"layers": layers, "queries": queries, "head_dim": first.head_dim, "mlp": 2 * width}
    elif preset.own_kv:
        head_dim = 32 if width <= 256 else 64
        num_heads = -(-width // head_dim)
        # Without sharing, by fours if that comes out even, its K/V would be a tenth of a large base's.
        shared = min(n for n in range(1, num_heads + 1) if num_heads % n == 0 and 4 * n >= num_heads)
        shape = {
            "depth": 2,
            "num_heads": num_heads,
            "kv_heads": num_heads if small else shared,
            "head_dim": head_dim,
            "mlp": 4 * width,
        }
    return ValueConfig(
        kind=kind,
        heads=heads,
        hidden_size=lm.hidden_size,
        vocab_size=lm.vocab_size,
        states=tuple(sorted({max(depth // 2, 1), depth})),
        width=width,
        head_hidden=width if shape else 2 * width,
        **shape,
    )


def _default_head(reward: str | HeadConfig, distributional: bool) -> HeadConfig:
    if isinstance(reward, HeadConfig):
        return reward
    return HeadConfig(name=reward, reward=reward, support=Support(-1.0, 1.0, 51) if distributional else None)


def config_parameters(config: ValueConfig) -> int:
    """Trained numbers of a network with these settings (the per-vocabulary table made at inference is not counted)."""
    width = config.width or len(config.states) * config.hidden_size
    total = (len(config.states) * config.hidden_size + PLACE_FEATURES) * config.width if config.width else 0
    if config.input == "action":
        total += config.hidden_size * width
    attention = 2 * width * config.queries * config.head_dim * len(config.layers)
    attention += config.depth * width * config.head_dim * 2 * (config.num_heads + config.kv_heads)
    total += attention + (len(config.layers) + config.depth) * 2 * width * config.mlp
    last = config.hidden_size if config.kind == "model" else width
    if config.head_hidden:
        total += (last + 1) * config.head_hidden
        last = config.head_hidden
    return total + (last + 1) * config.outputs
