"""Profiles: sets of weights by name, in a YAML file that the admin API may change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from vas_engine.errors import InvalidArgumentError, nearest
from vas_engine.files import read_text, replacing
from vas_engine.serving.errors import ServingError, bad_request
from vas_engine.serving.protocol import Profile

MOST_PROFILES = 10_000


class Profiles:
    """Named weights.

        profiles:
          gentle:
            weights: {kind: 2.0, concise: 0.5}
            description: for the help desk

    Args:
        path: read now, written whenever something changes. None keeps all in memory.
        writable: whether anything can change, so that the file need not exist yet.

    Raises:
        InvalidArgumentError: a file that holds something else, or none where nobody will write it.
    """

    def __init__(self, path: Path | None = None, *, writable: bool = True) -> None:
        self._path = path
        self._profiles: dict[str, Profile] = {}
        if path is not None and (path.exists() or not writable):
            self._profiles = _read(path)

    def weights(self, name: str | None) -> dict[str, float]:
        """Weights of a profile; none for no name.

        Raises:
            ServingError: an unknown name.
        """
        if name is None:
            return {}
        if name not in self._profiles:
            raise bad_request("vas_profile", f"vas_profile={name!r}: no such profile; {nearest(name, self._profiles)}")
        return dict(self._profiles[name].weights)

    def set(self, name: str, profile: Profile) -> None:
        if len(self._profiles) >= MOST_PROFILES and name not in self._profiles:
            raise bad_request("name", f"there are {MOST_PROFILES} profiles already; delete one")
        self._change({**self._profiles, name: profile})

    def delete(self, name: str) -> None:
        if name not in self._profiles:
            raise ServingError(
                404, f"no profile {name!r}; {nearest(name, self._profiles)}", param="name", code="not_found"
            )
        self._change({known: profile for known, profile in self._profiles.items() if known != name})

    def to_dict(self) -> dict[str, Any]:
        return {"profiles": {name: profile.model_dump() for name, profile in self._profiles.items()}}

    def _change(self, profiles: dict[str, Profile]) -> None:
        self._profiles, before = profiles, self._profiles
        if self._path is None:
            return
        try:
            self._write(self._path)
        except OSError as error:
            self._profiles = before
            raise ServingError(500, f"the profiles cannot be written: {error.strerror}", "server_error") from error

    def _write(self, path: Path) -> None:
        text = yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)
        with replacing(path) as fresh:
            fresh.write_text(text, encoding="utf-8")


def _read(path: Path) -> dict[str, Profile]:
    try:
        content = yaml.safe_load(read_text(path))
        listed = content["profiles"]
        return {str(name): Profile.model_validate(entry) for name, entry in listed.items()}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InvalidArgumentError("profiles", str(path), f"cannot be read as YAML ({error})") from error
    except (KeyError, TypeError, AttributeError, ValidationError) as error:
        fix = f"must hold 'profiles: {{NAME: {{weights: {{VALUE: NUMBER}}}}}}' ({error})"
        raise InvalidArgumentError("profiles", str(path), fix) from error
