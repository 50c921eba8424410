"""Text for the example: find it, train a tokenizer on it, cut it into blocks of equal length."""

import random
import sysconfig
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

VOCAB_SIZE = 4096
END_OF_TEXT = "<|endoftext|>"
PIECE_CHARS = 16_384  # a longer text is cut, so that progress shows and no text takes the whole byte limit
HELD_OUT_SHARE = 0.03

# Installed packages and tests are not the standard library; the last two folders hold tables, not code.
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "encodings", "pydoc_data"}


@dataclass(frozen=True)
class TextBlocks:
    """Token ids `[num_blocks, seq_len]` to train on and to evaluate with."""

    train: torch.Tensor
    held_out: torch.Tensor


TokenizerAndBlocks = tuple[PreTrainedTokenizerBase, TextBlocks]


class BlockDataset(Dataset[dict[str, torch.Tensor]]):
    """The rows of a tensor of token ids, as causal-language-model samples."""

    def __init__(self, blocks: torch.Tensor) -> None:
        self.blocks = blocks

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.blocks[index], "labels": self.blocks[index]}


def read_texts(data: str | None, max_bytes: int) -> list[str]:
    """Texts of up to `PIECE_CHARS` characters, about `max_bytes` together, in an order that depends on `data` alone."""
    if data is None:
        source = _read_folder(Path(sysconfig.get_path("stdlib")), "*.py", skip=SKIPPED_FOLDERS)
    elif Path(data).is_file():
        source = iter([Path(data).read_text(encoding="utf-8")])
    elif Path(data).is_dir():
        source = _read_folder(Path(data), "*")
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


def _read_folder(folder: Path, pattern: str, skip: Collection[str] = ()) -> Iterator[str]:
    files = sorted(path for path in folder.rglob(pattern) if path.is_file())
    random.Random(0).shuffle(files)  # a byte limit must not mean "the files that start with a and b"
    for path in files:
        if any(part in skip or part.startswith(".") for part in path.relative_to(folder).parts):
            continue
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
    blocks = make_blocks(texts, tokenizer, seq_len)
    num_held_out = min(max(1, int(len(blocks) * HELD_OUT_SHARE / multiple)), 8) * multiple
    if len(blocks) < num_held_out + multiple:
        raise ValueError(
            f"--data ({data}) has {len(blocks)} sequences of --seq-len ({seq_len}) but must have"
            f" {num_held_out + multiple}; use more text, shorter sequences or a smaller --batch-size."
        )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder / "tokenizer")
    parts = {"train": blocks[:-num_held_out].clone(), "held_out": blocks[-num_held_out:].clone()}
    torch.save(parts, folder / "blocks.pt")  # cloned, since a view is saved with all that it views


def load(folder: Path) -> TokenizerAndBlocks:
    """What `prepare` wrote; every rank calls this."""
    blocks = TextBlocks(**torch.load(folder / "blocks.pt"))
    return AutoTokenizer.from_pretrained(folder / "tokenizer"), blocks
