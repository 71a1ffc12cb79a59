"""Hugging Face causal LMs, loaded so that their attention goes through this package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from vas_engine.errors import InvalidArgumentError, UnsupportedModelError, VASError, nearest
from vas_engine.model.attention import IMPLEMENTATION
from vas_engine.model.ranks import check_launch, sharding

LOAD_FORMATS = ("auto", "dummy")
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float": torch.float32,
    "half": torch.float16,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
DUMMY_SEED = 0


def resolve_device(device: str | torch.device) -> torch.device:
    """ "auto" is the CUDA device where there is one, else the CPU."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError:
        raise InvalidArgumentError("device", device, "use 'auto', 'cpu', 'cuda' or 'cuda:<index>'") from None
    if found.type == "cuda" and not torch.cuda.is_available():
        raise InvalidArgumentError("device", device, "no CUDA device is visible here; use 'cpu' or 'auto'")
    return found


def resolve_dtype(dtype: str | torch.dtype, config: PretrainedConfig) -> torch.dtype:
    """ "auto" is the checkpoint's dtype, float32 when it names none."""
    if dtype == "auto":
        found = getattr(config, "dtype", None)
        dtype = str(found).removeprefix("torch.") if found is not None else "float32"
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise InvalidArgumentError("dtype", dtype, nearest(dtype, ["auto", *DTYPES]))
        return DTYPES[dtype]
    if dtype not in DTYPES.values():
        raise InvalidArgumentError("dtype", dtype, "use float32, bfloat16, float16 or 'auto'")
    return dtype


def load_model(
    model: str | Path | PreTrainedModel | PretrainedConfig,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    load_format: str = "auto",
    revision: str | None = None,
    tensor_parallel_size: int = 1,
) -> PreTrainedModel:
    """The model in eval mode, frozen, on its device; see ``CausalLM.load``."""
    check_launch(tensor_parallel_size)
    if load_format not in LOAD_FORMATS:
        raise InvalidArgumentError("load_format", load_format, nearest(load_format, LOAD_FORMATS))
    place = resolve_device(device)
    if tensor_parallel_size > 1:
        _check_shared(model, load_format, place)
    if isinstance(model, PreTrainedModel):
        loaded = _adopt(model, place, device, dtype)
    elif isinstance(model, PretrainedConfig):
        if load_format != "dummy":
            fix = "a config has no weights; pass a model, a folder or a hub name, or load_format='dummy'"
            raise InvalidArgumentError("load_format", load_format, fix)
        loaded = _random(model, place, resolve_dtype(dtype, model))
    else:
        config = _read_config(model, revision)
        kind = resolve_dtype(dtype, config)
        loaded = (
            _random(config, place, kind)
            if load_format == "dummy"
            else _read(model, config, place, kind, revision, tensor_parallel_size)
        )
    loaded.eval()
    loaded.requires_grad_(False)
    return loaded


def _adopt(
    model: PreTrainedModel, place: torch.device, device: str | torch.device, dtype: str | torch.dtype
) -> PreTrainedModel:
    if device != "auto":
        model = _move(model, place)
    if dtype != "auto":
        model = _move(model, resolve_dtype(dtype, model.config))
    try:
        model.set_attn_implementation(IMPLEMENTATION)
    except ValueError as error:
        raise UnsupportedModelError(f"{type(model).__name__}: {error}") from error
    if model.config._attn_implementation != IMPLEMENTATION:
        raise UnsupportedModelError(
            f"{type(model).__name__} does not go through transformers' AttentionInterface; use a model that does"
        )
    return model


def _move(model: Any, target: torch.device | torch.dtype) -> PreTrainedModel:
    return model.to(target)


def _read_config(model: str | Path, revision: str | None) -> PretrainedConfig:
    try:
        return AutoConfig.from_pretrained(str(model), revision=revision, trust_remote_code=False)
    except (OSError, ValueError, StrictDataclassError) as error:
        fix = f"needs a folder or hub name of a Hugging Face causal LM that transformers knows ({error})"
        raise InvalidArgumentError("model", str(model), fix) from error


def _check_shared(model: Any, load_format: str, place: torch.device) -> None:
    """Ranks that share a model read their shards from a checkpoint, each to its own accelerator."""
    if load_format != "auto" or not isinstance(model, str | Path):
        fix = "ranks read their shards from a checkpoint; give a folder or hub name with load_format='auto'"
        raise InvalidArgumentError("tensor_parallel_size", "> 1", fix)
    if place.type != resolve_device("auto").type or place.index is not None:
        fix = "each rank takes the accelerator of its number, and the CPU where there is none; use 'auto'"
        raise InvalidArgumentError("device", str(place), fix)


def _read(
    model: str | Path,
    config: PretrainedConfig,
    place: torch.device,
    dtype: torch.dtype,
    revision: str | None,
    tensor_parallel_size: int,
) -> PreTrainedModel:
    options = {"dtype": dtype, "revision": revision, **sharding(config, tensor_parallel_size)}
    try:
        loaded = read_whole(
            AutoModelForCausalLM, model, UnsupportedModelError, attn_implementation=IMPLEMENTATION, **options
        )
    except (OSError, SafetensorError) as error:
        raise InvalidArgumentError("model", str(model), f"no readable safetensors weights ({error})") from error
    except (ValueError, ImportError) as error:  # quantised ones ask for packages
        raise UnsupportedModelError(f"{model}: {error}") from error
    return loaded if tensor_parallel_size > 1 else _move(loaded, place)


def read_whole(auto: Any, model: str | Path, wrong: type[VASError], **options: Any) -> Any:
    """`auto.from_pretrained` of a checkpoint with all weights, in safetensors and without code of its own.

    transformers makes up at random what is missing, and only logs it and what has another shape.

    Raises:
        wrong: weights are missing or of other shapes; all else is transformers' own.
    """
    try:
        loaded, report = auto.from_pretrained(
            str(model), use_safetensors=True, trust_remote_code=False, output_loading_info=True, **options
        )
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        fix = "weights have other shapes than its config.json says (the log names them); download or save both again"
        raise wrong(f"{model}: {fix}") from error
    if missing := sorted(report["missing_keys"]):
        raise wrong(f"{model}: weights are missing: {', '.join(missing[:5])}; download or save the whole model")
    return loaded


def _random(config: PretrainedConfig, place: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """Random weights of the real shape, the same ones every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(DUMMY_SEED)
        try:
            loaded = AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation=IMPLEMENTATION, trust_remote_code=False
            )
        except ValueError as error:
            raise UnsupportedModelError(f"{type(config).__name__}: {error}") from error
    return _move(loaded, place)
