"""Two ranks that share a model, by gloo on the CPU, do what one does."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, LlamaForCausalLM, set_seed

from tests.engine.conftest import KINDS, llama, network
from tests.model import tensor_parallel_worker as worker
from tests.tiny import byte_tokenizer, tiny_llama
from tests.values.value_models import CONFIGS
from vas_engine import LLM
from vas_engine.cli import main
from vas_engine.errors import InvalidArgumentError, UnsupportedModelError
from vas_engine.model import CausalLM
from vas_engine.model.ranks import sharding
from vas_engine.values import HeadConfig, ValueModel, save_value

pytestmark = pytest.mark.timeout(1200)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A base model, a value of every kind for it, and models of other makes.

    Their vocabularies divide by two, as transformers 5.17 asks.
    """
    root = tmp_path_factory.mktemp("ranks")
    llama(vocab=32).model.save_pretrained(root / "base")
    lm = CausalLM.load(root / "base", device="cpu")
    for kind in KINDS:
        save_value(root / kind, network(kind, lm), None)
    torch.manual_seed(3)
    sizes = {"vocab_size": lm.vocab_size, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1}
    # One key head: no part of it can go to a second rank.
    one = LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, initializer_range=0.3)
    odd = ValueModel.create(LlamaForCausalLM(one), lm, [HeadConfig("value", "value")])
    with torch.no_grad():
        odd.heads.output.weight.mul_(12.0)
    save_value(root / "odd", odd, None)
    tokenizer = byte_tokenizer()
    for part, seed in (("text", 0), ("other", 1)):
        tiny_llama(258, seed=seed).save_pretrained(root / part)
        tokenizer.save_pretrained(root / part)
    texts = CausalLM.load(root / "text", device="cpu")
    save_value(root / "kind", ValueModel.create(root / "other", texts, ["kind"], tokenizer), tokenizer)
    for name in worker.OTHERS:
        config = copy.deepcopy(CONFIGS[name])
        config.vocab_size = 62
        set_seed(4)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(3.0 if parameter.dim() > 1 else 1.0)
        model.save_pretrained(root / name)
    return root


@pytest.fixture(scope="module")
def found(folder) -> list[dict]:
    """What one rank finds, and each of two."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    # A session of its own: ranks that wait for one another would outlive the command that started them.
    with subprocess.Popen(
        [*command, worker.__file__, str(folder)], stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as run:
        try:
            _, errors = run.communicate()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(run.pid, signal.SIGKILL)
    assert run.returncode == 0, errors
    two = [json.loads((folder / f"rank-{rank}-of-2.json").read_text()) for rank in range(2)]
    return [worker.observe(folder, 1), *two]


def test_ranks_find_the_same(found) -> None:
    """To the last bit of the logits: nobody tells the other rank which token was drawn."""
    assert found[1] == found[2]


def test_two_ranks_do_what_one_does(found, folder) -> None:
    one, two, _ = found
    assert two["tokens"] == one["tokens"]
    assert two["squeezed"] == one["squeezed"]
    assert min(one["preemptions"], two["preemptions"]) > 0
    for mine, other in zip(two["values"], one["values"], strict=True):
        assert torch.allclose(torch.tensor(mine), torch.tensor(other), atol=1e-4)
    assert two["likelihoods"] == pytest.approx(one["likelihoods"], abs=1e-4)
    ours, theirs = (load_file(folder / f"rank-0-of-{size}.safetensors") for size in (2, 1))
    for name, logits in theirs.items():
        assert torch.allclose(ours[name], logits, rtol=1e-5, atol=1e-5), name


def test_heads_are_shared(found) -> None:
    assert [rank["heads"] for rank in found] == [[2, 2, 2], [1, 1, 1], [1, 1, 1]]
    assert [rank["value_heads"] for rank in found[:2]] == [{"model": [2, 2], "odd": [1]}, {"model": [1, 1], "odd": [1]}]
    assert found[1]["unseeded"] != found[0]["unseeded"]


def test_documentation(found) -> None:
    assert found[1]["documented"]
    assert found[1]["documented"] == found[2]["documented"]


def test_ranks_refuse_different_requests_and_compiling(found) -> None:
    assert found[0]["different"] is None
    for rank in found[1:]:
        assert "different requests" in rank["different"]
        assert rank["compile_refused"]


def test_refusals(folder, monkeypatch) -> None:
    with pytest.raises(InvalidArgumentError, match="torchrun --nproc-per-node 2"):
        LLM(folder / "base", tensor_parallel_size=2)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InvalidArgumentError, match="from a checkpoint"):
        LLM(folder / "base", tensor_parallel_size=2, load_format="dummy")
    with pytest.raises(InvalidArgumentError, match="device"):
        LLM(folder / "base", tensor_parallel_size=2, device="cpu:0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UnsupportedModelError, match="divides its 2 key heads"):
        LLM(folder / "base", tensor_parallel_size=4, device="cpu")
    with pytest.raises(UnsupportedModelError, match="no tensor-parallel plan"):
        sharding(GPT2Config(), 2)


def test_the_command_line_starts_the_ranks(folder, tmp_path) -> None:
    """One command, what one process writes, written once."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Once upon a time\nThe old king\n")
    words = ["generate", str(folder / "text"), "--file", str(prompts), "--value", f"kind={folder / 'kind'}"]
    words += ["--weight", "kind=2", "--seed", "1", "--max-tokens", "8", "--json", "--quiet"]
    command = [sys.executable, "-m", "vas_engine.cli", *words]
    alone = subprocess.run(command, capture_output=True, text=True, check=True)
    with subprocess.Popen(
        [*command, "--tensor-parallel-size", "2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as run:
        try:
            written, errors = run.communicate()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(run.pid, signal.SIGKILL)
    assert run.returncode == 0, errors
    one, two = ([json.loads(line) for line in text.splitlines()] for text in (alone.stdout, written))
    assert len(two) == 2
    assert [o["outputs"][0]["token_ids"] for o in two] == [o["outputs"][0]["token_ids"] for o in one]


@pytest.mark.parametrize("given", [[], ["--file", "-"]])
def test_ranks_do_not_read_stdin(folder, given, capsys) -> None:
    assert main(["generate", str(folder / "text"), *given, "--tensor-parallel-size", "2"]) == 1
    assert "cannot all read stdin" in capsys.readouterr().err


def test_ranks_are_not_for_endpoints(capsys) -> None:
    words = ["generate", "--api-base", "http://127.0.0.1:1/v1", "--api-model", "NAME", "Once", "--max-tokens", "4"]
    assert main([*words, "--tensor-parallel-size", "2"]) == 1
    assert "not with --api-base" in capsys.readouterr().err
