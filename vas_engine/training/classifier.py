"""A Hugging Face sequence classifier or reward model as a reward."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vas_engine.errors import InvalidArgumentError, nearest
from vas_engine.training.rewards.reward import Bounds, ChatPrompt

__all__ = ["ClassifierReward"]

READINGS = ("probability", "logit")
INPUTS = ("chat", "text")


@dataclass
class ClassifierReward:
    """One label of a sequence classifier.

    Attributes:
        reading: ``logit``, or ``probability`` (softmax over the labels; sigmoid when they do not exclude each
            other).
        max_length: tokens the classifier takes; a longer text keeps its end.
        chat: whether it reads prompt and response as messages, by its tokenizer's chat template; else it
            reads the response alone.
    """

    name: str
    model: Any
    tokenizer: Any
    label: int
    reading: str
    max_length: int
    chat: bool = False
    spec: str = ""

    @classmethod
    def load(cls, spec: str, device: str | torch.device = "auto") -> ClassifierReward:
        """Load ``hf:PATH[#[LABEL][:logit|:probability][:chat|:text]]``.

        Safetensors only, and no code of the checkpoint's. Left out:

        - LABEL: the only one there is.
        - the reading: ``logit`` of a single label, as reward models are trained, else the ``probability``.
        - the input: ``chat`` where the tokenizer has a chat template. A prompt that was a conversation is then
          read as its messages and any other as one message of the user's; the response is the assistant's.

        Raises:
            InvalidArgumentError: no such checkpoint, label, reading, input or device; several labels and none
                named; ``chat`` without a template.
        """
        path, _, choice = spec.removeprefix("hf:").partition("#")
        place = _device(device)
        model, tokenizer = _load_checkpoint(spec, path)
        label, reading, chat = _choose(spec, model.config, choice, bool(getattr(tokenizer, "chat_template", None)))
        name = Path(path).name + (f"-{model.config.id2label[label]}" if model.config.num_labels > 1 else "")
        return cls(name, model.to(place).eval(), tokenizer, label, reading, _max_length(model, tokenizer), chat)

    @property
    def bounds(self) -> Bounds:
        return (0.0, 1.0) if self.reading == "probability" else None

    @torch.inference_mode()
    def __call__(self, prompts: list[str], responses: list[str]) -> list[float]:
        texts = list(map(self._render, prompts, responses)) if self.chat else responses
        batch = self.tokenizer(
            texts,
            padding=True,
            truncation=True,
            max_length=self.max_length,
            add_special_tokens=not self.chat,  # a chat template writes them itself
            return_tensors="pt",
        )
        if batch["input_ids"].shape[1] == 0:
            raise ValueError("an empty text has no tokens; use a classifier whose tokenizer adds special tokens")
        batch = {key: tensor.to(self.model.device) for key, tensor in batch.items() if key != "token_type_ids"}
        logits = self.model(**batch).logits.float()
        if self.reading == "probability":
            several = self.model.config.problem_type == "multi_label_classification" or logits.shape[1] == 1
            logits = logits.sigmoid() if several else logits.softmax(-1)
        return logits[:, self.label].tolist()

    def _render(self, prompt: str, response: str) -> str:
        said = prompt.messages if isinstance(prompt, ChatPrompt) else [{"role": "user", "content": prompt}]
        messages = [*said, {"role": "assistant", "content": response}]
        return self.tokenizer.apply_chat_template(messages, tokenize=False)


def _device(device: str | torch.device) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        fix = f"no such device here ({str(error).splitlines()[0]}); use auto, cpu or cuda"
        raise InvalidArgumentError("reward_device", str(device), fix) from error
    return place


def _load_checkpoint(spec: str, path: str) -> tuple[Any, Any]:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, truncation_side="left")
        model, info = AutoModelForSequenceClassification.from_pretrained(
            path, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError) as error:
        fix = f"cannot load a sequence classifier from {path!r} ({error})"
        raise InvalidArgumentError("reward", spec, fix) from error
    if info["missing_keys"]:
        missing = ", ".join(sorted(info["missing_keys"]))
        raise InvalidArgumentError("reward", spec, f"not a trained classifier, its weights lack {missing}")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


def _choose(spec: str, config: Any, choice: str, has_template: bool) -> tuple[int, str, bool]:
    """Label, reading and whether it reads messages, from what follows the ``#``."""
    name, options = choice, []
    while name.endswith(tuple(f":{option}" for option in READINGS + INPUTS)):
        name, _, option = name.rpartition(":")
        options.append(option)
    reading = next((option for option in options if option in READINGS), None)
    chat = "chat" in options or (has_template and "text" not in options)
    if chat and not has_template:
        fix = "its tokenizer has no chat template; leave :chat out, and it reads the response alone"
        raise InvalidArgumentError("reward", spec, fix)
    labels = {str(label): int(index) for index, label in config.id2label.items()}
    labels |= {str(index): index for index in labels.values()}
    if config.num_labels == 1:
        label = 0
    elif not name:
        raise InvalidArgumentError("reward", spec, f"several labels; name one as {spec}#LABEL: {', '.join(labels)}")
    elif name not in labels:
        raise InvalidArgumentError("reward", spec, f"no label {name!r}; {nearest(name, labels)}")
    else:
        label = labels[name]
    return label, reading or ("logit" if config.num_labels == 1 else "probability"), chat


def _max_length(model: Any, tokenizer: Any) -> int:
    positions = getattr(model.config, "max_position_embeddings", None) or 512
    # RoBERTa's kin number positions from the padding id on, so two of their position embeddings are never reached.
    reserved = getattr(tokenizer, "pad_token_id", 0) + 1 if "roberta" in model.config.model_type else 0
    return int(min(positions - reserved, tokenizer.model_max_length))
