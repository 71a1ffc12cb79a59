"""The examples of docs/integrations run as they are written."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from tests.tiny import byte_tokenizer, tiny_llama
from vas_engine import LLM
from vas_engine.model import CausalLM
from vas_engine.values.artifact import save_value
from vas_engine.values.value_model import ValueModel

PAGES = Path(__file__).resolve().parents[2] / "docs" / "integrations"


def examples(page: str) -> str:
    """All Python of a page, as one program."""
    return "\n".join(re.findall(r"```python\n(.*?)```", (PAGES / page).read_text(encoding="utf-8"), re.DOTALL))


@pytest.fixture(scope="module")
def names(tmp_path_factory) -> dict[str, str]:
    """What the examples call MODEL and VALUE: folders of a tiny model and of a value model for it."""
    folder = tmp_path_factory.mktemp("example")
    tokenizer = byte_tokenizer(pad_token="<end>")
    for part, seed in (("model", 0), ("other", 1)):
        tiny_llama(seed=seed).save_pretrained(folder / part)
        tokenizer.save_pretrained(folder / part)
    lm = CausalLM.load(folder / "model")
    value = ValueModel.create(folder / "other", lm, ["kind"], tokenizer)
    with torch.no_grad():
        value.heads.output.weight.mul_(20)
    save_value(folder / "value", value, tokenizer)
    return {"MODEL": str(folder / "model"), "VALUE": str(folder / "value")}


def test_transformers(names) -> None:
    space = dict(names)
    exec(examples("transformers.md").replace("do_sample=True", "do_sample=True, max_new_tokens=8"), space)
    assert space["output"].shape == (1, len("Once upon a time") + 8)


def test_remote(names) -> None:
    pytest.importorskip("httpx", reason="models behind an API need pip install 'vas-engine[remote]'")
    pytest.importorskip("fastapi", reason="the server of this test needs pip install 'vas-engine[serve]'")
    from tests.serving.conftest import serving

    llm = LLM(names["MODEL"], kv_cache_memory="4MiB")
    with serving(llm) as served:
        space = {**names, "URL": served.url + "/v1", "NAME": "tiny", "TOKENIZER": names["MODEL"]}
        exec(examples("remote.md").replace("seed=1", "seed=1, num_candidates=5"), space)
    assert space["output"].finish_reason in ("stop", "length")
    assert len(space["output"].values["kind"]) == len(space["output"].token_ids)
    assert AutoTokenizer.from_pretrained(names["MODEL"]).encode(space["output"].text)
