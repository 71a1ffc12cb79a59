"""Sampling on the machines of a Ray cluster: rollouts as `vas collect` makes them, and responses to a dataset."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
import ray.data
from ray.exceptions import RayError
from tqdm import tqdm

from vas_engine import arguments
from vas_engine.errors import InvalidArgumentError, VASError
from vas_engine.llm import LLM
from vas_engine.params import SamplingParams
from vas_engine.tokenizer import as_prompt
from vas_engine.training.collect import CollectConfig, Job, encode_prompt, sample_shards
from vas_engine.training.rewards import RewardProcess
from vas_engine.training.rewards.score import BATCH_SIZE
from vas_engine.training.rollouts import Header, Rollout, Rollouts, RolloutWriter, from_bytes, load_rollouts, to_bytes

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["collect_on_ray", "ray_generate"]

CALL_SHARDS = 8
"""Most shards that a worker is given at a time: they flow into one another, so its batch runs empty once in so many."""


def collect_on_ray(
    llm: Mapping[str, Any],
    prompts: Sequence[Any],
    rewards: Sequence[str],
    out: str | Path,
    config: CollectConfig | None = None,
    *,
    workers: int | None = None,
    whole_text: bool = False,
    reward_device: str = "auto",
    reward_timeout: float | None = 600.0,
    reward_batch_size: int = BATCH_SIZE,
    use_tqdm: bool = True,
    **options: Any,
) -> Rollouts:
    """`collect` by workers of Ray Data: the same rows in the same folder of shards, whoever sampled them.

    A shard is sampled and scored by whichever worker is free, and written here as soon as it is done. A worker that is
    lost is replaced and its shards are sampled again. A folder that was begun, by this or by `vas collect`, is
    finished, by any number of workers.

    Args:
        llm: arguments of `LLM`; "model" and "values" are folders or names that every machine can read.
        prompts, out, config: as of `collect`.
        rewards: descriptions as of `load_rewards`; each worker has a `RewardProcess` for them.
        workers: default one for each GPU of the cluster, at least one.
        whole_text, reward_device, reward_timeout: as of `RewardProcess`.
        reward_batch_size: most responses of one call of a reward.
        options: of `Dataset.map_batches`, such as num_cpus, num_gpus and resources of a worker; default a GPU where
            there are some, else a CPU.

    Returns:
        All rollouts of the folder.

    Raises:
        InvalidArgumentError, TrainingDataError: as of `collect`; finished shards are kept.
        KeyboardInterrupt: likewise.
    """
    scoring = {"whole_text": whole_text, "device": reward_device, "timeout": reward_timeout}
    work = (_llm_options(llm), ray.put(list(prompts)), list(rewards), scoring, config or CollectConfig())
    workers, options = _worker_options(workers, options)
    place = {name: options[name] for name in ("num_cpus", "num_gpus", "resources", "runtime_env") if name in options}
    with _own_errors():
        header, sizes = ray.get(ray.remote(_plan).options(**place).remote(*work))
    writer = RolloutWriter(out, header)
    missing = [shard for shard in sizes if not writer.has(shard)]
    left = sum(sizes[shard] for shard in missing)
    rows = sum(sizes.values())
    with (
        tqdm(total=rows, initial=rows - left, desc="collect", unit="response", disable=not use_tqdm) as bar,
        _own_errors(),
    ):
        for shard, rollouts, states in _collected(missing, header, workers, options, (*work, reward_batch_size)):
            writer.write(shard, rollouts, states)
            bar.update(len(rollouts))
    return load_rollouts(out)


def ray_generate(
    dataset: ray.data.Dataset,
    llm: Mapping[str, Any],
    params: SamplingParams | None = None,
    *,
    workers: int | None = None,
    batch_size: int = 1024,
    **options: Any,
) -> ray.data.Dataset:
    """Adds responses to a dataset, lazily, as any stage of Ray Data: `ray_generate(...).write_parquet(folder)`.

    A row's prompt is in its column "prompt" (a text or token ids) or "messages" (a conversation). A column "seed" has
    the row's own seed, and its responses then depend on nothing but the row. Ray's checkpoints (see
    `ray.data.DataContext.checkpoint_config`) go on with a run that was interrupted.

    Args:
        llm: arguments of `LLM`; "model" and "values" are folders or names that every machine can read.
        params: of all rows.
        workers: default one for each GPU of the cluster, at least one.
        batch_size: rows that a worker is given at a time; many more than its engine runs at once keep it busy.
        options: of `Dataset.map_batches`, such as num_cpus, num_gpus and resources of a worker; default a GPU where
            there are some, else a CPU.

    Returns:
        The same rows in which the columns "responses", "response_ids", "finish_reasons" and "seeds" have a list of
        `params.n` entries, "error" the message of a row that failed, else null.
    """
    workers, options = _worker_options(workers, options)
    return dataset.map_batches(
        _Generator,
        fn_constructor_args=(_llm_options(llm), params or SamplingParams()),
        batch_size=arguments.integer("batch_size", batch_size, 1),
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=workers),
        **options,
    )


def _llm_options(given: Mapping[str, Any]) -> dict[str, Any]:
    options = dict(given)
    if not isinstance(options.get("model"), str | Path):
        raise InvalidArgumentError("llm['model']", options.get("model"), "give the folder or hub name of a model")
    return options


def _worker_options(workers: int | None, options: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """How many workers there are to be, and what each of them has."""
    gpus = int(ray.cluster_resources().get("GPU", 0))
    if not {"num_cpus", "num_gpus", "resources"} & options.keys():
        options = {"num_gpus": 1} | options if gpus else {"num_cpus": 1} | options
    return (gpus or 1) if workers is None else arguments.integer("workers", workers, 1), options


@contextmanager
def _own_errors() -> Iterator[None]:
    """Raises an error of this package that happened on another machine as if it had happened here."""
    try:
        yield
    except Exception as error:
        reason: Any = error  # Ray's errors may be of the reason's class as well
        while reason is not None and (isinstance(reason, RayError) or not isinstance(reason, VASError)):
            reason = getattr(reason, "cause", None) or reason.__cause__
        if reason is None or reason is error:
            raise
        raise reason from None


# -- collecting --------------------------------------------------------------------------------------------


def _job(llm: dict[str, Any], prompts: list[Any], process: RewardProcess, config: CollectConfig) -> Job:
    loaded = LLM(**llm)
    encoded = [encode_prompt(loaded, prompt, index) for index, prompt in enumerate(prompts)]
    return Job(loaded, encoded, process.rewards, config)


def _plan(
    llm: dict[str, Any], prompts: list[Any], rewards: list[str], scoring: dict[str, Any], config: CollectConfig
) -> tuple[Header, dict[int, int]]:
    """The header of the rollouts and the rows of each shard. Finds whatever is wrong with the arguments."""
    with RewardProcess(rewards, **scoring) as process:
        job = _job(llm, prompts, process, config)
        return job.header(), {shard.number: shard.rows for shard in job.shards()}


def _collected(
    shards: Sequence[int], header: Header, workers: int, options: dict[str, Any], work: tuple
) -> Iterator[tuple[int, list[Rollout], Any]]:
    """Has workers sample and score shards: yields (number, rollouts, hidden states or None) as they are done."""
    if not shards:
        return
    size = max(1, min(CALL_SHARDS, len(shards) // workers))
    calls = ray.data.from_items([{"shard": shard} for shard in shards], override_num_blocks=-(-len(shards) // size))
    calls.context.target_max_block_size = 1  # every shard comes at once, not when a block is full
    calls.context.enable_progress_bars = False
    results = calls.map_batches(
        _Collector,
        fn_constructor_args=work,
        batch_size=size,
        compute=ray.data.ActorPoolStrategy(size=workers),
        **options,
    )
    for row in results.iter_rows():
        yield row["shard"], *from_bytes((row["rows"], row["states"]), header)


class _Collector:
    """A worker of `collect_on_ray`."""

    def __init__(
        self,
        llm: dict[str, Any],
        prompts: ray.ObjectRef,
        rewards: list[str],
        scoring: dict[str, Any],
        config: CollectConfig,
        batch_size: int,
    ) -> None:
        self._process = RewardProcess(rewards, **scoring)
        self._job = _job(llm, ray.get(prompts), self._process, config)
        self._header = self._job.header()
        self._batch_size = batch_size

    def __call__(self, batch: dict[str, np.ndarray]) -> Iterator[dict[str, Any]]:
        """Yields the shards of a batch in their order: run again, a call has to repeat what it gave before."""
        wanted = set(batch["shard"].tolist())
        shards = [shard for shard in self._job.shards() if shard.number in wanted]
        waiting, done = deque(shards), {}
        scored: deque[Future[dict[str, Any]]] = deque()
        sampling = sample_shards(self._job.llm, self._job, shards)
        with ThreadPoolExecutor(1, "rewards") as pool, closing(sampling) as steps:
            for _, whole in steps:
                done.update({shard.number: outputs for shard, outputs in whole})
                while waiting and waiting[0].number in done:
                    shard = waiting.popleft()
                    scored.append(pool.submit(self._finish, shard, done.pop(shard.number)))
                while scored and scored[0].done():
                    yield scored.popleft().result()
            while scored:
                yield scored.popleft().result()

    def _finish(self, shard: Any, outputs: list[Any]) -> dict[str, Any]:
        rollouts = self._job.finish(shard, outputs, self._batch_size, lambda: None)
        states = None
        if self._job.config.hidden_states:
            states = [completion.hidden_states.cpu() for output in outputs for completion in output.outputs]
        rows, tensors = to_bytes(rollouts, self._header, states)
        return {"shard": [shard.number], "rows": [rows], "states": [tensors]}


# -- generating --------------------------------------------------------------------------------------------


class _Generator:
    """A worker of `ray_generate`."""

    def __init__(self, llm: dict[str, Any], params: SamplingParams) -> None:
        self._llm, self._params = LLM(**llm), params

    def __call__(self, batch: pa.Table) -> pa.Table:
        import pyarrow as pa

        # An argument that is wrong for every row ends the whole run.
        self._params.check(vocab_size=self._llm.lm.vocab_size, value_names=self._llm.value_names)
        rows = batch.to_pylist()
        prompts = [self._prompt(row) for row in rows]
        params = [self._params.replace(seed=row["seed"]) if "seed" in row else self._params for row in rows]
        outputs = self._llm.generate(prompts, params, use_tqdm=False, on_error="return")
        completions = [output.outputs for output in outputs]
        columns = {
            "responses": ([[c.text for c in each] for each in completions], pa.list_(pa.string())),
            "response_ids": ([[c.token_ids for c in each] for each in completions], pa.list_(pa.list_(pa.int32()))),
            "finish_reasons": ([[c.finish_reason for c in each] for each in completions], pa.list_(pa.string())),
            "seeds": ([[c.seed for c in each] for each in completions], pa.list_(pa.uint64())),
            "error": ([None if output.error is None else str(output.error) for output in outputs], pa.string()),
        }
        for name, (column, kind) in columns.items():
            batch = batch.append_column(name, pa.array(column, kind))
        return batch

    def _prompt(self, row: dict[str, Any]) -> Any:
        return as_prompt(self._llm.tokenizer, row["messages"] if "messages" in row else row["prompt"])
