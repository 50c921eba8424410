"""Text for the example: find it, train a tokenizer on it, cut it into blocks of equal length."""

import random
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

VOCAB_SIZE = 4096
END_OF_TEXT = "<|endoftext|>"
PIECE_CHARS = 16_384  # a long file is cut into pieces of about this size, so that every file gives a held-out part
HELD_OUT_SHARE = 0.03

# Installed packages and tests are not the standard library; the last two folders hold tables, not code.
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "encodings", "pydoc_data"}


@dataclass(frozen=True)
class TextBlocks:
    """Token ids `[num_blocks, seq_len]` to train on and to evaluate with."""

    train: torch.Tensor
    held_out: torch.Tensor


class BlockDataset(Dataset[dict[str, torch.Tensor]]):
    """The rows of a tensor of token ids, as causal-language-model samples."""

    def __init__(self, blocks: torch.Tensor) -> None:
        self.blocks = blocks

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.blocks[index], "labels": self.blocks[index]}


def read_texts(data: str | None, max_bytes: int) -> list[str]:
    """Texts of up to `PIECE_CHARS` characters, in an order that depends on `data` alone, `max_bytes` together."""
    if data is None:
        stdlib = Path(sysconfig.get_path("stdlib"))
        source = _read_files(p for p in stdlib.rglob("*.py") if not SKIPPED_FOLDERS & set(p.parts[len(stdlib.parts) :]))
    elif Path(data).exists():
        path = Path(data)
        source = _read_files([path] if path.is_file() else path.rglob("*"))
    else:
        source = _read_hub_dataset(data)
    texts: list[str] = []
    num_bytes = 0
    for text in source:
        for piece in _split(text):
            if num_bytes >= max_bytes:
                return texts
            texts.append(piece)
            num_bytes += len(piece.encode())
    if not texts:
        raise ValueError(f"--data ({data}) holds no text; name a file, a folder or a Hugging Face dataset with text.")
    return texts


def _read_files(paths: Iterable[Path]) -> Iterator[str]:
    files = sorted(p for p in paths if p.is_file() and not any(part.startswith(".") for part in p.parts[-2:]))
    random.Random(0).shuffle(files)  # a byte limit must not mean "the files that start with a and b"
    for path in files:
        try:
            yield path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a binary file in a folder of text


def _read_hub_dataset(name: str) -> Iterator[str]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError(
            f"--data ({name}) is no file or folder; to read a Hub dataset: pip install datasets"
        ) from error
    path, _, config = name.partition(":")
    for row in load_dataset(path, config or None, split="train", streaming=True):
        text = row.get("text") or next((value for value in row.values() if isinstance(value, str)), "")
        if text.strip():
            yield text


def _split(text: str) -> Iterator[str]:
    start = 0
    while start < len(text):
        end = len(text)
        if end - start > PIECE_CHARS:
            line_end = text.rfind("\n", start, start + PIECE_CHARS)
            end = line_end + 1 if line_end > start else start + PIECE_CHARS
        yield text[start:end]
        start = end


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer, trained on `texts`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(tqdm(texts, desc="training the tokenizer", unit="text"), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT
    )


def make_blocks(texts: list[str], tokenizer: PreTrainedTokenizerBase, seq_len: int) -> torch.Tensor:
    """All texts as token ids, an end-of-text token after each, cut into rows of `seq_len` (the rest is dropped)."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids: list[int] = []
    for text in tqdm(texts, desc="tokenizing", unit="text"):
        ids += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] + end
    num_blocks = len(ids) // seq_len
    return torch.tensor(ids[: num_blocks * seq_len]).view(num_blocks, seq_len)


def prepare(data: str | None, model: str | None, folder: Path, *, seq_len: int, max_bytes: int, multiple: int) -> None:
    """Write tokenizer and blocks to `folder`; `multiple` divides the number of held-out blocks.

    `model` is the pretrained model whose tokenizer is used; None trains a new one. One rank calls this.
    """
    texts = read_texts(data, max_bytes)
    print(f"text: {len(texts)} pieces, {sum(len(t.encode()) for t in texts) / 1e6:.1f} MB", flush=True)
    tokenizer = AutoTokenizer.from_pretrained(model) if model else train_tokenizer(texts)
    num_held_out = max(1, int(len(texts) * HELD_OUT_SHARE))
    held_out = make_blocks(texts[-num_held_out:], tokenizer, seq_len)
    held_out = held_out[: len(held_out) // multiple * multiple][: 8 * multiple]
    train = make_blocks(texts[:-num_held_out], tokenizer, seq_len)
    if not len(train) or not len(held_out):
        raise ValueError(
            f"--data ({data}) is too short: {len(train)} training blocks and {len(held_out)} held-out blocks"
            f" (a multiple of {multiple}) of --seq-len ({seq_len}); use more text or shorter sequences."
        )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder / "tokenizer")
    torch.save({"train": train, "held_out": held_out}, folder / "blocks.pt")


def load(folder: Path) -> tuple[PreTrainedTokenizerBase, TextBlocks]:
    """What `prepare` wrote; every rank calls this."""
    blocks = TextBlocks(**torch.load(folder / "blocks.pt"))
    return AutoTokenizer.from_pretrained(folder / "tokenizer"), blocks
