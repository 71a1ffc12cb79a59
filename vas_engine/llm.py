"""LLM: the offline interface. Loads a frozen model and its values, and decodes batches of prompts."""

from __future__ import annotations

import dataclasses
import os
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from vas_engine import arguments
from vas_engine.engine.engine import Engine
from vas_engine.engine.event import EngineStats
from vas_engine.engine.memory import CPU_FRACTION, count_blocks, free_memory
from vas_engine.engine.output import OutputFront
from vas_engine.engine.profile import CudaMeter, activation_memory
from vas_engine.errors import InvalidArgumentError, KVCacheError, VASError
from vas_engine.interrupt import deferred_interrupt
from vas_engine.model import ranks
from vas_engine.model.lm import CausalLM
from vas_engine.outputs import CompletionOutput, RequestOutput
from vas_engine.params import SamplingParams, read_params
from vas_engine.prompts import Prompt, read_prompts
from vas_engine.sampling import fork_seed
from vas_engine.tokenizer import load_tokenizer, render_chat
from vas_engine.values.artifact import load_value

if TYPE_CHECKING:
    from vas_engine.values.scorer import Scorer

MAX_NUM_SEQS = {"cpu": 64, "cuda": 256}
MAX_NUM_BATCHED_TOKENS = {"cpu": 2048, "cuda": 8192}

_ALIASES = {
    "gpu_memory_utilization": "kv_cache_memory",
    "max_seq_len": "max_model_len",
    "model_path": "model",
    "swap_space": "kv_cache_memory",
    "torch_dtype": "dtype",
    "tp_size": "tensor_parallel_size",
    "value": "values",
}
_CALL_ALIASES = {"params": "sampling_params"}


