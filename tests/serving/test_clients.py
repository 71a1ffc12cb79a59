"""Clients that people use, unchanged."""

from __future__ import annotations

import asyncio

import pytest

from tests.serving.conftest import Served

openai = pytest.importorskip("openai")

MESSAGES = [{"role": "user", "content": "Tell me"}]
WEIGHTS = {"vas_weights": {"kind": 2.0}, "vas_return_values": True}


def test_openai_client(served: Served) -> None:
    with openai.OpenAI(base_url=served.url + "/v1", api_key="none", max_retries=0) as client:
        assert client.models.list().data[0].id == "tiny"
        assert client.models.retrieve("tiny").id == "tiny"
        asked = {"model": "tiny", "messages": MESSAGES, "seed": 1, "max_tokens": 6, "extra_body": WEIGHTS}
        whole = client.chat.completions.create(**asked)
        assert whole.choices[0].finish_reason == "length"
        assert len(whole.choices[0].vas["values"]["kind"]) == 6
        parts = client.chat.completions.create(
            stream=True, stream_options={"include_usage": True}, logprobs=True, top_logprobs=2, **asked
        )
        chunks = list(parts)
        text = "".join(chunk.choices[0].delta.content for chunk in chunks if chunk.choices)
        assert text == whole.choices[0].message.content
        assert chunks[-1].usage == whole.usage
        assert sum(len(chunk.choices[0].logprobs.content) for chunk in chunks if chunk.choices) == 6
        written = client.completions.create(
            model="tiny", prompt="Once", n=2, best_of=3, logprobs=1, max_tokens=4, extra_body={"ignore_eos": True}
        )
        assert [choice.index for choice in written.choices] == [0, 1]
        assert len(written.choices[0].logprobs.token_logprobs) == 4
        with pytest.raises(openai.BadRequestError, match="top_p") as refused:
            client.completions.create(model="tiny", prompt="Once", top_p=3)
        assert refused.value.param == "top_p"
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model="other", prompt="Once")


def test_openai_async_client(served: Served) -> None:
    async def talk() -> tuple[list[str], list[str]]:
        async with openai.AsyncOpenAI(base_url=served.url + "/v1", api_key="none", max_retries=0) as client:
            asked = {"model": "tiny", "prompt": "Once", "max_tokens": 8}

            async def whole(seed: int) -> str:
                made = await client.completions.create(seed=seed, **asked)
                return made.choices[0].text

            async def streamed(seed: int) -> str:
                parts = await client.completions.create(
                    model="tiny", prompt="Once", seed=seed, max_tokens=8, stream=True
                )
                return "".join([part.choices[0].text async for part in parts])

            return (
                await asyncio.gather(*(whole(seed) for seed in range(8))),
                await asyncio.gather(*(streamed(seed) for seed in range(8))),
            )

    one, other = asyncio.run(talk())
    assert one == other
    assert len(set(one)) == 8


def test_langchain(served: Served) -> None:
    langchain = pytest.importorskip("langchain_openai")
    model = langchain.ChatOpenAI(
        base_url=served.url + "/v1",
        api_key="none",
        model="tiny",
        seed=4,
        max_tokens=6,
        max_retries=0,
        extra_body={"vas_weights": {"kind": 1.0}, "ignore_eos": True},
    )
    whole = model.invoke("Tell me")
    assert whole.usage_metadata["output_tokens"] == 6
    assert "".join(chunk.content for chunk in model.stream("Tell me")) == whole.content
