from dataclasses import replace

import pytest
import torch

from vas_engine.errors import TrainingDataError
from vas_engine.training.batches import make_batch, plan_batches, split
from vas_engine.training.rollouts import Header, Rollout, Rollouts


def rollouts(sizes: list[tuple[int, int]], prompts: int = 3) -> Rollouts:
    """Of prompts that differ in their last token."""
    rows = [
        Rollout("", "", [1] * (p - 1) + [index % prompts], [2] * r, "stop", 0, index % prompts, {"x": float(index)})
        for index, (p, r) in enumerate(sizes)
    ]
    return Rollouts(Header({}, {}, {"x": {}}), rows)


def test_batch_marks_the_states_that_are_valued():
    data = rollouts([(2, 4), (3, 0), (1, 5)])
    batch = make_batch(data, [0, 1, 2], data.rewards(["x"]), torch.device("cpu"))
    assert batch.token_ids.tolist() == [[1, 0, 2, 2, 2, 2], [1, 1, 1, 0, 0, 0], [2, 2, 2, 2, 2, 2]]
    # From the prompt's last token to the response's last: its EOS has a target too.
    assert batch.mask.int().tolist() == [[0, 1, 1, 1, 1, 1], [0, 0, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1]]
    # Of 4 tokens the state after all 4; of 5 the states after 4 and 5 (more than 3.75).
    assert batch.last_quarter.int().tolist() == [[0, 0, 0, 0, 0, 1], [0, 0, 1, 0, 0, 0], [0, 0, 0, 0, 1, 1]]
    assert batch.last.tolist() == [5, 2, 5]
    assert batch.rewards[:, 0].tolist() == [0.0, 1.0, 2.0]


@pytest.mark.parametrize("shuffled", [False, True])
def test_plan_covers_everything_once_within_its_size(shuffled):
    lengths = torch.randint(1, 90, (500,), generator=torch.Generator().manual_seed(0)).tolist()
    chosen = list(range(0, 500, 2))
    generator = torch.Generator().manual_seed(1) if shuffled else None
    batches = plan_batches(lengths, chosen, 256, generator)
    assert sorted(index for batch in batches for index in batch) == chosen
    padded = [len(batch) * max(lengths[index] for index in batch) for batch in batches]
    assert max(padded) <= 256
    assert sum(padded) < 1.25 * sum(lengths[index] for index in chosen)


def test_one_rollout_longer_than_a_batch_is_a_batch():
    assert plan_batches([10, 300, 20], [0, 1, 2], 100) == [[0, 2], [1]]


def test_split_by_prompt_and_by_sample():
    data = rollouts([(1, 1)] * 200, prompts=20)
    train, heldout, by = split(data, 0.2, "prompt", 0)
    assert by == "prompt"
    assert len(heldout) == 40
    assert sorted(train + heldout) == list(range(200))
    assert not {index % 20 for index in train} & {index % 20 for index in heldout}
    train, heldout, by = split(data, 0.2, "sample", 0)
    assert (by, len(heldout)) == ("sample", 40)
    assert {index % 20 for index in train} & {index % 20 for index in heldout}
    # Four of twenty prompts are too few to stand for others; of a hundred they would be twenty.
    assert split(data, 0.2, "auto", 0)[2] == "sample"
    assert split(rollouts([(1, 1)] * 200, prompts=100), 0.2, "auto", 0)[2] == "prompt"
    assert split(data, 0.2, "sample", 0) == split(data, 0.2, "sample", 0)
    assert split(data, 0.2, "sample", 0) != split(data, 0.2, "sample", 1)


def test_a_prompt_that_stands_twice_in_the_list_is_one():
    data = rollouts([(1, 1)] * 200, prompts=20)
    twice = Rollouts(data.header, [replace(row, prompt_index=index) for index, row in enumerate(data)])
    assert split(twice, 0.2, "prompt", 0) == split(data, 0.2, "prompt", 0)
    assert twice.prompt_groups == [index % 20 for index in range(200)]


def test_too_few_to_split():
    with pytest.raises(TrainingDataError, match=r"cannot hold out 0\.1 of 1 prompts"):
        split(rollouts([(1, 1)] * 50, prompts=1), 0.1, "prompt", 0)
    with pytest.raises(TrainingDataError, match="of 1 samples"):
        split(rollouts([(1, 1)]), 0.1, "auto", 0)
