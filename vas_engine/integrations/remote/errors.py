"""Typed errors of endpoints."""

from __future__ import annotations

from vas_engine.errors import VASError


class EndpointError(VASError):
    """The endpoint refuses a request.

    Attributes:
        status: HTTP status, or None where there was no answer.
        told: the endpoint's own words.
        retry_after: seconds after which it wants to be asked again, where it said so.
    """

    def __init__(
        self, message: str, status: int | None = None, told: str = "", retry_after: float | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.told, self.retry_after = status, told, retry_after


class EndpointUnavailableError(EndpointError):
    """No answer, or only 408, 429 and 5xx, as often as it was tried."""


class EndpointTimeoutError(EndpointUnavailableError):
    """No answer in time."""


class EndpointAnswerError(EndpointError):
    """An answer that is cut off, no JSON, or without what was asked for."""


class SpendLimitError(VASError):
    """The ceiling of requests or tokens is reached; what was generated is kept."""
