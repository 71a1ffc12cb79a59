"""Who is measured: this engine with each kind of value network, and other ways to decode the same model."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, LogitsProcessorList
from transformers.utils import logging

from benchmarks.peers import (
    AllAtOnceValueProcessor,
    OneAtATimeValueProcessor,
    SharedCacheValueProcessor,
    ValueProcessor,
)
from vas_engine.engine.cost import SHAPES, Shape
from vas_engine.integrations.transformers import ValueLogitsProcessor, load_values, vas_generate
from vas_engine.integrations.value_models import Host, load_value_model
from vas_engine.llm import LLM
from vas_engine.model.lm import CausalLM
from vas_engine.params import SamplingParams
from vas_engine.values import ValueModel, ValueNetwork, default_config, save_value

KINDS = ("action", "reader", "side", "lookahead", "model")
"""Kinds of value network measured."""

COMPILED = {
    "vas-compiled": None,
    "vas-compiled-reader": "reader",
    "vas-compiled-side": "side",
    "vas-compiled-model": "model",
}
"""This engine, base model and values compiled (`enforce_eager=False`), which takes most of a minute each to start."""

PEERS: dict[str, type[ValueProcessor]] = {
    "hf-one-at-a-time": OneAtATimeValueProcessor,
    "hf-all-at-once": AllAtOnceValueProcessor,
    "hf-shared-cache": SharedCacheValueProcessor,
}

VLLMS = {"vllm-plain": None, "vllm-model": "model", "vllm-action": "last"}
"""vLLM, each with the kind of value that guides it through this package's plugin; "last" is an action head on the last
hidden state alone, which is all that vLLM shows."""

OURS_IN_THEIRS = ("hf-vas-generate", "hf-vas-processor")
"""This package inside ``generate`` of transformers, guided by the value model."""

# Logits of a fresh model are almost equal. With its final norm scaled by this their standard deviation is
# about 5 and the 20 most probable tokens hold most of the probability, as in a trained model: what is drawn
# is mostly a candidate, whose K/V the peers have computed already.
LOGIT_SCALE = 10.0


def llama_config(shape: Shape, positions: int) -> LlamaConfig:
    """A shape as a configuration of transformers."""
    return LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        intermediate_size=shape.mlp,
        max_position_embeddings=positions,
        tie_word_embeddings=shape.tied,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )


@dataclass(frozen=True)
class Setting:
    """A base model and a value model to measure with."""

    base: Shape
    value: Shape


SETTINGS = {
    # 134.5 and 14.7 million parameters.
    "135m": Setting(SHAPES["llama-135m"], Shape(8, 192, 3, 3, 64, 896, 49152, tied=True)),
    "tiny": Setting(Shape(4, 64, 2, 1, 32, 128, 2048, tied=True), Shape(2, 32, 2, 2, 16, 64, 2048, tied=True)),
}
POSITIONS = 2048


@dataclass(frozen=True)
class Decoding:
    """How tokens are drawn, the same for all.

    Attributes:
        new_tokens: of every prompt; EOS is ignored.
        num_candidates: tokens that a guided step scores.
        temperature: of the whole vocabulary, without cuts; 0 takes the best token.
        weight: strength of the tilt.
    """

    new_tokens: int = 64
    num_candidates: int = 20
    temperature: float = 1.0
    weight: float = 1.0


Guide = Callable[[torch.Tensor, Decoding], dict[str, Any]]


class Contender(Protocol):
    """One way to decode."""

    name: str

    def run(self, prompts: list[list[int]], decoding: Decoding, seed: int) -> tuple[float, int]:
        """Seconds taken and tokens generated, over all prompts as one batch."""

    def close(self) -> None:
        """Lets go of processes."""


class Assets:
    """Random weights on disk, so that all contenders load the very same models.

    Args:
        folder: an empty folder; takes about 0.4 GB for the larger setting.
        setting: sizes.
        dtype: of all weights.
    """

    def __init__(self, folder: Path, setting: Setting, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> None:
        self.setting, self.dtype = setting, dtype
        self.base, self.backbone = folder / "base", folder / "backbone"
        self.values = folder / "values"
        torch.manual_seed(seed)
        base: Any = LlamaForCausalLM(llama_config(setting.base, POSITIONS))
        base.model.norm.weight.data.mul_(LOGIT_SCALE)
        backbone: Any = LlamaForCausalLM(llama_config(setting.value, POSITIONS))
        for model, place in ((base, self.base), (backbone, self.backbone)):
            model.to(dtype).save_pretrained(place)

    def value(self, kind: str) -> Path:
        """Folder of an untrained value of this kind, about 1 % of the base except for kind "model"."""
        folder = self.values / kind
        if not folder.exists():
            lm = CausalLM.load(self.base, device="cpu")
            if kind == "model":
                network: Any = ValueModel.create(self.backbone, lm, ["reward"])
            elif kind == "last":
                config = default_config("action", lm, ["reward"]).replace(states=(lm.num_layers,))
                network = ValueNetwork(config).bind(lm)
            else:
                network = ValueNetwork(default_config(kind, lm, ["reward"])).bind(lm)
            save_value(folder, network)
        return folder


class Engine:
    """This engine, plain or guided by one kind of network.

    Args:
        assets: the models.
        kind: of value network; None is plain decoding.
        max_num_seqs: the largest batch.
        compiled: the name to go by, when the base model is to be compiled.
    """

    def __init__(
        self, assets: Assets, kind: str | None, max_num_seqs: int, max_model_len: int, compiled: str | None = None
    ) -> None:
        self.name = compiled or (f"vas-{kind}" if kind else "vas-plain")
        self.guided = kind is not None
        self.llm = LLM(
            str(assets.base),
            values={"reward": str(assets.value(kind))} if kind else None,
            skip_tokenizer_init=True,
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            kv_cache_memory="512MiB",
            enforce_eager=compiled is None,
        )

    def run(self, prompts: list[list[int]], decoding: Decoding, seed: int) -> tuple[float, int]:
        params = [
            SamplingParams(
                max_tokens=decoding.new_tokens,
                temperature=decoding.temperature,
                ignore_eos=True,
                seed=seed + index,
                values={"reward": decoding.weight} if self.guided else None,
                num_candidates=decoding.num_candidates,
            )
            for index in range(len(prompts))
        ]
        start = time.perf_counter()
        outputs = self.llm.generate(prompts, params, use_tqdm=False)
        return time.perf_counter() - start, sum(len(out.outputs[0].token_ids) for out in outputs)

    def close(self) -> None:
        del self.llm


class HuggingFace:
    """``generate`` of transformers, plain or guided.

    Args:
        model: the base model, of transformers; may be shared.
        guide: arguments of one call from the prompts' attention mask and the settings; None is plain decoding.
    """

    def __init__(self, name: str, model: Any, guide: Guide | None = None) -> None:
        self.name, self.model, self.guide = name, model, guide

    def run(self, prompts: list[list[int]], decoding: Decoding, seed: int) -> tuple[float, int]:
        ids = torch.tensor(prompts)
        mask = torch.ones_like(ids)
        options: dict[str, Any] = {"do_sample": False}
        if decoding.temperature:
            options = {"do_sample": True, "temperature": decoding.temperature, "top_k": 0, "top_p": 1.0}
        torch.manual_seed(seed)
        start = time.perf_counter()
        if self.guide is not None:
            options |= self.guide(mask, decoding)
        output = self.model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=decoding.new_tokens,
            eos_token_id=None,
            pad_token_id=0,
            **options,
        )
        return time.perf_counter() - start, output[:, ids.shape[1] :].numel()

    def close(self) -> None:
        del self.model, self.guide


class VLLM:
    """vLLM in another interpreter that has it installed, plain or guided by this package's plugin.

    Args:
        kind: of value; None is plain decoding.

    Raises:
        RuntimeError: it did not start; its own words are on stderr.
    """

    def __init__(
        self, name: str, kind: str | None, python: str, assets: Assets, max_num_seqs: int, max_model_len: int, log: Path
    ) -> None:
        self.name, self.guided = name, kind is not None
        worker = Path(__file__).with_name("vllm_worker.py")
        command = [python, str(worker), str(assets.base), str(max_model_len), str(max_num_seqs)]
        command += [str(assets.value(kind))] if kind else []
        with log.open("w") as stream:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stream, text=True
            )
        self.log = log
        self.versions: dict[str, str] = self._answer()["versions"]

    def run(self, prompts: list[list[int]], decoding: Decoding, seed: int) -> tuple[float, int]:
        request = {
            "prompts": prompts,
            "new_tokens": decoding.new_tokens,
            "temperature": decoding.temperature,
            "seed": seed,
            "extra_args": None,
        }
        if self.guided:
            request["extra_args"] = {
                "vas_weights": {"reward": decoding.weight},
                "vas_candidates": decoding.num_candidates,
                "vas_baseline": "candidate-mean",  # V(s) is not known to an action head there
            }
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = self._answer()
        return answer["seconds"], answer["tokens"]

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            tail = "\n".join(self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
            raise RuntimeError(f"vLLM ended (exit status {self.process.wait()}); its last words:\n{tail}")
        return json.loads(line)


def names(vllm: bool = False) -> list[str]:
    """All contenders, in the order of the table."""
    own = ["vas-plain", *(f"vas-{kind}" for kind in KINDS)]
    return [*own, *COMPILED, "hf-plain", *OURS_IN_THEIRS, *PEERS, *(VLLMS if vllm else [])]


def builders(
    assets: Assets, max_num_seqs: int, max_model_len: int, vllm_python: str | None, log: Path
) -> dict[str, Callable[[], Contender]]:
    """A function for each contender that loads it. Those of Hugging Face share one base model."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    shared: dict[str, Any] = {}

    def once(key: str, make: Callable[[], Any]) -> Any:
        if key not in shared:
            shared[key] = make()
        return shared[key]

    def base() -> Any:
        return once("base", lambda: AutoModelForCausalLM.from_pretrained(assets.base, dtype=assets.dtype).eval())

    def peer(form: type[ValueProcessor]) -> Guide:
        backbone = once("backbone", lambda: AutoModel.from_pretrained(assets.backbone, dtype=assets.dtype).eval())
        head = once("head", lambda: nn.Linear(assets.setting.value.hidden, 1))

        def guide(mask: torch.Tensor, decoding: Decoding) -> dict[str, Any]:
            processor = form(backbone, head, mask, weight=decoding.weight, num_candidates=decoding.num_candidates)
            return {"logits_processor": LogitsProcessorList([processor])}

        return guide

    def own_generate(mask: torch.Tensor, decoding: Decoding) -> dict[str, Any]:
        weights = {"reward": decoding.weight}
        return {"custom_generate": vas_generate, "values": weights, "num_candidates": decoding.num_candidates}

    def own_processor(mask: torch.Tensor, decoding: Decoding) -> dict[str, Any]:
        weights = {"reward": decoding.weight}
        processor = ValueLogitsProcessor(base(), value(), weights, mask, num_candidates=decoding.num_candidates)
        return {"logits_processor": LogitsProcessorList([processor])}

    def value() -> dict[str, Any]:
        host = Host(assets.setting.base.vocab, assets.dtype)
        return once("value", lambda: {"reward": load_value_model(assets.value("model"), host)})

    def own(name: str) -> HuggingFace:
        # Loads what each of them needs before the first run.
        if name == "hf-vas-processor":
            value()
            return HuggingFace(name, base(), own_processor)
        return HuggingFace(name, load_values(base(), {"reward": str(assets.value("model"))}), own_generate)

    def published(name: str, form: type[ValueProcessor]) -> HuggingFace:
        return HuggingFace(name, base(), peer(form))

    found: dict[str, Callable[[], Contender]] = {}
    for kind in (None, *KINDS):
        name = f"vas-{kind}" if kind else "vas-plain"
        found[name] = partial(Engine, assets, kind, max_num_seqs, max_model_len)
    for name, compiled_kind in COMPILED.items():
        found[name] = partial(Engine, assets, compiled_kind, max_num_seqs, max_model_len, name)
    found["hf-plain"] = lambda: HuggingFace("hf-plain", base())
    for name in OURS_IN_THEIRS:
        found[name] = partial(own, name)
    for name, form in PEERS.items():
        found[name] = partial(published, name, form)
    if vllm_python:
        for name, kind in VLLMS.items():
            words = log.with_suffix(f".{name}.log")
            found[name] = partial(VLLM, name, kind, vllm_python, assets, max_num_seqs, max_model_len, words)
    return found
