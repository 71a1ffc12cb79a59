"""The admin API: values that come and go while serving, and profiles. Behind a key of its own (see `Gate`)."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

from fastapi import FastAPI
from fastapi import Path as PathParameter
from starlette.responses import Response

from vas_engine.engine.engine import Engine
from vas_engine.serving import protocol
from vas_engine.serving.errors import ServingError, bad_request, json_response
from vas_engine.serving.worker import EngineThread
from vas_engine.values.artifact import load_value

if TYPE_CHECKING:
    from vas_engine.llm import LLM
    from vas_engine.serving.state import State

Name = Annotated[str, PathParameter(min_length=1, max_length=100, pattern=r"^[A-Za-z0-9_.-]+$")]


def add_admin(app: FastAPI, state: State) -> None:
    """Adds the routes under /admin: profiles, and values where there is an engine to load them into."""
    if isinstance(state.worker, EngineThread):
        _add_values(app, state, state.worker, cast("LLM", state.llm))
    _add_profiles(app, state)


def _add_values(app: FastAPI, state: State, worker: EngineThread, llm: LLM) -> None:
    loading = asyncio.Lock()

    @app.get("/admin/values", response_model=protocol.ValueList, tags=["admin"])
    async def values() -> Any:
        """Values that are loaded."""
        return json_response(await worker.call(_list_values))

    @app.post("/admin/values", response_model=protocol.ValueList, tags=["admin"])
    async def load(body: protocol.LoadValueRequest) -> Any:
        """Loads a value from the server's folder of values. Requests that run are not disturbed: it is not compiled,
        which would stop them."""
        folder = resolve(state.settings.values_dir, body.path)
        async with loading:  # one at a time: each takes memory for its pages
            scorer = await asyncio.to_thread(load_value, folder, llm.engine.lm, tokenizer=llm.tokenizer)
            await worker.call(lambda engine: engine.add_value(body.name, scorer))
        return json_response(await worker.call(_list_values))

    @app.delete("/admin/values/{name}", response_model=protocol.ValueList, tags=["admin"])
    async def unload(name: Name) -> Any:
        """Unloads a value: new requests cannot name it; those that use it are finished first."""
        await worker.call(lambda engine: engine.remove_value(name))
        llm.values.pop(name, None)
        return json_response(await worker.call(_list_values))


def _add_profiles(app: FastAPI, state: State) -> None:
    @app.get("/admin/profiles", response_model=protocol.ProfileList, tags=["admin"])
    async def profiles() -> Any:
        """All profiles."""
        return json_response(state.profiles.to_dict())

    @app.put("/admin/profiles/{name}", response_model=protocol.ProfileList, tags=["admin"])
    async def set_profile(name: Name, body: protocol.Profile) -> Any:
        """Makes or replaces a profile."""
        for value in body.weights:
            if value not in state.llm.value_names:
                raise bad_request("weights", f"weights: no value {value!r} is loaded")
        state.profiles.set(name, body)
        return json_response(state.profiles.to_dict())

    @app.delete("/admin/profiles/{name}", response_model=protocol.ProfileList, tags=["admin"])
    async def delete_profile(name: Name) -> Response:
        """Deletes a profile."""
        state.profiles.delete(name)
        return json_response(state.profiles.to_dict())


def resolve(root: Path | None, path: str) -> Path:
    """A folder inside `root`; whatever leads out of it, links included, is refused.

    Raises:
        ServingError: no folder of values, a path that leads out of it, or no such folder.
    """
    if root is None:
        raise ServingError(403, "this server has no folder of values; start it with --values-dir", code="no_values_dir")
    try:
        folder = (root / path).resolve()
        inside = folder.is_relative_to(root.resolve()) and folder.is_dir()
    except (OSError, ValueError, RuntimeError):  # a NUL, a name too long, links in a circle
        inside = False
    if not inside:
        raise bad_request("path", "path: no such folder in this server's folder of values")
    return folder


def _list_values(engine: Engine) -> dict[str, Any]:
    """What `protocol.ValueList` says; runs on the engine's thread."""
    return {
        "values": [
            {
                "name": network.name,
                "kind": network.scorer.config.kind,
                "values": engine.guide.value_names[network.columns],
                "unloading": engine.is_retired(network.name),
            }
            for network in engine.guide.networks
        ]
    }
