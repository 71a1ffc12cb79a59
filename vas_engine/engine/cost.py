"""What a decoding step must move and compute, and how long that takes at best on a given machine.

A model of floors: every byte is moved once, every product is computed once, and a part of the step takes the longer
of the two times plus what its kernels lose by starting. Activations between kernels are not counted (they stay in
cache at decoding's sizes), nor is arithmetic outside matrix products. See docs/cost-model.md for what it got right.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

from vas_engine import arguments
from vas_engine.errors import InvalidArgumentError, nearest
from vas_engine.values.config import ValueConfig, config_parameters, default_config

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of a number, by dtype."""

PARTS = ("weights", "kv", "network", "head", "sampler")
"""Parts of a step: the base model's layers, its attention, value networks, its vocabulary projection, sampling."""

# Kernels of one layer of the base model as torch.compile leaves them: norm, query-key-value, rotation, attention (which
# writes) and its merge, output, norm, gate and up, activation, down. Run one by one they are 37.
_LAYER_KERNELS, _ATTENTION_KERNELS = 8, 2
# Those of value networks, compiled with it; one by one they are 22 to 24. Before their layers: norm, states' product,
# candidates' input, places and angles (two products), the sum.
_NETWORK_INPUT_KERNELS, _NETWORK_LAYER_KERNELS = 9, 8
# Heads, tilt and winner are one kernel; rows, plan, baselines and results come to eight. A hidden layer of the heads,
# which is a product of its own: norm, type, product, activation.
_OUTPUT_KERNELS, _HIDDEN_KERNELS = 9, 4
# Embedding, angles, last norm, product; two of selection, and ten that bring a step's numbers and pack its results.
_HEAD_KERNELS, _SAMPLER_KERNELS = 5, 12
# A step with lookahead also lays out the base model's rows, and keeps its selection for the next.
_LOOKAHEAD_KERNELS = 17


# ------------------------------------------------------------------------------------------------------------
# Machines
# ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Device:
    """A machine.

    Attributes:
        name: as users call it.
        bandwidth: of its memory, bytes/s.
        flops: dtype -> rate of dense matrix products, FLOP/s.
        memory: bytes; 0 is not known.
        launch: seconds that one kernel loses by starting and ending (inside a graph).
        step: seconds of a step that the host spends and the device waits.
    """

    name: str
    bandwidth: float
    flops: Mapping[str, float]
    memory: float = 0.0
    launch: float = 1.5e-6
    step: float = 30e-6

    def __post_init__(self) -> None:
        rates = {"bandwidth": self.bandwidth, **{f"flops[{dtype}]": rate for dtype, rate in self.flops.items()}}
        for name, rate in rates.items():
            if not rate > 0:
                raise InvalidArgumentError(name, rate, "use a positive rate per second")
        for name in ("launch", "step"):
            arguments.real(name, getattr(self, name), 0.0)
        if self.memory < 0:
            raise InvalidArgumentError("memory", self.memory, "use a number that is not negative")

    def rate(self, dtype: str) -> float:
        """FLOP/s of matrix products in this dtype."""
        if dtype not in self.flops:
            raise InvalidArgumentError("dtype", dtype, f"{self.name}: {nearest(dtype, self.flops)}")
        return self.flops[dtype]


def _datasheet(name: str, bandwidth: float, half: float, single: float, memory: float) -> Device:
    return Device(name, bandwidth, {"bfloat16": half, "float16": half, "float32": single}, memory)


DEVICES = {
    device.name: device
    for device in (
        _datasheet("A100", 2.039e12, 312e12, 19.5e12, 80e9),
        _datasheet("L40S", 0.864e12, 362e12, 91.6e12, 48e9),
        _datasheet("H100", 3.35e12, 989e12, 67e12, 80e9),
        _datasheet("H200", 4.8e12, 989e12, 67e12, 141e9),
        _datasheet("B200", 8.0e12, 2250e12, 75e12, 180e9),
        _datasheet("MI300X", 5.3e12, 1307e12, 163.4e12, 192e9),
    )
}
"""Rates and memory of the makers' datasheets (SXM or OAM boards, dense products, float32 without TF32); `launch` and
`step` are this module's assumptions. Measured rates are lower: put in what a machine was measured to do."""


