"""Who is measured: this engine with each kind of value network, and other ways to decode the same model."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
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
"""This engine with its base model compiled (`enforce_eager=False`), which takes most of a minute each to start."""

PEERS: dict[str, type[ValueProcessor]] = {
    "hf-one-at-a-time": OneAtATimeValueProcessor,
    "hf-all-at-once": AllAtOnceValueProcessor,
    "hf-shared-cache": SharedCacheValueProcessor,
}

# Logits of a fresh model are almost equal. With its final norm scaled by this their standard deviation is
# about 5 and the 20 most probable tokens hold most of the probability, as in a trained model: what is drawn
# is mostly a candidate, whose K/V the peers have computed already.
LOGIT_SCALE = 10.0


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama with tied embeddings."""

    vocab_size: int
    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    intermediate_size: int

    def config(self) -> LlamaConfig:
        """As a configuration of transformers."""
        return LlamaConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.hidden_size // self.heads,
            intermediate_size=self.intermediate_size,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
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
    "135m": Setting(Shape(49152, 576, 30, 9, 3, 1536), Shape(49152, 192, 8, 3, 3, 896)),
    "tiny": Setting(Shape(2048, 64, 4, 4, 2, 128), Shape(2048, 32, 2, 2, 2, 64)),
}


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
        base = LlamaForCausalLM(setting.base.config())
        base.model.norm.weight.data.mul_(LOGIT_SCALE)
        base.to(dtype).save_pretrained(self.base)
        LlamaForCausalLM(setting.value.config()).to(dtype).save_pretrained(self.backbone)

    def value(self, kind: str) -> Path:
        """Folder of an untrained value of this kind, about 1 % of the base except for kind "model"."""
        folder = self.values / kind
        if not folder.exists():
            lm = CausalLM.load(self.base, device="cpu")
            if kind == "model":
                network: Any = ValueModel.create(self.backbone, lm, ["reward"])
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
    """``generate`` of transformers, plain or with one of the peers' processors.

    Args:
        model: the base model; may be shared.
        form: the processor; None is plain decoding.
        backbone, head: of the value model.
    """

    def __init__(
        self,
        name: str,
        model: LlamaForCausalLM,
        form: type[ValueProcessor] | None = None,
        backbone: Any = None,
        head: nn.Module | None = None,
    ) -> None:
        self.name, self.model, self.form = name, model, form
        self.backbone, self.head = backbone, head

    def run(self, prompts: list[list[int]], decoding: Decoding, seed: int) -> tuple[float, int]:
        ids = torch.tensor(prompts)
        mask = torch.ones_like(ids)
        options: dict[str, Any] = {"do_sample": False}
        if decoding.temperature:
            options = {"do_sample": True, "temperature": decoding.temperature, "top_k": 0, "top_p": 1.0}
        torch.manual_seed(seed)
        start = time.perf_counter()
        processors = LogitsProcessorList()
        if self.form is not None:
            settings = {"weight": decoding.weight, "num_candidates": decoding.num_candidates}
            processors.append(self.form(self.backbone, self.head, mask, **settings))
        output = self.model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=decoding.new_tokens,
            eos_token_id=None,
            pad_token_id=0,
            logits_processor=processors,
            **options,
        )
        return time.perf_counter() - start, output[:, ids.shape[1] :].numel()

    def close(self) -> None:
        del self.model, self.backbone


class VLLM:
    """vLLM, plain, in another interpreter that has it installed.

    Raises:
        RuntimeError: it did not start; its own words are on stderr.
    """

    name = "vllm-plain"

    def __init__(self, python: str, assets: Assets, max_num_seqs: int, max_model_len: int, log: Path) -> None:
        worker = Path(__file__).with_name("vllm_worker.py")
        command = [python, str(worker), str(assets.base), str(max_model_len), str(max_num_seqs)]
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
    return [*own, *COMPILED, "hf-plain", *PEERS, *([VLLM.name] if vllm else [])]


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

    def hugging_face(name: str) -> Contender:
        base = once("base", lambda: AutoModelForCausalLM.from_pretrained(assets.base, dtype=assets.dtype).eval())
        form = PEERS.get(name)
        if form is None:
            return HuggingFace(name, base)
        backbone = once("backbone", lambda: AutoModel.from_pretrained(assets.backbone, dtype=assets.dtype).eval())
        head = once("head", lambda: nn.Linear(assets.setting.value.hidden_size, 1))
        return HuggingFace(name, base, form, backbone, head)

    found: dict[str, Callable[[], Contender]] = {}
    for kind in (None, *KINDS):
        name = f"vas-{kind}" if kind else "vas-plain"
        found[name] = lambda kind=kind: Engine(assets, kind, max_num_seqs, max_model_len)
    for name, compiled_kind in COMPILED.items():
        found[name] = lambda name=name, kind=compiled_kind: Engine(assets, kind, max_num_seqs, max_model_len, name)
    for name in ("hf-plain", *PEERS):
        found[name] = lambda name=name: hugging_face(name)
    if vllm_python:
        found[VLLM.name] = lambda: VLLM(vllm_python, assets, max_num_seqs, max_model_len, log)
    return found
