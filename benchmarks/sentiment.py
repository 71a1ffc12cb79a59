"""A small sentiment classifier, trained from nothing in a minute or two on one core, to be used as a reward.

    python -m benchmarks.sentiment --out runs/sentiment
    vas collect MODEL --prompts P --reward "mood=hf:runs/sentiment#positive" --out runs/mood

A BERT of half a million parameters over a WordPiece vocabulary of its own learns from the sentences of
sentence_polarity (Pang and Lee, 2005), the words of opinion_lexicon (Hu and Liu, 2004) and passages of
movie_reviews (Pang and Lee, 2004). A tenth of the sentences and of the reviews is held out.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import time
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from tqdm import tqdm
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

LABELS = ("negative", "positive")
LONGEST = 128
PASSAGES = 2000
"""Of an epoch; there are ten times as many, which say less about a sentence than the sentences do."""
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")

Example = tuple[str, int]
"""A text and its label's index."""


@dataclass(frozen=True)
class Settings:
    """Of the model and its training."""

    vocabulary: int = 8000
    width: int = 64
    layers: int = 1
    epochs: int = 8
    batch: int = 64
    lr: float = 1e-3
    weight_decay: float = 0.05
    dropout: float = 0.3
    passage_words: int = 60
    seed: int = 0


@dataclass(frozen=True)
class Corpus:
    """What there is to learn from, and what is held out."""

    sentences: list[Example]
    passages: list[Example]
    words: list[Example]
    heldout_sentences: list[Example]
    heldout_passages: list[Example]


def read_corpus(folder: Path, settings: Settings) -> Corpus:
    """Read the archives; whole reviews are held out, so no passage's neighbour is trained on."""
    chance = random.Random(settings.seed)
    sentences, reviews, words = [], [], []
    for label, (ending, name) in enumerate((("neg", "negative"), ("pos", "positive"))):
        lines = _lines(folder, "sentence_polarity", f"sentence_polarity/rt-polarity.{ending}")
        sentences += [(line, label) for line in lines]
        lexicon = _lines(folder, "opinion_lexicon", f"opinion_lexicon/{name}-words.txt")
        words += [(line, label) for line in lexicon if not line.startswith(";")]
        with zipfile.ZipFile(folder / "movie_reviews.zip") as archive:
            names = sorted(n for n in archive.namelist() if re.fullmatch(rf"movie_reviews/{ending}/.*\.txt", n))
            reviews += [(archive.read(n).decode("latin-1").split(), label) for n in names]
    chance.shuffle(sentences)
    chance.shuffle(reviews)
    kept, held = len(sentences) // 10, len(reviews) // 10

    def passages(part: list[tuple[list[str], int]]) -> list[Example]:
        size = settings.passage_words
        pieces = [(tokens[at : at + size], label) for tokens, label in part for at in range(0, len(tokens), size)]
        return [(" ".join(piece), label) for piece, label in pieces if len(piece) > size // 2]

    return Corpus(sentences[kept:], passages(reviews[held:]), words, sentences[:kept], passages(reviews[:held]))


def _lines(folder: Path, archive: str, member: str) -> list[str]:
    with zipfile.ZipFile(folder / f"{archive}.zip") as opened:
        return [line.strip() for line in opened.read(member).decode("latin-1").splitlines() if line.strip()]


def make_tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A lower-casing WordPiece tokenizer of these texts."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.train_from_iterator(
        texts, trainers.WordPieceTrainer(vocab_size=vocabulary, special_tokens=list(SPECIAL), show_progress=False)
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=LONGEST,
        truncation_side="left",
    )


def make_model(vocabulary: int, settings: Settings) -> BertForSequenceClassification:
    """An untrained classifier."""
    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=settings.width,
        num_hidden_layers=settings.layers,
        num_attention_heads=4,
        intermediate_size=2 * settings.width,
        max_position_embeddings=LONGEST,
        hidden_dropout_prob=settings.dropout,
        attention_probs_dropout_prob=0.1,
        id2label=dict(enumerate(LABELS)),
        label2id={label: index for index, label in enumerate(LABELS)},
        pad_token_id=0,
    )
    return BertForSequenceClassification(config)


