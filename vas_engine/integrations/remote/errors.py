"""Typed errors of endpoints."""

from __future__ import annotations

from vas_engine.errors import VASError


class EndpointError(VASError):
    """The endpoint refuses a request.

    Attributes:
        status: HTTP status, or None where there was no answer.
    """

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class EndpointUnavailableError(EndpointError):
    """No answer, or only 408, 429 and 5xx, as often as it was tried."""


class EndpointAnswerError(EndpointError):
    """An answer that is cut off, no JSON, or without what was asked for."""


class SpendLimitError(VASError):
    """The ceiling of requests or tokens is reached; what was generated is kept."""