def device(name: str, **changes: float | Mapping[str, float] | None) -> Device:
    """A device by name, letters' case aside, with fields replaced where a change is not None."""
    known = {key.lower(): found for key, found in DEVICES.items()}
    if name.lower() not in known:
        raise InvalidArgumentError("gpu", name, nearest(name, DEVICES))
    given = {key: change for key, change in changes.items() if change is not None}
    return dataclasses.replace(known[name.lower()], **cast(Any, given))


# ------------------------------------------------------------------------------------------------------------
# Models
# ------------------------------------------------------------------------------------------------------------

# Numbers a layer holds beside its matrices, by model type: norms of the stream, norms of a head, biases of q, k, v.
_FAMILIES = {
    "llama": (2, 0, False),
    "mistral": (2, 0, False),
    "gemma": (2, 0, False),
    "gemma2": (4, 0, False),
    "gemma3_text": (4, 2, False),
    "qwen2": (2, 0, True),
    "qwen3": (2, 2, False),
}


@dataclass(frozen=True)
class Shape:
    """Sizes of a causal LM of the Llama family: grouped-query attention, gated MLP, no bias but q, k, v's.

    Attributes:
        layers, hidden, heads, kv_heads, head_dim, mlp, vocab: as in its config.
        tied: one matrix is embedding and vocabulary projection.
        dtype: of weights and K/V, a key of `BYTES`.
        norms, head_norms: norms of a layer over the hidden size, and over a head.
        qkv_bias: whether queries, keys and values have biases.
        window, windowed: tokens that `windowed` of the layers see; 0 is no limit.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocab: int
    tied: bool = False
    dtype: str = "bfloat16"
    norms: int = 2
    head_norms: int = 0
    qkv_bias: bool = False
    window: int = 0
    windowed: int = 0

    def __post_init__(self) -> None:
        for name in ("layers", "hidden", "heads", "kv_heads", "head_dim", "mlp", "vocab"):
            arguments.integer(name, getattr(self, name), 1)
        if self.dtype not in BYTES:
            raise InvalidArgumentError("dtype", self.dtype, nearest(self.dtype, BYTES))

    @classmethod
    def of(cls, model: Any, dtype: str | None = None) -> Shape:
        """From a Hugging Face config, or from a model: a CausalLM, or transformers' own.

        Args:
            dtype: in place of the model's, or the config's (float32 where it names none).

        Raises:
            InvalidArgumentError: a family whose parameters this module does not know how to count.
        """
        config = getattr(model, "config", model)
        config = getattr(config, "get_text_config", lambda: config)()
        own = getattr(model if hasattr(model, "config") else config, "dtype", None)
        kind = getattr(config, "model_type", None)
        if kind not in _FAMILIES:
            known = ", ".join(_FAMILIES)
            raise InvalidArgumentError("model_type", kind, f"the cost model knows {known}; give a shape of these")
        norms, head_norms, qkv_bias = _FAMILIES[kind]
        for name in ("attention_bias", "mlp_bias"):
            if getattr(config, name, False):
                raise InvalidArgumentError(name, True, "the cost model counts no such biases")
        window = getattr(config, "sliding_window", None) or 0
        kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
        return cls(
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            heads=config.num_attention_heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            mlp=config.intermediate_size,
            vocab=config.vocab_size,
            tied=bool(config.tie_word_embeddings),
            dtype=dtype or str(own or "float32").removeprefix("torch."),
            norms=norms,
            head_norms=head_norms,
            qkv_bias=qkv_bias,
            window=window,
            windowed=sum(layer == "sliding_attention" for layer in kinds) if window else 0,
        )

    @property
    def size(self) -> int:
        """Bytes of a number."""
        return BYTES[self.dtype]

    @property
    def layer_matrices(self) -> int:
        """Numbers of one layer's matrices."""
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        return attention + 3 * self.hidden * self.mlp

    @property
    def layer_vectors(self) -> int:
        """Numbers of one layer's norms and biases."""
        biases = self.head_dim * (self.heads + 2 * self.kv_heads) if self.qkv_bias else 0
        return self.norms * self.hidden + self.head_norms * self.head_dim + biases

    @property
    def stack(self) -> int:
        """Numbers that every step reads whatever its rows: all layers and the final norm."""
        return self.layers * (self.layer_matrices + self.layer_vectors) + self.hidden

    @property
    def embedding(self) -> int:
        """Numbers of the embedding, and of the vocabulary projection."""
        return self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        """All numbers of the model, a tied matrix once."""
        return self.stack + self.embedding * (1 if self.tied else 2)

    @property
    def kv_width(self) -> int:
        """Numbers of keys and values that one token leaves in one layer."""
        return 2 * self.kv_heads * self.head_dim

    @property
    def kv_bytes(self) -> int:
        """Bytes of K/V that one token leaves in all layers."""
        return self.layers * self.kv_width * self.size

    def seen(self, context: float) -> float:
        """Tokens that all layers together read of one prefix."""
        near = min(context, self.window) if self.windowed else 0.0
        return (self.layers - self.windowed) * context + self.windowed * near


