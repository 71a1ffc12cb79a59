"""`vas info`: versions, devices, extras, and what a model or a value is."""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vas_engine import __version__
from vas_engine.commands.options import add_model_options, load_llm, read_values
from vas_engine.errors import InvalidArgumentError

_PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy")
_EXTRAS = {
    "train": ("pyarrow", "vaderSentiment", "peft"),
    "plot": ("matplotlib", "plotext"),
    "serve": ("fastapi", "uvicorn", "prometheus_client", "yaml"),
    "otel": ("opentelemetry",),
    "remote": ("httpx",),
    "vllm": ("vllm",),
    "ray": ("ray",),
    "lm-eval": ("lm_eval",),
    "trl": ("trl",),
    "gpu": ("triton",),
}
_EPILOG = """\
examples:
  vas info
  vas info path/to/model
  vas info path/to/model --value kind=path/to/value
  vas info --value path/to/value --json
"""


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "info",
        help="versions, devices, and what a model or value is",
        description="Says what is installed and in use, and describes a model, a value, or whether they fit.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", nargs="?", metavar="MODEL", help="folder or hub name of a causal LM")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    add_model_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    report: dict[str, Any] = {"installation": describe_installation()}
    values = read_values(args.value) or {}
    folders = {"": values} if isinstance(values, str) else values
    if args.model:
        _check_model(args.model)
        # Loading checks that the values fit: another model's is an error.
        llm = load_llm(args)
        report["model"] = describe_model(llm)
        # Checkpoints of other projects say little of themselves until they are loaded.
        found = {name: value.config.to_dict() for name, value in llm.values.items()}
    else:
        found = {name: describe_value(folder) for name, folder in folders.items()}
    if found:
        report["values"] = {name or Path(folders[name]).name: told for name, told in found.items()}
    print(json.dumps(report, indent=2, default=str) if args.json else _as_text(report))


def _check_model(model: str) -> None:
    """A value's folder has a config.json too, of which a loader of models says only that it knows no such type."""
    try:
        found = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return  # a name of the hub, or what loading will say
    if isinstance(found, dict) and "format_version" in found:
        raise InvalidArgumentError("model", model, f"is a value; write vas info --value {model}")


def describe_installation() -> dict[str, Any]:
    """What runs here: versions, devices, threads, what was built, which extras are there."""
    import torch

    from vas_engine.kernels import has_triton
    from vas_engine.model import flash
    from vas_engine.model.backend import has_extension
    from vas_engine.sampling import backend_name

    devices = ["cpu"]
    if torch.cuda.is_available():
        devices += [f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
    return {
        "vas_engine": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        **{name: _version(name) for name in _PACKAGES},
        "devices": devices,
        "cpus": os.cpu_count(),
        "torch threads": torch.get_num_threads(),
        "sampler": backend_name(),
        "attention on CPU": "cpp" if has_extension() else "reference",
        "attention on GPU": _gpu_attention(has_triton(), flash.installed(_capability())),
        "extras": {
            **{name: all(find_spec(m) for m in modules) for name, modules in _EXTRAS.items()},
            **{name: _version(name) is not None for name in flash.PACKAGES},
        },
    }


def _capability() -> tuple[int, int] | None:
    import torch

    return torch.cuda.get_device_capability() if torch.cuda.is_available() else None


def _gpu_attention(triton: bool, flash: str | None) -> str:
    """What attention_backend="auto" takes on a GPU in bfloat16."""
    if not triton:
        return "reference"
    kernels = f"triton {_version('triton')}"
    return f"{kernels}, {flash} for prompts" if flash else kernels


def describe_model(llm: Any) -> dict[str, Any]:
    """A loaded LLM: shape, cache, fingerprint, what its attention uses and its tokenizer can do."""
    from vas_engine.engine.engine import Engine

    lm, tokenizer = llm.lm, llm.tokenizer
    per_token = Engine.bytes_per_block(lm, llm.values, 1)
    return {
        "architecture": type(lm.model).__name__,
        "parameters": lm.num_parameters,
        "layers": lm.num_layers,
        "hidden size": lm.hidden_size,
        "heads": sorted({layer.num_heads for layer in lm.layers}),
        "kv heads": sorted({layer.kv_heads for layer in lm.layers}),
        "head size": sorted({layer.head_dim for layer in lm.layers}),
        "vocabulary": lm.vocab_size,
        "longest sequence": lm.max_model_len,
        "sliding windows": sorted({layer.window for layer in lm.layers if layer.window}),
        "softcap": sorted({layer.softcap for layer in lm.layers if layer.softcap}),
        "dtype": str(lm.dtype).removeprefix("torch."),
        "device": str(lm.device),
        "attention backend": lm.attention_backend,
        "kv bytes per token": per_token,
        "kv cache tokens": llm.engine.blocks.num_blocks * llm.engine.block_size,
        "end of sequence": sorted(lm.eos_token_ids),
        "tokenizer": None if tokenizer is None else type(tokenizer).__name__,
        "chat template": bool(getattr(tokenizer, "chat_template", None)),
        "values": llm.value_names,
        "fingerprint": lm.fingerprint(tokenizer),
    }


def describe_value(folder: str) -> dict[str, Any]:
    """A value's settings as they were saved."""
    from vas_engine.values.artifact import read_config

    return read_config(folder).to_dict()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _as_text(report: Mapping[str, Any], indent: str = "") -> str:
    lines = []
    for name, value in report.items():
        if isinstance(value, Mapping):
            lines.append(f"{indent}{name}")
            lines.append(_as_text(value, indent + "  "))
        else:
            lines.append(f"{indent}{name}: {_plain(value)}")
    return "\n".join(lines)


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, int):
        return f"{value:,}"
    return "none" if value is None else str(value)
