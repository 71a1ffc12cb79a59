"""Rewards in a process of their own.

The two sides speak JSON, a line each: the specs go in and what was loaded comes out, then batches go in and
numbers come out, until the parent closes the pipe.
"""

from __future__ import annotations

import faulthandler
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import IO, Any, cast

from vas_engine import arguments
from vas_engine.errors import InvalidArgumentError, TrainingDataError, VASError
from vas_engine.training.rewards.load import load_rewards
from vas_engine.training.rewards.reward import Bounds, ChatPrompt, Reward, RewardError
from vas_engine.training.rewards.score import apply

__all__ = ["RewardProcess", "serve"]

FAREWELL_SECONDS = 2.0


class RewardProcess:
    """Rewards loaded and run in a process of their own; use it in a ``with`` block.

        with RewardProcess(["mood=vader", "mine=my_module:judge"], timeout=60) as process:
            collect(llm, prompts, process.rewards, "runs/mood")

    They then compute while this process decodes, and nothing they do can hurt it: print, crash, hang. What
    hangs says on stderr where it stood.

    Args:
        specs, whole_text, device: as of `load_rewards`.
        timeout: seconds that a batch may take before its reward is taken to hang; None waits for ever.

    Raises:
        InvalidArgumentError: as `load_rewards` does.

    Attributes:
        rewards: in the order of ``specs``.
    """

    def __init__(
        self, specs: Sequence[str], *, whole_text: bool = False, device: str = "auto", timeout: float | None = None
    ) -> None:
        if timeout is not None:
            arguments.real("timeout", timeout, 0.0, above_low=True)
        self.timeout = timeout
        paths = [path or os.getcwd() for path in sys.path]
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", __package__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
            start_new_session=True,  # Ctrl-C is for the parent, which ends this one in its turn
        )
        self._requests, self._answers = cast(IO[str], self._process.stdin), cast(IO[str], self._process.stdout)
        try:
            loaded = self._ask(
                {"specs": list(specs), "whole_text": whole_text, "device": str(device), "timeout": timeout},
                "the rewards",
            )
        except BaseException:
            self.close()
            raise
        self.rewards: list[Reward] = [
            _RemoteReward(self, place, reward["name"], reward["spec"], _bounds(reward["bounds"]))
            for place, reward in enumerate(loaded["rewards"])
        ]

    def __enter__(self) -> RewardProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process; a reward at work is cut short."""
        with suppress(BrokenPipeError):
            self._requests.close()
        try:
            self._process.wait(FAREWELL_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def score(self, place: int, name: str, prompts: list[str], responses: list[str]) -> list[float]:
        """Apply the reward at a place of ``rewards`` to a batch."""
        request = {"reward": place, "prompts": list(map(_encode_prompt, prompts)), "responses": responses}
        return self._ask(request, name)["answers"]

    def _ask(self, request: dict[str, Any], name: str) -> dict[str, Any]:
        asked = time.monotonic()
        line = ""
        with suppress(BrokenPipeError, ValueError):  # ended, or closed by another thread
            self._requests.write(json.dumps(request) + "\n")
            self._requests.flush()
            line = self._answers.readline()
        if not line.endswith("\n"):
            raise self._ended(name, time.monotonic() - asked)
        answer = json.loads(line)
        if "error" in answer:
            raise _decode_error(answer["error"])
        return answer

    def _ended(self, name: str, seconds: float) -> TrainingDataError:
        status = self._process.wait()
        if self.timeout is not None and seconds >= self.timeout:
            fix = "stderr says where it stood; make it faster, batches smaller or the time longer (--reward-timeout)"
            return RewardError(name, f"gave no answer for {{where}} within {self.timeout:g} s: {fix}")
        how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        return RewardError(name, f"lost its process, which {how}, at {{where}}: look at stderr for the reason")


class _RemoteReward:
    """A reward of a `RewardProcess`."""

    def __init__(self, process: RewardProcess, place: int, name: str, spec: str, bounds: Bounds) -> None:
        self._process, self._place = process, place
        self.name, self.spec, self._bounds = name, spec, bounds

    @property
    def bounds(self) -> Bounds:
        return self._bounds

    def __call__(self, prompts: list[str], responses: list[str]) -> list[float]:
        return self._process.score(self._place, self.name, prompts, responses)


def serve(requests: IO[str], answers: IO[str]) -> None:
    """The other side: load what the first request describes, then answer one request a line."""
    setup = json.loads(requests.readline() or "null")
    if setup is None:
        return
    timeout = setup.pop("timeout")
    try:
        rewards = load_rewards(setup.pop("specs"), **setup)
    except VASError as error:
        _send(answers, {"error": _encode_error(error)})
        return
    loaded = [{"name": reward.name, "spec": reward.spec, "bounds": reward.bounds} for reward in rewards]
    _send(answers, {"rewards": loaded})
    for line in requests:
        request = json.loads(line)
        prompts = list(map(_decode_prompt, request["prompts"]))
        if timeout is not None:
            # A thread in C that needs no lock of Python's: it ends this process whatever the reward is at.
            faulthandler.dump_traceback_later(timeout, exit=True)
        try:
            answer: dict[str, Any] = {"answers": apply(rewards[request["reward"]], prompts, request["responses"])}
        except VASError as error:
            answer = {"error": _encode_error(error)}
        faulthandler.cancel_dump_traceback_later()
        _send(answers, answer)


def _send(answers: IO[str], message: dict[str, Any]) -> None:
    answers.write(json.dumps(message) + "\n")
    answers.flush()


def _encode_prompt(prompt: str) -> Any:
    return {"text": str(prompt), "messages": prompt.messages} if isinstance(prompt, ChatPrompt) else prompt


def _decode_prompt(prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else ChatPrompt(prompt["text"], prompt["messages"])


def _encode_error(error: VASError) -> dict[str, Any]:
    if isinstance(error, RewardError):
        return {"reward": error.reward, "what": error.what, "place": error.place}
    if isinstance(error, InvalidArgumentError):
        return {"argument": error.argument, "value": error.value, "fix": error.fix}
    return {"message": str(error)}


def _decode_error(error: dict[str, Any]) -> VASError:
    if "reward" in error:
        return RewardError(**error)
    if "argument" in error:
        return InvalidArgumentError(**error)
    return TrainingDataError(error["message"])


def _bounds(bounds: list[float] | None) -> Bounds:
    return None if bounds is None else (bounds[0], bounds[1])