@arguments.names_nearest(_ALIASES)
class LLM:
    """A frozen causal LM, its values, and the engine that decodes with them.

        llm = LLM("path/to/model", values={"kind": "path/to/value"})
        out = llm.generate("Once upon a time", SamplingParams(values={"kind": 2.0}))[0].outputs[0]

    Threads may share one: their requests run in one batch, and who steps it makes the others wait.

    Args:
        model: folder or hub name of a Hugging Face causal LM (safetensors only, no code of its own), or a
            model or config of transformers.
        values: {name: folder} of values trained on this model; the name is what a request's weights refer to
            ("name.head" where a value has several heads). A single folder goes by its heads' own names.
        tokenizer: folder, hub name or tokenizer; None takes the model's.
        skip_tokenizer_init: do without one: prompts are token ids and all text stays empty.
        device: "auto" (CUDA where there is one), "cpu", "cuda", "cuda:1".
        dtype: "auto" (the checkpoint's), "float32", "bfloat16", "float16".
        load_format: "auto", or "dummy" for random weights of the real shape.
        revision: of a hub model.
        tensor_parallel_size: processes that share the models, each with its part of the weights and of the KV
            cache: all ranks that `torchrun --nproc-per-node` started, running one script, which makes the same
            calls on each. The tokens are the same on all of them.
        max_num_seqs: completions that run at once; default 64 on a CPU, 256 on CUDA.
        max_num_batched_tokens: rows of one step; default 2048 on a CPU, 8192 on CUDA.
        max_model_len: longest prompt and completion together; default the model's, or what the KV cache
            holds.
        kv_cache_memory: bytes or a text such as "2GiB"; default 40 % of the free memory on a CPU, 92 % of
            what the weights and the largest step (tried while loading) leave free on CUDA, and never more than all
            sequences at full length can use.
        block_size: tokens of one page of the KV cache.
        attention_backend: "auto", "cpp" (the CPU extension), "triton" (a GPU's kernels), "flash-attn" (these, and that
            package for prompts) or "reference" (plain torch).
        enforce_eager: False compiles the base model and the values by torch.compile while loading: about a second
            a layer each time, and on a CPU memory for a second copy of the weights; steps are then up to twice as
            fast there. None (the default) and True run them eagerly. On CUDA decode steps are graphs, captured when
            a size of batch is first met, unless this is True.
        enable_prefix_caching: reuse the pages of prompts that begin alike.
        seed: makes requests without a seed of their own repeatable: the i-th since loading always draws the
            same one.

    Raises:
        VASError: an argument, model or value that cannot work, or too little memory; says what to change.
    """

    def __init__(
        self,
        model: Any,
        values: str | Path | Mapping[str, str | Path | Scorer] | None = None,
        *,
        tokenizer: Any | None = None,
        skip_tokenizer_init: bool = False,
        device: str = "auto",
        dtype: Any = "auto",
        load_format: str = "auto",
        revision: str | None = None,
        tensor_parallel_size: int = 1,
        max_num_seqs: int | None = None,
        max_num_batched_tokens: int | None = None,
        max_model_len: int | None = None,
        kv_cache_memory: int | str | None = None,
        block_size: int = 16,
        attention_backend: str = "auto",
        enforce_eager: bool | None = None,
        enable_prefix_caching: bool = True,
        seed: int | None = None,
    ) -> None:
        for name, number in (
            ("max_num_seqs", max_num_seqs),
            ("max_num_batched_tokens", max_num_batched_tokens),
            ("block_size", block_size),
            ("tensor_parallel_size", tensor_parallel_size),
        ):
            if number is not None:
                arguments.integer(name, number, 1)
        if max_model_len is not None:
            arguments.integer("max_model_len", max_model_len, 2)
        if seed is not None:
            arguments.integer("seed", seed, 0, 2**64 - 1)
        if enforce_eager is not None:
            arguments.boolean("enforce_eager", enforce_eager)
        arguments.boolean("enable_prefix_caching", enable_prefix_caching)
        memory = None
        if kv_cache_memory is not None:
            memory = arguments.size_in_bytes("kv_cache_memory", kv_cache_memory)
        folders = _read_values(values)

        self.lm = CausalLM.load(model, device, dtype, load_format, attention_backend, revision, tensor_parallel_size)
        self.tokenizer = None
        if not arguments.boolean("skip_tokenizer_init", skip_tokenizer_init):
            self.tokenizer = load_tokenizer(model, tokenizer, revision, required=load_format != "dummy")
        self.values = {name: self._load_value(value) for name, value in folders.items()}
        if enforce_eager is False:  # before the pages, whose default size is a share of the memory left
            self.lm.compile([index for scorer in self.values.values() for index in scorer.states])
            for scorer in self.values.values():
                scorer.compile()
        self.engine = self._build_engine(
            max_num_seqs,
            max_num_batched_tokens,
            max_model_len,
            memory,
            block_size,
            enable_prefix_caching,
            graphs=enforce_eager is not True,
        )
        self._front = OutputFront(self.engine, self.tokenizer)
        # Reentrant: a stream that is left early may be closed by the garbage collector, in the middle of anything.
        self._turn = threading.RLock()
        if seed is None and tensor_parallel_size > 1:
            seed = ranks.first_says(int.from_bytes(os.urandom(7), "little"), self.lm.device)
        self._seed, self._count = seed, 0

    def _load_value(self, value: Any) -> Scorer:
        if isinstance(value, str | Path):
            return load_value(value, self.lm, tokenizer=self.tokenizer)
        return value.bind(self.lm, self.tokenizer)

    def _build_engine(
        self,
        max_num_seqs: int | None,
        max_num_batched_tokens: int | None,
        max_model_len: int | None,
        memory: int | None,
        block_size: int,
        enable_prefix_caching: bool,
        graphs: bool,
    ) -> Engine:
        kind = "cuda" if self.lm.device.type == "cuda" else "cpu"
        seqs = max_num_seqs or MAX_NUM_SEQS[kind]
        batched = max_num_batched_tokens or MAX_NUM_BATCHED_TOKENS[kind]
        longest = self.lm.max_model_len
        if max_model_len is not None and max_model_len > longest:
            fix = f"the model was made for at most {longest} positions; ask for no more"
            raise InvalidArgumentError("max_model_len", max_model_len, fix)
        length = max_model_len or longest
        size = Engine.bytes_per_block(self.lm, self.values, block_size)
        shared = self.lm.tensor_parallel_size
        if memory is None and shared > 1 and kind == "cpu":
            memory = int(free_memory(self.lm.device) * CPU_FRACTION / shared)
        activations = 0
        if memory is None and kind == "cuda":
            meter = CudaMeter(self.lm.device)
            activations = activation_memory(self.lm, self.values, seqs, batched, length, block_size, meter)
        blocks = count_blocks(size, block_size, seqs, length, self.lm.device, memory, activations)
        if shared > 1:
            blocks = ranks.least(blocks, self.lm.device)
        room = blocks * block_size
        if room < length and max_model_len is not None:
            enough = -(-length // block_size) * size
            raise KVCacheError(
                f"max_model_len={max_model_len}: the KV cache holds {room} tokens; "
                f"set kv_cache_memory to at least {enough:,} or max_model_len to at most {room}"
            )
        return Engine(
            self.lm,
            self.values,
            max_num_seqs=seqs,
            max_num_batched_tokens=batched,
            max_model_len=min(length, room),
            num_blocks=blocks,
            block_size=block_size,
            enable_prefix_caching=enable_prefix_caching,
            graphs=graphs and kind == "cuda" and shared == 1,
        )

    @property
    def value_names(self) -> list[str]:
        """Names that a request's `values` may weight."""
        return self.engine.value_names

    @property
    def max_model_len(self) -> int:
        """Tokens that prompt and completion may have together."""
        return self.engine.max_model_len

    # -- generating ------------------------------------------------------------------------------------------

    @arguments.names_nearest(_CALL_ALIASES)
    def generate(
        self,
        prompts: Any,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        priority: int | Sequence[int] = 0,
        on_error: str = "raise",
    ) -> list[RequestOutput]:
        """Completes prompts, all of them in one continuous batch.

        Args:
            prompts: one or a list of: a text, token ids, {"prompt": text}, {"prompt_token_ids": ids}.
            sampling_params: for all prompts, or one for each.
            use_tqdm: a progress bar on stderr.
            priority: for all, or one for each; smaller runs first.
            on_error: a request that fails (empty, too long, an unknown value, values that are not finite ...)
                does not disturb the others. "raise" raises its error when they are done, with all outputs in
                the attribute `outputs` of the exception; "return" leaves it in the output's `error`. A step that
                raises ends all requests that took part in it: "raise" raises at once.

        Returns:
            One output a prompt, in order.

        Raises:
            InvalidArgumentError: arguments that are no prompts or parameters at all, before any work.
            VASError: with on_error="raise", the first request's error; ranks that were given different requests.
            KeyboardInterrupt: Ctrl-C ends these requests and leaves the LLM ready for others.
        """
        arguments.choice("on_error", on_error, ("raise", "return"))
        read = read_prompts(prompts)
        params = read_params(sampling_params, len(read))
        priorities = arguments.for_each("priority", priority, len(read), _check_priority)
        outputs = self._run(list(zip(read, params, priorities, strict=True)), use_tqdm, lenient=on_error == "return")
        if on_error == "raise":
            _raise_first(outputs)
        return outputs

    @arguments.names_nearest(_CALL_ALIASES)
    def chat(
        self,
        messages: Any,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = True,
        use_tqdm: bool = True,
        priority: int | Sequence[int] = 0,
        on_error: str = "raise",
    ) -> list[RequestOutput]:
        """Completes conversations, rendered by the tokenizer's chat template; otherwise as `generate`.

        Args:
            messages: one conversation, [{"role": "user", "content": "Hi"}, ...], or a list of them.
            chat_template: a Jinja template in place of the tokenizer's own.
            chat_template_kwargs: variables for the template.
            add_generation_prompt: end with the opening of the assistant's turn.
        """
        several = isinstance(messages, Sequence) and bool(messages) and isinstance(messages[0], Sequence)
        options = {"chat_template": chat_template, "add_generation_prompt": add_generation_prompt}
        prompts = [
            self.render_chat(conversation, **options, **(chat_template_kwargs or {}))
            for conversation in (messages if several else [messages])
        ]
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm, priority=priority, on_error=on_error)

    def render_chat(self, messages: Any, **options: Any) -> Prompt:
        """A conversation as the prompt that `chat` would run; `stream` takes it too."""
        return render_chat(self.tokenizer, messages, **options)

    @arguments.names_nearest(_CALL_ALIASES)
    def stream(
        self, prompt: Any, sampling_params: SamplingParams | None = None, *, priority: int = 0
    ) -> Iterator[RequestOutput]:
        """Completes one prompt and yields its output whenever there is more of it.

        Each one yielded is a copy with everything so far; `delta_text` and `delta_token_ids` of its
        completions hold what is new. Leaving the loop early cancels the request.

        Raises:
            VASError: the request's error, when the iterator gets there.
        """
        read = read_prompts(prompt)
        if len(read) != 1:
            raise InvalidArgumentError("prompt", prompt, "stream takes one prompt; use generate for several")
        [params] = read_params(sampling_params, 1)
        return self._stream(read[0], params, _check_priority("priority", priority))

    def _stream(self, prompt: Prompt, params: SamplingParams, priority: int) -> Iterator[RequestOutput]:
        self._check_ranks([(prompt, params, priority)])
        outputs: list[RequestOutput] = []
        try:
            with deferred_interrupt():
                outputs.append(self._submit(prompt, params, priority))
            [output] = outputs
            shown = RequestOutput(output.request_id, outputs=[CompletionOutput(index) for index in range(params.n)])
            while not shown.finished:
                last = shown
                with self._turn:
                    # Another call, in the loop's body or of a thread, may have brought this request on already.
                    if _same(output, shown):
                        self._step()
                    if not _same(output, shown):
                        shown = output.snapshot()
                if shown is not last:
                    for new, old in zip(shown.outputs, last.outputs, strict=True):
                        new.delta_text = new.text[len(old.text) :]
                        new.delta_token_ids = new.token_ids[len(old.token_ids) :]
                    yield shown
        finally:
            self._abandon(outputs)
        if output.error is not None:
            raise output.error

    # -- inner workings --------------------------------------------------------------------------------------

    def _run(
        self, requests: list[tuple[Prompt, SamplingParams, int]], use_tqdm: bool, lenient: bool
    ) -> list[RequestOutput]:
        self._check_ranks(requests)
        outputs: list[RequestOutput] = []
        bar = tqdm(total=len(requests), disable=not (use_tqdm and ranks.is_first()), unit="request", desc="generate")
        try:
            for request in requests:
                with deferred_interrupt():  # what the engine holds is on the list
                    outputs.append(self._admit(*request))
            own, before = {output.request_id for output in outputs}, dataclasses.replace(self.engine.stats)
            bar.update(sum(output.finished for output in outputs))
            # A step looks at what it touched and at the first of those left, however many wait.
            left = deque(outputs)
            while left:
                with self._turn:
                    if left[0].finished:
                        left.popleft()
                        continue
                    told = self._step(lenient)
                ended = sum(output.finished and output.request_id in own for output in told)
                _show_progress(bar, before, self.engine.stats, ended)
        finally:
            self._abandon(outputs)
            bar.close()
        return outputs

    def _check_ranks(self, requests: list[tuple[Prompt, SamplingParams, int]]) -> None:
        if self.lm.tensor_parallel_size > 1:
            ranks.check_same(requests, self.lm.device)

    def _admit(self, prompt: Prompt, params: SamplingParams, priority: int) -> RequestOutput:
        """Submits a request; one that cannot run becomes an output with its error."""
        try:
            return self._submit(prompt, params, priority)
        except VASError as error:
            failed = [CompletionOutput(index, finish_reason="error") for index in range(params.n)]
            return RequestOutput(str(self._count), prompt.text, prompt.token_ids or [], failed, error)

    def _submit(self, prompt: Prompt, params: SamplingParams, priority: int) -> RequestOutput:
        with self._turn:
            self._count += 1
            if params.stop and self.tokenizer is None:
                raise InvalidArgumentError("stop", params.stop, "needs a tokenizer; use stop_token_ids without one")
            if params.seed is None and self._seed is not None:
                params = dataclasses.replace(params, seed=fork_seed(self._seed, self._count))
            ids = prompt.encode(self.tokenizer)
            return self._front.add(str(self._count), ids, params, prompt=prompt.text, priority=priority)

    def _step(self, lenient: bool = False) -> list[RequestOutput]:
        """One step; returns the requests it touched. One that raises ends the requests that took part in it, whoever
        made them, with its error; the others can go on, and with `lenient` nothing is raised if it ended any."""
        with self._turn, deferred_interrupt():
            try:
                return self._front.step()
            except Exception as error:
                told = self._front.recover(error)
                if not lenient or all(output.error is not error for output in told):
                    raise
                return told
            except BaseException:  # a second Ctrl-C cut it in half
                with suppress(RuntimeError):
                    self._front.recover(VASError("the step was interrupted"))
                raise

    def _abandon(self, outputs: Sequence[RequestOutput]) -> None:
        """Cancels what has not finished; afterwards the engine holds nothing of it. Ctrl-C waits for that."""
        with self._turn, deferred_interrupt():
            for output in outputs:
                if not output.finished:
                    self._front.cancel(output.request_id)
            if not self._front.has_unfinished:
                while self.engine.has_unfinished:
                    self.engine.step()


