"""A fit put away after each epoch, so that it can go on after an interruption.

    checkpoint.json             settings, data and networks it belongs to, and how far each network is
    checkpoint-3.safetensors    weights, their averages, the best ones, the optimisers' states after epoch 3

The JSON file names the other and is replaced last, so at every moment there is one whole checkpoint or none.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from vas_engine.errors import InvalidArgumentError, TrainingDataError
from vas_engine.files import replacing, write_json
from vas_engine.training.rollouts import Rollouts
from vas_engine.training.trainee import Trainee

__all__ = ["CHECKPOINT_FILE", "Checkpoint", "drop_checkpoint", "rollouts_digest"]

CHECKPOINT_FILE = "checkpoint.json"
# What may differ between the run that was interrupted and the one that goes on.
FREE_SETTINGS = ("keep_on_interrupt", "cache_memory")


class Checkpoint:
    """Where a fit is put away.

    Args:
        folder: made if it does not exist; may hold other files.
        identity: what the fit is of: plain JSON values, ``{"settings": ..., "rollouts": ..., ...}``.
    """

    def __init__(self, folder: str | Path, identity: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        # As it will be read back: tuples are lists.
        self.identity = json.loads(json.dumps(identity))
        for name in FREE_SETTINGS:
            self.identity["settings"].pop(name, None)

    def save(self, epoch: int, seconds: float, trainees: Sequence[Trainee]) -> None:
        """Put the fit away as it is after an epoch; the one before is dropped."""
        self.folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"{i}.{name}": t for i, trainee in enumerate(trainees) for name, t in trainee.tensors().items()}
        data = f"checkpoint-{epoch}.safetensors"
        with replacing(self.folder / data) as fresh:
            save_file({name: t.cpu().contiguous() for name, t in tensors.items()}, fresh)
        progress = {
            "identity": self.identity,
            "tensors": data,
            "epoch": epoch,
            "seconds": seconds,
            "networks": [trainee.progress() for trainee in trainees],
        }
        write_json(self.folder / CHECKPOINT_FILE, progress)
        _remove_data(self.folder, but=data)

    def load(self, trainees: Sequence[Trainee]) -> tuple[int, float]:
        """Take up what was put away.

        Returns:
            The epochs that are done and the seconds they took; zeros where nothing was put away.

        Raises:
            InvalidArgumentError: it belongs to a fit with other settings, data or networks.
            TrainingDataError: it cannot be read.
        """
        path = self.folder / CHECKPOINT_FILE
        if not path.exists():
            return 0, 0.0
        try:
            progress = json.loads(path.read_text(encoding="utf-8"))
            self._check(progress["identity"])
            tensors = load_file(self.folder / progress["tensors"])
            for index, (trainee, state) in enumerate(zip(trainees, progress["networks"], strict=True)):
                mine = {n.removeprefix(f"{index}."): t for n, t in tensors.items() if n.startswith(f"{index}.")}
                trainee.resume(state, mine)
            return progress["epoch"], progress["seconds"]
        except InvalidArgumentError:
            raise
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            raise TrainingDataError(f"{path} is no checkpoint of this fit ({error!r}): train anew") from error

    def _check(self, found: Mapping[str, Any]) -> None:
        for part, wanted in self.identity.items():
            before = found.get(part)
            if before == wanted:
                continue
            if isinstance(wanted, dict) and isinstance(before, dict):
                part = next(key for key in wanted if before.get(key) != wanted[key])
                before, wanted = before.get(part), wanted[part]
            fix = (
                f"the fit put away in {self.folder} has {part} {before!r}, not {wanted!r}; choose that or a new folder"
            )
            raise InvalidArgumentError("resume", True, fix)


def drop_checkpoint(folder: str | Path) -> None:
    """Remove what was put away in a folder; other files stay."""
    (Path(folder) / CHECKPOINT_FILE).unlink(missing_ok=True)
    _remove_data(Path(folder))


def _remove_data(folder: Path, but: str = "") -> None:
    for path in folder.glob("checkpoint-*.safetensors"):
        if path.name != but:
            path.unlink()


def rollouts_digest(rollouts: Rollouts) -> str:
    """sha256 of tokens and rewards, partial ones too."""
    digest = hashlib.sha256()
    for rollout in rollouts:
        row = torch.tensor([len(rollout.prompt_ids), *rollout.prompt_ids, *rollout.response_ids], dtype=torch.int32)
        digest.update(row.numpy().tobytes())
    for rewards in (rollouts.rewards, rollouts.partial_rewards):
        digest.update(rewards(rollouts.reward_names).numpy().tobytes())
    return digest.hexdigest()