def train(
    model: BertForSequenceClassification, tokenizer: PreTrainedTokenizerFast, corpus: Corpus, settings: Settings
) -> None:
    """Train in place; every epoch puts the sentences together anew, so that texts of all lengths come up."""
    chance = random.Random(settings.seed)
    plans = [_batches(tokenizer, _epoch(corpus, chance), settings.batch, chance) for _ in range(settings.epochs)]
    steps = sum(map(len, plans))
    optimiser = torch.optim.AdamW(model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, settings.lr, total_steps=steps, pct_start=0.1)
    model.train()
    with tqdm(total=steps, desc="train", unit="batch", disable=None) as bar:
        for plan in plans:
            for inputs, labels in plan:
                loss = model(**inputs, labels=labels).loss
                optimiser.zero_grad(set_to_none=True)
                loss.backward()
                optimiser.step()
                schedule.step()
                bar.update()
    model.eval()


def _epoch(corpus: Corpus, chance: random.Random) -> list[Example]:
    """One to four sentences of one label in a row; the words by twos to sixes; a few of the passages."""
    texts = chance.sample(corpus.passages, min(PASSAGES, len(corpus.passages)))
    for label in range(len(LABELS)):
        for examples, least, most in ((corpus.sentences, 1, 4), (corpus.words, 2, 6)):
            pool = [text for text, own in examples if own == label]
            chance.shuffle(pool)
            while pool:
                count = chance.randint(least, most) if chance.random() < 0.5 else least
                texts.append((" ".join(pool[:count]), label))
                del pool[:count]
    return texts


def _batches(
    tokenizer: PreTrainedTokenizerFast, examples: list[Example], size: int, chance: random.Random
) -> list[tuple[dict[str, torch.Tensor], torch.Tensor]]:
    """Padded batches of texts of similar length, in random order."""
    order = sorted(chance.sample(examples, len(examples)), key=lambda example: len(example[0]))
    batches = []
    for start in range(0, len(order), size):
        part = order[start : start + size]
        labels = torch.tensor([label for _, label in part])
        batches.append((_encode(tokenizer, [text for text, _ in part]), labels))
    chance.shuffle(batches)
    return batches


def _encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> dict[str, torch.Tensor]:
    batch = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
    return {key: batch[key] for key in ("input_ids", "attention_mask")}


@torch.inference_mode()
def accuracy(
    model: BertForSequenceClassification, tokenizer: PreTrainedTokenizerFast, examples: list[Example]
) -> float:
    """Share of the texts whose more probable label is theirs."""
    right = 0
    for inputs, labels in _batches(tokenizer, examples, 128, random.Random(0)):
        right += int((model(**inputs).logits.argmax(-1) == labels).sum())
    return right / len(examples)


def main(argv: list[str] | None = None) -> int:
    """Read, train, measure, save."""
    shared = Path(os.environ.get("VAS_SHARED", Path(__file__).resolve().parents[2] / "shared"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=shared / "data" / "sentiment", help="folder of the archives")
    parser.add_argument("--out", type=Path, required=True, help="folder of the classifier")
    parser.add_argument("--epochs", type=int, default=Settings.epochs)
    parser.add_argument("--seed", type=int, default=Settings.seed)
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    args = parser.parse_args(argv)
    settings = Settings(epochs=args.epochs, seed=args.seed)
    report = run(args.data, args.out, settings)
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        print(
            f"{report['parameters']:,} parameters in {report['seconds']:.0f} s; right on "
            f"{report['sentences']:.1%} of {report['heldout_sentences']} held-out sentences, "
            f"{report['passages']:.1%} of {report['heldout_passages']} passages of held-out reviews"
        )
    return 0


def run(data: Path, out: Path, settings: Settings) -> dict[str, Any]:
    """Train on the archives in ``data`` and save to ``out``; the report goes beside the weights."""
    torch.manual_seed(settings.seed)
    started = time.perf_counter()
    corpus = read_corpus(data, settings)
    tokenizer = make_tokenizer([text for text, _ in corpus.sentences + corpus.passages], settings.vocabulary)
    model = make_model(len(tokenizer), settings)
    train(model, tokenizer, corpus, settings)
    report = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "seconds": round(time.perf_counter() - started, 1),
        "heldout_sentences": len(corpus.heldout_sentences),
        "heldout_passages": len(corpus.heldout_passages),
        "sentences": accuracy(model, tokenizer, corpus.heldout_sentences),
        "passages": accuracy(model, tokenizer, corpus.heldout_passages),
        "settings": asdict(settings),
    }
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "training.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report


if __name__ == "__main__":
    raise SystemExit(main())
