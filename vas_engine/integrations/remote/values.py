"""Values of texts: value models that read the same text as the endpoint's model, by tokenizers of their own."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vas_engine.errors import InvalidArgumentError
from vas_engine.integrations.value_models import PrefixValues, Values, load_value_model
from vas_engine.model.fingerprint import vocabulary_hash
from vas_engine.params import SamplingParams
from vas_engine.tokenizer import load_tokenizer
from vas_engine.values.artifact import BACKBONE_FOLDER
from vas_engine.values.config import HeadConfig
from vas_engine.values.value_model import ValueModel

Source = str | Path | ValueModel


class Ask(NamedTuple):
    """A place of a text that is to be valued.

    Attributes:
        key: the sequence; what it shares with the last call under this key is not run again.
        text: of the state, prompt included.
        ids: the endpoint's token ids of it, where they are known.
        candidates: (text, endpoint's token id where known, whether it ends the text).
        params: how it is guided.
    """

    key: Hashable
    text: str
    ids: list[int] | None
    candidates: Sequence[tuple[str, int | None, bool]]
    params: SamplingParams


# Pages of one token: a candidate that re-encodes to several tokens then shares all of the prefix.
BLOCK_SIZE = 1


class TextValues:
    """Value models with their tokenizers.

    Args:
        sources: name -> folder or ValueModel, all of kind "model".
        tokenizers: name -> tokenizer of a value (folder or object); what is not named is looked for in the value's
            folder, then taken from `tokenizer`.
        tokenizer: of the endpoint's model, or None.

    Raises:
        InvalidArgumentError: a value of another kind, or without a tokenizer. ValueArtifactError: as `load_value`.
    """

    def __init__(
        self, sources: Mapping[str, Source], tokenizers: Mapping[str, Any] | None = None, tokenizer: Any | None = None
    ) -> None:
        given = dict(tokenizers or {})
        for name in given:
            if name not in sources:
                raise InvalidArgumentError("value_tokenizers", name, f"no such value; there are {sorted(sources)}")
        models = {n: s if isinstance(s, ValueModel) else load_value_model(s) for n, s in sources.items()}
        self.values = Values(models)
        self.digests = {name: _digest(source) for name, source in sources.items()}
        """What tells values of one name apart."""
        self._readers = []
        for name, model in models.items():
            own = _own_tokenizer(name, sources[name], model, given.get(name), tokenizer)
            same = tokenizer is not None and own.get_vocab() == tokenizer.get_vocab()
            self._readers.append(_Reader(PrefixValues(model, BLOCK_SIZE), own, same))

    @property
    def read_text(self) -> bool:
        """Whether any value has to be given text, for want of the endpoint's own vocabulary."""
        return any(not reader.same for reader in self._readers)

    @property
    def names(self) -> list[str]:
        return self.values.names

    @property
    def heads(self) -> dict[str, HeadConfig]:
        """The head behind each name."""
        return self.values.heads

    def tilts(self, asks: Sequence[Ask]) -> list[tuple[np.ndarray, np.ndarray]]:
        """T of the candidates and V of the state and of each of them, as `Values.tilts`, of all in one pass."""
        outputs = [reader.outputs(asks) for reader in self._readers]
        return self.values.tilts(outputs, [ask.params for ask in asks])

    def forget(self, key: Hashable) -> None:
        for reader in self._readers:
            reader.cache.forget(key)


class _Reader:
    """One value model with its tokenizer."""

    def __init__(self, cache: PrefixValues, tokenizer: Any, same: bool) -> None:
        self.cache, self.tokenizer, self.same = cache, tokenizer, same

    def outputs(self, asks: Sequence[Ask]) -> list[Tensor]:
        """Head outputs of each [1 + candidates, O], the state's first."""
        keys: list[Hashable] = []
        prefixes: list[list[int]] = []
        longer: list[list[list[int]]] = []
        lines: list[list[int]] = []  # of each ask: where its rows are among all that come back
        count = 0
        for ask, encoded in zip(asks, self._encode(asks), strict=True):
            # As lists compare, what the least and the greatest share is shared by all.
            pairs = enumerate(zip(min(encoded), max(encoded), strict=False))
            shared = next((place for place, (a, b) in pairs if a != b), min(map(len, encoded)))
            if shared:
                keys.append(ask.key)
                prefixes.append(encoded[0][:shared])
                longer.append([row[shared:] for row in encoded if len(row) > shared])
                places = itertools.count(count + 1)
                lines.append([next(places) if len(row) > shared else count for row in encoded])
                count = next(places)
            else:  # nothing in common: each by itself
                keys += [(ask.key, place) for place in range(len(encoded))]
                prefixes += encoded
                longer += [[]] * len(encoded)
                lines.append([count + place for place in range(len(encoded))])
                count += len(encoded)
        found = torch.cat(self.cache.score(keys, prefixes, longer))
        for gone in set(keys).difference(ask.key for ask in asks):
            self.cache.forget(gone)
        return [found[own] for own in lines]

    def _encode(self, asks: Sequence[Ask]) -> list[list[list[int]]]:
        """Of each: tokens of the state, and of the state with each candidate."""
        results: list[list[list[int]]] = [[] for _ in asks]
        texts, owners = [], []
        for ask, encoded in zip(asks, results, strict=True):
            if self.same and ask.ids is not None:
                known = [token for _, token, _ in ask.candidates if token is not None]
                encoded += [ask.ids, *([*ask.ids, token] for token in known)]
            else:
                texts += [ask.text, *(ask.text if ends else ask.text + more for more, _, ends in ask.candidates)]
                owners += [encoded] * (1 + len(ask.candidates))
        if texts:
            for encoded, row in zip(owners, self.tokenizer(texts)["input_ids"], strict=True):
                encoded.append(list(row))
        end = self.tokenizer.eos_token_id
        if end is None:
            return results
        for ask, encoded in zip(asks, results, strict=True):
            if not (self.same and ask.ids is not None):
                # The end of the text is a token of the value's own.
                for row, (_, _, ends) in zip(encoded[1:], ask.candidates, strict=True):
                    row += [end] if ends else []
        return results


def _digest(source: Source) -> str | None:
    config = None if isinstance(source, ValueModel) else Path(source) / "config.json"
    return None if config is None else hashlib.sha256(config.read_bytes()).hexdigest()


def _own_tokenizer(name: str, source: Source, model: ValueModel, given: Any, shared: Any) -> Any:
    """The tokenizer that a value reads text by, of the vocabulary it was trained on where that is known."""
    if given is not None:
        found = load_tokenizer(None, given, None, required=True)
    else:
        folders = [] if isinstance(source, ValueModel) else [Path(source), Path(source) / BACKBONE_FOLDER]
        beside = [folder for folder in folders if (folder / "tokenizer.json").is_file()]
        found = load_tokenizer(beside[0], None, None, required=True) if beside else shared
    if found is None:
        fix = (
            "its folder holds no tokenizer; name it (value_tokenizers, --value-tokenizer), or the endpoint's tokenizer"
        )
        raise InvalidArgumentError("values", name, fix)
    wanted = model.config.base.get("vocabulary")
    if wanted is not None and wanted != vocabulary_hash(found):
        fix = "was trained with another tokenizer; name that one (value_tokenizers, --value-tokenizer)"
        raise InvalidArgumentError("values", name, fix)
    return found
