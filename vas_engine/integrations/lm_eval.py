"""lm-evaluation-harness: this engine as its model `vas`.

    python -m vas_engine.integrations.lm_eval --model vas --tasks gsm8k \\
        --model_args pretrained=MODEL,values=kind:FOLDER,weights=kind=2

lm-eval knows the models of its own list only. This module is its command line with `vas` on that list; imported, it
serves `lm_eval.simple_evaluate(model="vas")`.
"""

from __future__ import annotations

import logging
from typing import Any

from vas_engine.errors import InvalidArgumentError, VASError
from vas_engine.evaluation.likelihood import likelihoods
from vas_engine.llm import LLM
from vas_engine.params import GUIDANCE, SamplingParams

try:
    import lm_eval.models  # noqa: F401  # the harness loads its own list only while no other model is registered
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import has_bos_prefix, maybe_truncate, normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise VASError("lm-evaluation-harness is missing: pip install 'vas-engine[lm-eval]'") from error

__all__ = ["GuidedLM", "main"]

_logger = logging.getLogger(__name__)


@register_model("vas")
class GuidedLM(TemplateLM):
    """A frozen model guided by values, to be evaluated: text drawn by the engine, likelihoods of its exact policy.

    Args:
        pretrained: folder or hub name of the model.
        values: `name:folder`, several joined by `;`, or {name: folder}, or one folder, as LLM takes them.
        weights: `name=number`, several joined by `;`, or {name: number}; every request is guided by them.
        max_gen_toks: most new tokens where a task does not say.
        add_bos_token: whether texts begin with the special tokens that the tokenizer adds; None is its own way.
        prefix_token_id: what stands before a text that is scored from its first token; None takes BOS, else EOS.
        chat_template_args: variables for the chat template.
        seed: of requests that sample; each draws its own from it.
        batch_size, max_batch_size: without effect; the engine batches as its `max_num_seqs` allows.
        device: as LLM takes it; the harness's own default, cuda:0, counts as "auto".
        options: of LLM, and `num_candidates`, `tail`, `baseline`, `tilt` and `advantage_clip` of SamplingParams.

    Raises:
        VASError: naming the argument, its value and what to change.
    """

    def __init__(
        self,
        pretrained: str,
        values: Any = None,
        weights: Any = None,
        *,
        max_gen_toks: int = 256,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        chat_template_args: dict[str, Any] | None = None,
        seed: int = 1234,
        batch_size: Any = None,
        max_batch_size: Any = None,
        device: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        guidance = {name: options.pop(name) for name in GUIDANCE if name in options}
        self.guidance = SamplingParams(values=_read_weights(weights), **guidance)
        loaded = _read_values(values)
        if bool(loaded) != self.guidance.guided:
            fix = "values guide by their weights: give both, such as values=kind:FOLDER,weights=kind=2"
            raise InvalidArgumentError("weights", weights, fix)
        self.llm = LLM(
            pretrained, loaded, device="auto" if device in (None, "cuda:0") else device, seed=seed, **options
        )
        self.guidance.check(vocab_size=self.llm.lm.vocab_size, value_names=self.llm.value_names)
        self.tokenizer: Any = self.llm.tokenizer
        self.max_gen_toks, self.add_bos_token = max_gen_toks, add_bos_token
        self.chat_template_args = chat_template_args or {}
        self._prefix_token_id = prefix_token_id

    # -- what the harness asks of a model --------------------------------------------------------------------

    @property
    def max_length(self) -> int:
        """Tokens that a context may have before the last token that is scored."""
        # Values look at candidates in that token's place, so it needs a position too.
        return self.llm.max_model_len - self.guidance.guided

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        known = (self._prefix_token_id, self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
        return next(token for token in known if token is not None)

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids; a text that begins with BOS, as chat templates write it, gets no second one."""
        if add_special_tokens is None:
            add_special_tokens = self.add_bos_token
            if has_bos_prefix(string, self.tokenizer.decode([self.prefix_token_id])):
                add_special_tokens = False
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return list(self.tokenizer.encode(string, **options))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as text; without its system turn where the template refuses that one, as the harness does."""
        options = {
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": not add_generation_prompt,
            **self.chat_template_args,
        }
        rest = [turn for turn in chat_history if turn["role"] != "system"]
        try:
            prompt = self.llm.render_chat(chat_history, **options)
        except InvalidArgumentError:
            if len(rest) == len(chat_history):
                raise
            _logger.warning("the chat template refuses the system turn; it is left out")
            prompt = self.llm.render_chat(rest, **options)
        return str(prompt.text)

    # -- requests --------------------------------------------------------------------------------------------

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Completions, all of them in one continuous batch."""
        prompts, params = [], []
        for request in requests:
            context, settings = request.args
            chosen = self._read_settings(settings)
            tokens = self.tok_encode(context) or [self.prefix_token_id]
            prompts.append(maybe_truncate(tokens, chosen.max_tokens, self.llm.max_model_len)[0])
            params.append(chosen)
        outputs = self.llm.generate(prompts, params, use_tqdm=not disable_tqdm)
        texts = [output.outputs[0].text for output in outputs]
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def _read_settings(self, given: dict[str, Any]) -> SamplingParams:
        """A task's settings, which are written as transformers' `generate` takes them."""
        settings = dict(normalize_gen_kwargs(given, self.max_gen_toks))
        until: list[str] = [text for text in settings.pop("until") if text]
        tokens = settings.pop("max_gen_toks")
        if tokens >= self.llm.max_model_len:
            fix = f"leaves no room for a context: the model takes {self.llm.max_model_len} tokens in all"
            raise InvalidArgumentError("max_gen_toks", tokens, fix)
        temperature = settings.pop("temperature", 1.0)
        if not settings.pop("do_sample"):
            temperature = 0.0
        if settings.pop("num_beams", 1) != 1:
            raise InvalidArgumentError("num_beams", given["num_beams"], "beams are not guided; leave it out")
        # Special tokens do not show in the text, so they end it as tokens.
        special = {str(token): id for id, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        return self.guidance.replace(
            temperature=temperature,
            max_tokens=tokens,
            stop=[text for text in until if text not in special],
            stop_token_ids=[special[text] for text in until if text in special],
            **settings,
        )

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        contexts, continuations = [], []
        for _, context, continuation in requests:
            room = max(self.max_length + 1 - len(continuation), 0)
            if len(context) > room:
                _logger.warning("a context of %d tokens is cut to its last %d", len(context), room)
            contexts.append(context[len(context) - min(room, len(context)) :])
            continuations.append(continuation)
        found = likelihoods(self.llm, contexts, continuations, self.guidance, use_tqdm=not disable_tqdm)
        answers = [(likelihood.log_prob, likelihood.greedy) for likelihood in found]
        for (pair, _, _), answer in zip(requests, answers, strict=True):
            if pair is not None:
                self.cache_hook.add_partial("loglikelihood", pair, answer)
        return answers

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probabilities of whole texts, in windows of the model's length where they are longer."""
        windows, owners = [], []
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(number)
        totals = [0.0] * len(requests)
        for number, (log_prob, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[number] += log_prob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals


def _read_values(given: Any) -> Any:
    """`kind:folder;mood:folder`, or a folder by itself, as LLM's `values`."""
    if not isinstance(given, str) or ":" not in given:
        return given
    pairs = [part.partition(":") for part in given.split(";")]
    for name, _, folder in pairs:
        if not name or not folder:
            raise InvalidArgumentError("values", given, "write name:folder, several joined by ';'")
    return {name: folder for name, _, folder in pairs}


def _read_weights(given: Any) -> Any:
    """`kind=2;mood=-1` as the `values` of SamplingParams."""
    if not isinstance(given, str):
        return given
    try:
        return {name: float(number) for name, number in (part.split("=") for part in given.split(";"))}
    except ValueError:
        raise InvalidArgumentError("weights", given, "write name=number, several joined by ';'") from None


def main() -> None:
    """The harness's own command line, which now knows `vas`."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
