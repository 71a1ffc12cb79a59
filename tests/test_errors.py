"""Errors travel between processes: rewards, Ray's workers and ranks send theirs back."""

from __future__ import annotations

import copy
import pickle

import pytest

from vas_engine.errors import InvalidArgumentError, KVCacheError, NonFiniteError, VASError
from vas_engine.integrations.remote.errors import EndpointUnavailableError, SpendLimitError

ERRORS = [
    VASError("plain"),
    InvalidArgumentError("top_p", 1.5, "must be at most 1"),
    KVCacheError("too long"),
    NonFiniteError("a value is not finite"),
    EndpointUnavailableError("http://x: 429", 429, "slow down", 2.5),
    SpendLimitError("max_requests=1 is reached"),
]


@pytest.mark.parametrize("send", [lambda e: pickle.loads(pickle.dumps(e)), copy.copy], ids=["pickled", "copied"])
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_errors_arrive_as_they_were(error, send) -> None:
    """Class, message, attributes and notes, whatever arguments their constructors take."""
    error.add_note("tries: 3")
    found = send(error)
    assert type(found) is type(error)
    assert str(found) == str(error)
    assert vars(found) == vars(error)
    assert isinstance(found, VASError)
    with pytest.raises(type(error)):
        raise found


def every_error() -> set[type]:
    found, classes = set(), [VASError]
    while classes:
        found.update(classes)
        classes = [below for one in classes for below in one.__subclasses__()]
    return found


def test_no_error_undoes_it() -> None:
    for kind in every_error():
        assert kind.__reduce__ is VASError.__reduce__, kind
