"""A Hugging Face sequence classifier as a reward."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vas_engine.errors import InvalidArgumentError, nearest

__all__ = ["ClassifierReward"]

READINGS = ("probability", "logit")


@dataclass
class ClassifierReward:
    """One label of a sequence classifier, in batches.

    Attributes:
        reading: ``logit``, or ``probability`` (softmax over the labels; sigmoid when they do not exclude each
            other).
        max_length: tokens the classifier takes; a longer text keeps its end.
    """

    name: str
    model: Any
    tokenizer: Any
    label: int
    reading: str
    max_length: int
    batch_size: int = 32
    spec: str = ""

    @classmethod
    def load(cls, spec: str, device: str | torch.device = "cpu") -> ClassifierReward:
        """Load ``hf:PATH[#LABEL[:logit|:probability]]``; safetensors only, and no code of the checkpoint's.

        Raises:
            InvalidArgumentError: no such checkpoint, label or reading, or several labels and none named.
        """
        path, _, choice = spec.removeprefix("hf:").partition("#")
        model, tokenizer = _load_checkpoint(spec, path)
        label, reading = _choose(spec, model.config, choice)
        name = Path(path).name + (f"-{model.config.id2label[label]}" if model.config.num_labels > 1 else "")
        return cls(name, model.to(device).eval(), tokenizer, label, reading, _max_length(model, tokenizer))

    @property
    def bounds(self) -> tuple[float, float] | None:
        return (0.0, 1.0) if self.reading == "probability" else None

    @torch.inference_mode()
    def __call__(self, prompts: list[str], responses: list[str]) -> list[float]:
        order = sorted(range(len(responses)), key=lambda index: len(responses[index]))
        rewards = [0.0] * len(responses)
        for start in range(0, len(order), self.batch_size):
            chunk = order[start : start + self.batch_size]
            for index, reward in zip(chunk, self._score([responses[i] for i in chunk]), strict=True):
                rewards[index] = reward
        return rewards

    def _score(self, texts: list[str]) -> list[float]:
        batch = self.tokenizer(texts, padding=True, truncation=True, max_length=self.max_length, return_tensors="pt")
        if batch["input_ids"].shape[1] == 0:
            raise ValueError("an empty text has no tokens; use a classifier whose tokenizer adds special tokens")
        batch = {key: tensor.to(self.model.device) for key, tensor in batch.items() if key != "token_type_ids"}
        logits = self.model(**batch).logits.float()
        if self.reading == "probability":
            several = self.model.config.problem_type == "multi_label_classification" or logits.shape[1] == 1
            logits = logits.sigmoid() if several else logits.softmax(-1)
        return logits[:, self.label].tolist()


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


def _choose(spec: str, config: Any, choice: str) -> tuple[int, str]:
    name, _, reading = choice.rpartition(":") if choice.endswith(tuple(f":{r}" for r in READINGS)) else (choice, "", "")
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
    return label, reading or ("logit" if config.num_labels == 1 else "probability")


def _max_length(model: Any, tokenizer: Any) -> int:
    positions = getattr(model.config, "max_position_embeddings", None) or 512
    # RoBERTa's kin number positions from the padding id on, so two of their position embeddings are never
    # reached.
    reserved = getattr(tokenizer, "pad_token_id", 0) + 1 if "roberta" in model.config.model_type else 0
    return int(min(positions - reserved, tokenizer.model_max_length))