SHAPES = {
    "llama-135m": Shape(30, 576, 9, 3, 64, 1536, 49152, tied=True),
    "llama-1b": Shape(16, 2048, 32, 8, 64, 8192, 128256, tied=True),
    "llama-1.1b": Shape(22, 2048, 32, 4, 64, 5632, 32000),
    "llama-3b": Shape(28, 3072, 24, 8, 128, 8192, 128256, tied=True),
    "llama-8b": Shape(32, 4096, 32, 8, 128, 14336, 128256),
    "llama-70b": Shape(80, 8192, 64, 8, 128, 28672, 128256),
}
"""Shapes that go by a name."""


def network_config(shape: Shape, kind: str) -> ValueConfig:
    """The network of one scalar head, about one hundredth of the base, that `vas train --kind` would make.

    Args:
        kind: "action", "reader", "side", "lookahead" or "side-lookahead".
    """
    layer = SimpleNamespace(kv_heads=shape.kv_heads, head_dim=shape.head_dim)
    base = SimpleNamespace(
        num_parameters=shape.parameters,
        hidden_size=shape.hidden,
        num_layers=shape.layers,
        vocab_size=shape.vocab,
        layers=[layer] * shape.layers,
        fingerprint=dict,
    )
    return default_config(kind, cast(Any, base), ["value"])


@dataclass(frozen=True)
class Network:
    """A value network.

    Attributes:
        config: its sizes; any kind.
        backbone: the LM of a value model (kind "model"), without its vocabulary projection.
    """

    config: ValueConfig
    backbone: Shape | None = None

    def __post_init__(self) -> None:
        if (self.config.kind == "model") != (self.backbone is not None):
            raise InvalidArgumentError("backbone", self.backbone, "a value model has one, other kinds have none")

    @property
    def lookahead(self) -> bool:
        """Whether it reads the base model's states of every candidate."""
        return self.config.input == "lookahead"

    @property
    def parameters(self) -> int:
        """Numbers it was trained with."""
        backbone = self.backbone.stack + self.backbone.embedding if self.backbone else 0
        return config_parameters(self.config) + backbone

    def kv_bytes(self, base: Shape) -> int:
        """Bytes that one token leaves in its own pages."""
        if self.backbone:
            return self.backbone.kv_bytes
        return 2 * self.config.depth * self.config.kv_heads * self.config.head_dim * base.size


