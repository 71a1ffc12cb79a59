"""Models behind an API: value-guided sampling from an endpoint that shows only its top log-probabilities.

llm = RemoteLLM("http://127.0.0.1:8000/v1", "name", {"kind": "path/to/value"})
llm.generate("Once upon a time", SamplingParams(values={"kind": 2.0}, max_tokens=64))
"""

from vas_engine.integrations.remote.errors import (
    EndpointAnswerError,
    EndpointError,
    EndpointTimeoutError,
    EndpointUnavailableError,
    SpendLimitError,
)
from vas_engine.integrations.remote.llm import RemoteLLM

__all__ = [
    "EndpointAnswerError",
    "EndpointError",
    "EndpointTimeoutError",
    "EndpointUnavailableError",
    "RemoteLLM",
    "SpendLimitError",
]
