"""Train the demo language model: a byte-level BPE tokenizer and a small Llama, on the stories of `corpus`.

Examples:
    python -m vas_engine.demo.train_lm --out my_model                 # about ten minutes on two CPU cores
    python -m vas_engine.demo.train_lm --out quick --steps 500        # a rough one, in a minute or so

The folder appears only when all is done; an interrupted run leaves nothing behind.
"""

import argparse
import math
import random
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm import tqdm
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from vas_engine.demo.corpus import generate_texts
from vas_engine.files import replacing

__all__ = ["build_model", "heldout_loss", "train", "train_tokenizer"]

BOS, EOS = "<s>", "</s>"
Batch = tuple[torch.Tensor, torch.Tensor]
VOCAB_SIZE = 1536
MAX_LENGTH = 256
IGNORED_LABEL = -100
# Held-out texts come from seeds that training, which counts up from its own seed, does not reach.
HELDOUT_SEED = 1_000_003
HELDOUT_TEXTS = 1000
TEXTS_PER_POOL = 1000


def train_tokenizer(texts: Iterator[str], vocab_size: int = VOCAB_SIZE) -> PreTrainedTokenizerFast:
    """Train a lossless byte-level BPE (GPT-2's leading spaces) that puts bos in front of what it encodes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[BOS, EOS], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Return an untrained Llama of about a million parameters: grouped-query attention, tied embeddings."""
    special = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=True,
        # Nearer to hidden_size ** -0.5 than Llama's 0.02, which suits wide models: this one learns faster so.
        initializer_range=0.06,
        **special,
    )
    model = LlamaForCausalLM(config)
    # Plain sampling from the model's own distribution: Hugging Face would cut it to the top 50 otherwise.
    model.generation_config = GenerationConfig(do_sample=True, top_k=0, **special)
    return model


def encode_batch(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Batch:
    """Return token ids and labels, both ``[texts, longest]``: bos, text, eos, padding that bears no loss."""
    rows = [[*ids, tokenizer.eos_token_id] for ids in tokenizer(texts)["input_ids"]]
    longest = min(MAX_LENGTH, max(map(len, rows)))
    ids = torch.full((len(rows), longest), tokenizer.pad_token_id)
    labels = torch.full_like(ids, IGNORED_LABEL)
    for row, tokens in enumerate(rows):
        kept = torch.tensor(tokens[:longest])
        ids[row, : len(kept)] = labels[row, : len(kept)] = kept
    return ids, labels


def batches(tokenizer: PreTrainedTokenizerFast, size: int, seed: int) -> Iterator[Batch]:
    """Yield fresh batches of about `size` characters for ever, each of texts of one length, so hardly padded.

    Batches are equal in characters, not in texts: with the mean loss of each, short texts would else weigh
    more than their share of tokens, and the model would end its texts too early.
    """
    shuffler = random.Random(seed)
    while True:
        seed += 1
        pool: list[list[str]] = [[]]
        for text in sorted(generate_texts(TEXTS_PER_POOL, seed), key=len):
            if sum(map(len, pool[-1])) + len(text) > size:
                pool.append([])
            pool[-1].append(text)
        shuffler.shuffle(pool)
        for texts in pool:
            yield encode_batch(tokenizer, texts)


@torch.inference_mode()
def heldout_loss(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> float:
    """Return the mean loss of `texts` in nats per token, eos counted and bos not."""
    total = count = 0.0
    texts = sorted(texts, key=len)
    for start in range(0, len(texts), 64):
        ids, labels = encode_batch(tokenizer, texts[start : start + 64])
        tokens = int((labels[:, 1:] != IGNORED_LABEL).sum())
        total += model(input_ids=ids, labels=labels).loss.item() * tokens
        count += tokens
    return total / count


def learning_rate_factor(step: int, steps: int) -> float:
    """Return the share of the peak learning rate at `step`: a short linear warm-up, then a cosine to 2 %."""
    warmup = min(100, steps // 10 + 1)
    progress = max(0.0, (step - warmup) / max(1, steps - warmup))
    return min(1.0, (step + 1) / warmup) * (0.02 + 0.98 * (1 + math.cos(math.pi * progress)) / 2)


def train(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    steps: int,
    batch_size: int,
    peak_rate: float,
    seed: int,
) -> None:
    """Train `model` in place with AdamW for `steps` batches of about `batch_size` characters."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=peak_rate, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, steps))
    model.train()
    stream = batches(tokenizer, batch_size, seed)
    progress = tqdm(range(steps), unit="step")
    for step in progress:
        ids, labels = next(stream)
        # Padding stands on the right, where causal attention hides it from every real token.
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}")
    model.eval()


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write the model folder `out` as a whole or not at all, in float32."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    summary, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m vas_engine.demo.train_lm",
        description=summary,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = partial(parser.add_argument, metavar="N")
    parser.add_argument("--out", type=Path, required=True, help="folder to create; must not exist yet")
    add("--steps", type=int, default=5000, help="optimizer steps (default: %(default)s)")
    add("--batch-size", type=int, default=7000, help="characters per step (default: %(default)s)")
    add("--learning-rate", type=float, default=4e-3, help="peak rate (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the weights and the texts (default: %(default)s)")
    add("--threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.out.exists():
        parser.error(f"{arguments.out} exists: name a folder that does not, or move that one away")
    return arguments


def main() -> None:
    """Train, measure the held-out loss, save."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    tokenizer = train_tokenizer(generate_texts(20_000, arguments.seed))
    model = build_model(tokenizer)
    started = time.perf_counter()
    train(model, tokenizer, arguments.steps, arguments.batch_size, arguments.learning_rate, arguments.seed)
    seconds = time.perf_counter() - started
    loss = heldout_loss(model, tokenizer, list(generate_texts(HELDOUT_TEXTS, HELDOUT_SEED)))
    save(model, tokenizer, arguments.out)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{arguments.out}: {parameters:,} parameters, {len(tokenizer)} tokens in the vocabulary,")
    print(f"held-out loss {loss:.4f} nats per token, trained in {seconds:.0f} s")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("interrupted; nothing was written") from None
