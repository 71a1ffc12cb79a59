"""What a `RewardProcess` runs: it loads rewards and answers on its pipes."""

from __future__ import annotations

import os

from vas_engine.training.rewards.process import serve


def main() -> None:
    """Serve until the parent closes the pipe."""
    # What a reward prints or reads must not get between the lines, so the pipes are moved out of its reach.
    requests = os.fdopen(os.dup(0), encoding="utf-8")
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    serve(requests, answers)


if __name__ == "__main__":
    main()
