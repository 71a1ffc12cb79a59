"""A value model: a language model of its own with heads on its last hidden state."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.utils import logging

from vas_engine.errors import InvalidArgumentError, UnsupportedModelError, ValueArtifactError, VASError
from vas_engine.model.lm import CausalLM
from vas_engine.model.loader import read_whole
from vas_engine.model.ranks import sharding
from vas_engine.values.base import base_fingerprint, check_base
from vas_engine.values.config import HeadConfig, ValueConfig
from vas_engine.values.heads import Heads

if TYPE_CHECKING:
    from vas_engine.model.batch import AttentionBatch
    from vas_engine.model.branches import Branches
    from vas_engine.model.cache import KVCache, LayerShape


def load_backbone(folder: str | Path, lm: CausalLM) -> CausalLM:
    """The LM of a checkpoint without its head, in the base model's dtype and on its device; safetensors only.

    Ranks that share the base model share it too where its heads divide among them; else each has all of it.

    Raises:
        ValueArtifactError: not a readable Hugging Face folder, or weights are missing.
        UnsupportedModelError: attention that is not honoured.
    """
    verbosity = logging.get_verbosity()
    # The heads that came with the checkpoint are reported as unexpected; what is missing is an error.
    logging.set_verbosity_error()
    try:
        shares = _shares(folder, lm.tensor_parallel_size)
        model = read_whole(AutoModel, folder, ValueArtifactError, dtype=lm.dtype, **shares)
    except (OSError, ValueError, ImportError, SafetensorError, StrictDataclassError) as error:
        raise ValueArtifactError(f"{folder}: no readable Hugging Face model in safetensors ({error})") from error
    finally:
        logging.set_verbosity(verbosity)
    return CausalLM.load(model, device=lm.device, dtype=lm.dtype, attention_backend=lm.attention_backend)


def _shares(folder: str | Path, ranks: int) -> dict[str, Any]:
    if ranks == 1:
        return {}
    try:
        return sharding(AutoConfig.from_pretrained(str(folder), trust_remote_code=False), ranks)
    except UnsupportedModelError:
        return {}


class ValueModel(nn.Module):
    """Values tokens by a separate Hugging Face LM with the base model's vocabulary (the paper's own set-up).

    Its pages hang on the base model's block tables. Unlike the base model it can be trained: its parameters
    ask for gradients.

    Args:
        config: settings, kind "model".
        backbone: its LM, with or without a language-model head (which is not used).
    """

    def __init__(self, config: ValueConfig, backbone: CausalLM) -> None:
        super().__init__()
        if config.kind != "model":
            raise InvalidArgumentError(
                "kind", config.kind, "a value model has kind 'model'; use ValueNetwork for the others"
            )
        if config.hidden_size != backbone.hidden_size:
            raise InvalidArgumentError(
                "hidden_size", config.hidden_size, f"the backbone has hidden states of {backbone.hidden_size}"
            )
        self.config = config
        self.lm_of_values = backbone
        self.backbone: Any = backbone.backbone
        self.backbone.requires_grad_(True)
        self.heads = Heads(config, config.hidden_size).to(backbone.device)
        self.bound = False

    @classmethod
    def create(
        cls,
        backbone: CausalLM | PreTrainedModel | str | Path,
        lm: CausalLM,
        rewards: Sequence[str | HeadConfig],
        tokenizer: Any | None = None,
        head_hidden: int = 0,
    ) -> ValueModel:
        """A value model to be trained: a backbone with fresh heads, bound to the base model.

        Args:
            backbone: the LM to start from, of the base model's vocabulary. A loaded model is taken over, not
                copied.
            lm: the base model.
            rewards: one head each: a name or a complete HeadConfig.
            head_hidden: hidden width of the heads, 0 for linear ones.
        """
        if isinstance(backbone, PreTrainedModel):
            backend = lm.attention_backend
            backbone = CausalLM.load(backbone, device=lm.device, dtype=lm.dtype, attention_backend=backend)
        elif not isinstance(backbone, CausalLM):
            backbone = load_backbone(backbone, lm)
        heads = tuple(r if isinstance(r, HeadConfig) else HeadConfig(name=r, reward=r) for r in rewards)
        config = ValueConfig(
            kind="model",
            heads=heads,
            hidden_size=backbone.hidden_size,
            vocab_size=backbone.vocab_size,
            head_norm=False,
            head_hidden=head_hidden,
        )
        return cls(config, backbone).bind(lm, tokenizer)

    @property
    def input(self) -> str:
        """ "token"."""
        return self.config.input

    @property
    def states(self) -> tuple[int, ...]:
        """Reads no hidden state of the base."""
        return ()

    @property
    def cache(self) -> KVCache | None:
        """The backbone's pages."""
        return self.lm_of_values.cache

    @property
    def cache_layers(self) -> list[LayerShape]:
        """What the backbone's pages hold per token."""
        return self.lm_of_values.layer_shapes

    @property
    def cache_dtype(self) -> torch.dtype:
        """Dtype of the backbone's pages."""
        return self.lm_of_values.dtype

    @property
    def max_model_len(self) -> int:
        """Positions the backbone was made for."""
        return self.lm_of_values.max_model_len

    @property
    def num_parameters(self) -> int:
        """Parameters of backbone and heads."""
        return sum(parameter.numel() for parameter in self.parameters())

    def bind(self, lm: CausalLM, tokenizer: Any | None = None) -> ValueModel:
        """Checks that vocabulary (and tokenizer, where both are known) are the base model's.

        Raises:
            ValueArtifactError: another vocabulary or tokenizer.
        """
        check_base(self.config, lm, tokenizer)
        if not self.config.base:
            self.config = self.config.replace(base=base_fingerprint(lm, tokenizer))
        self.bound = True
        return self

    def allocate(self, num_blocks: int, block_size: int) -> None:
        """Makes the backbone's pages."""
        self.lm_of_values.allocate(num_blocks, block_size)

    def compile(self) -> None:
        """Has the LM run code of torch.compile from now on; its weights are to stay as they are.

        Raises:
            VASError: torch.compile does not work here.
        """
        self.lm_of_values.compile()

    @torch.inference_mode()
    def score(
        self,
        token_ids: Tensor,
        hidden: Tensor | None,
        hidden_index: Tensor | None,
        batch: AttentionBatch,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Head output of rows; see ``Scorer.score``. ``hidden`` and ``hidden_index`` are not read."""
        return self.heads(self.features(token_ids, hidden, hidden_index, batch, rows))

    @torch.inference_mode()
    def features(
        self,
        token_ids: Tensor,
        hidden: Tensor | None,
        hidden_index: Tensor | None,
        batch: AttentionBatch,
        rows: Tensor | None = None,
    ) -> Tensor:
        """The LM's last hidden state of rows; see ``Scorer.features``."""
        if not self.bound:
            raise VASError("this value model is not bound to a base model: call bind(lm) first")
        last = self.lm_of_values.forward(token_ids, batch).last_hidden
        return last if rows is None else last.index_select(0, rows)

    @property
    def version(self) -> tuple:
        """Always the same: nothing is made of the weights."""
        return ()

    @property
    def served_heads(self) -> Heads:
        """The heads."""
        return self.heads

    def commit(self, rows: Tensor, slots: Tensor) -> None:
        """K/V of unslotted rows (int64 [n]) of the last ``score`` to slots (int64 [n])."""
        self.lm_of_values.commit(rows, slots)

    def train_values(
        self, lm: CausalLM | None, tokens: Tensor, lengths: Tensor, branches: Branches | None = None
    ) -> Tensor:
        """Head output [B, T (+ P K), O] float32 with autograd through heads and backbone; ``lm`` is not read."""
        return self.heads(self.lm_of_values.dense(tokens, lengths, branches=branches).last_hidden)