# ------------------------------------------------------------------------------------------------------------
# A step
# ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """Something a step does in one go.

    Attributes:
        part: of `PARTS`.
        bytes: moved to or from memory.
        flops: of matrix products.
        kernels: launched for it.
        dtype: of the products.
    """

    part: str
    bytes: float
    flops: float
    kernels: int
    dtype: str

    def seconds(self, device: Device) -> float:
        """The longer of moving and computing, and what starting costs."""
        return max(self.bytes / device.bandwidth, self.flops / device.rate(self.dtype)) + self.kernels * device.launch


def step_work(
    shape: Shape,
    batch: int,
    context: float,
    networks: Sequence[Network] = (),
    candidates: int = 20,
    prefill: int = 0,
) -> list[Work]:
    """What one step does that gives each request a token.

    A guided request has a row for each candidate and one for the best of the other tokens, which may win too.

    Args:
        shape: the base model.
        batch: requests.
        context: tokens of a request's prefix, on average.
        networks: all score all candidates; none is plain decoding.
        candidates: of a guided request.
        prefill: tokens of a new prompt that the step takes in besides.
    """
    for name, number, least in (("batch", batch, 1), ("candidates", candidates, 1), ("prefill", prefill, 0)):
        arguments.integer(name, number, least)
    arguments.real("context", context, 0.0)
    scored = batch * (candidates + 1)
    lookahead = any(network.lookahead for network in networks)
    decoded = scored if lookahead else batch
    works = list(_stack(shape, "weights", "kv", batch, decoded, context, prefill, committed=batch if lookahead else 0))
    size, dtype = shape.size, shape.dtype
    for network in networks:
        works += _network(shape, network, batch, scored, context, prefill)
    logits = batch * shape.vocab * size
    works.append(Work("head", shape.embedding * size + logits, 2 * batch * shape.embedding, _HEAD_KERNELS, dtype))
    kernels = _SAMPLER_KERNELS + (_LOOKAHEAD_KERNELS if lookahead else 0)
    works.append(Work("sampler", logits, 0, kernels, dtype))
    return works


def _stack(
    shape: Shape, weights: str, kv: str, batch: int, decoded: int, context: float, prefill: int, committed: int
) -> Iterable[Work]:
    """Layers of a transformer over `decoded` rows of `batch` requests; `committed` rows of K/V are copied later."""
    size, rows = shape.size, decoded + prefill
    matrices = shape.layers * shape.layer_matrices
    read = (shape.stack + rows * shape.hidden) * size
    yield Work(weights, read, 2 * rows * matrices, shape.layers * _LAYER_KERNELS, shape.dtype)
    # A request's rows share one read of its prefix; what they leave is written, and copied where it waits in scratch.
    moved = (batch * shape.seen(context) + shape.layers * (rows + 2 * committed)) * shape.kv_width * size
    pairs = decoded * (shape.seen(context) + shape.layers) + prefill * shape.seen(prefill / 2)
    flops = 4 * shape.heads * shape.head_dim * pairs
    # A graph commits the layers one by one.
    kernels = shape.layers * (_ATTENTION_KERNELS + bool(committed))
    yield Work(kv, moved + prefill * shape.kv_bytes, flops, kernels, shape.dtype)


def _network(shape: Shape, network: Network, batch: int, scored: int, context: float, prefill: int) -> Iterable[Work]:
    """One value network over the scored rows; networks with K/V of their own take in prompts too."""
    config, size, dtype = network.config, shape.size, shape.dtype
    if network.backbone:
        backbone = network.backbone
        yield from _stack(backbone, "network", "network", batch, scored, context, prefill, committed=batch)
        yield _value_head(config, backbone.hidden, scored, backbone.size, backbone.dtype)
        return
    width = config.width or len(config.states) * config.hidden_size
    rows = scored + (prefill if config.depth else 0)
    states = rows if network.lookahead else batch + (prefill if config.depth else 0)
    features = len(config.states) * config.hidden_size
    # Candidates' embeddings come projected from a table, float32.
    looked_up = 0 if network.lookahead else rows * width * 4
    projection = features * config.width
    moved = (projection + states * features) * size + looked_up
    yield Work("network", moved, 2 * states * projection, _NETWORK_INPUT_KERNELS, dtype)
    for looks, heads, kv_heads, own in (
        (len(config.layers), config.queries, shape.kv_heads, False),
        (config.depth, config.num_heads, config.kv_heads, True),
    ):
        if not looks:
            continue
        attention = width * config.head_dim * (2 * heads + (2 * kv_heads if own else 0))
        matrices = looks * (attention + 2 * width * config.mlp)
        yield Work("network", matrices * size, 2 * rows * matrices, looks * _NETWORK_LAYER_KERNELS, dtype)
        kv_width = 2 * kv_heads * config.head_dim
        # A reader looks at whole layers of the base; the share that is windowed is spread evenly over them.
        seen = looks * (context if own else shape.seen(context) / shape.layers)
        written = looks * (rows + 2 * batch) if own else 0
        pairs = scored * seen + (prefill * looks * prefill / 2 if own else 0)
        flops = 4 * heads * config.head_dim * pairs
        kernels = looks * (_ATTENTION_KERNELS + own)
        yield Work("network", (batch * seen + written) * kv_width * size, flops, kernels, dtype)
    yield _value_head(config, width, scored, size, dtype)


def _value_head(config: ValueConfig, features: int, rows: int, size: int, dtype: str) -> Work:
    """Hidden layer, outputs, tilt and winner."""
    matrices = (features + config.outputs) * config.head_hidden if config.head_hidden else features * config.outputs
    kernels = _OUTPUT_KERNELS + (_HIDDEN_KERNELS if config.head_hidden else 0)
    return Work("network", matrices * size + rows * config.outputs * 4, 2 * rows * matrices, kernels, dtype)


# ------------------------------------------------------------------------------------------------------------
# A prediction
# ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """A part of a step: bytes moved, FLOPs of matrix products, seconds."""

    bytes: float
    flops: float
    seconds: float


@dataclass(frozen=True)
class Prediction:
    """One setting on one machine.

    Attributes:
        parts: by name, of `PARTS`.
        rows: of the base model's forward.
        seconds: of a step, the device's waiting for the host included.
        tokens_per_second: of all requests together.
        ratio: tokens per second over those of plain decoding, same machine, batch, context and prefill.
        knee: rows of the base model's forward at which its weights take as long to multiply as to read.
        memory: bytes of weights and of all K/V. fits: whether the machine has them (True where it is not known).
    """

    parts: dict[str, Part]
    rows: int
    seconds: float
    tokens_per_second: float
    ratio: float
    knee: float
    memory: float
    fits: bool


def predict(
    shape: Shape,
    device: Device,
    batch: int,
    context: float,
    networks: Sequence[Network] = (),
    candidates: int = 20,
    prefill: int = 0,
) -> Prediction:
    """A step's floor on a machine; arguments are those of `step_work`."""
    works = step_work(shape, batch, context, networks, candidates, prefill)
    parts = {}
    for name in PARTS:
        own = [work for work in works if work.part == name]
        seconds = sum(work.seconds(device) for work in own)
        parts[name] = Part(sum(work.bytes for work in own), sum(work.flops for work in own), seconds)
    seconds = device.step + sum(part.seconds for part in parts.values())
    plain = step_work(shape, batch, context, prefill=prefill) if networks else works
    plain_seconds = device.step + sum(work.seconds(device) for work in plain)
    lookahead = any(network.lookahead for network in networks)
    weights = sum(network.parameters * (network.backbone or shape).size for network in networks)
    kv = shape.kv_bytes + sum(network.kv_bytes(shape) for network in networks)
    memory = shape.parameters * shape.size + weights + (batch * context + prefill) * kv
    return Prediction(
        parts=parts,
        rows=batch * (candidates + 1 if lookahead else 1) + prefill,
        seconds=seconds,
        tokens_per_second=batch / seconds,
        ratio=plain_seconds / seconds,
        knee=knee(shape, device),
        memory=memory,
        fits=not device.memory or memory <= device.memory,
    )


def knee(shape: Shape, device: Device) -> float:
    """Rows at which the base model's layers turn from waiting for memory to waiting for arithmetic."""
    per_row = 2 * shape.layers * shape.layer_matrices / device.rate(shape.dtype)
    return shape.stack * shape.size / device.bandwidth / per_row