def _same(output: RequestOutput, other: RequestOutput) -> bool:
    """Whether a request has moved on between two looks at it."""
    pairs = zip(output.outputs, other.outputs, strict=True)
    return all(len(a.token_ids) == len(b.token_ids) and a.finished == b.finished for a, b in pairs)


def _read_values(values: Any) -> dict[str, Any]:
    if values is None:
        return {}
    if isinstance(values, str | Path):
        return {"": values}
    if not isinstance(values, Mapping):
        raise InvalidArgumentError("values", values, "must be a folder or {name: folder}")
    for name, value in values.items():
        if not isinstance(name, str):
            raise InvalidArgumentError("values", name, "names of values are strings")
        if not isinstance(value, str | Path) and not hasattr(value, "bind"):
            raise InvalidArgumentError(f"values[{name!r}]", value, "must be the folder of a value")
    return dict(values)


def _check_priority(name: str, value: object) -> int:
    return arguments.integer(name, value, -(2**31), 2**31)


def _show_progress(bar: tqdm, before: EngineStats, now: EngineStats, finished: int) -> None:
    if bar.disable:
        return
    seconds = max(bar.format_dict["elapsed"], 1e-9)
    tokens, evaluations = now.tokens - before.tokens, now.value_rows - before.value_rows
    counts = {"tokens/s": f"{tokens / seconds:.0f}"}
    if evaluations and tokens:
        counts["values/token"] = f"{evaluations / tokens:.1f}"
    bar.set_postfix(counts, refresh=False)
    bar.update(finished)


def _raise_first(outputs: list[RequestOutput]) -> None:
    failed = [(index, output.error) for index, output in enumerate(outputs) if output.error is not None]
    if not failed:
        return
    index, error = failed[0]
    if len(outputs) > 1:
        error.add_note(f"prompt {index} of {len(outputs)}; the attribute 'outputs' holds all results")
    for other, reason in failed[1:]:
        error.add_note(f"prompt {other}: {reason}")
    error.outputs = outputs  # type: ignore[attr-defined]
    raise error
