"""What all variants of `fluid-hf bench train` share, written once to a folder: random weights, and text to train on.

Weights are made and written one layer at a time, so no process ever holds the whole model. The files are a plain
Hugging Face checkpoint with all experts of a layer in one tensor. The text is Python's own standard library, with a
byte-level BPE tokenizer trained on it; the sequences come in the same order in every variant.
"""

from __future__ import annotations

import copy
import hashlib
import json
import random
import shutil
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

from fluid_hf.bench.shapes import SHAPES
from fluid_hf.bench.train_plan import DEPTHS, TrainPlan
from fluid_hf.errors import ConfigError
from fluid_hf.metrics import model_flops_per_token

__all__ = ["flops_per_token", "read_blocks", "state_bytes", "write_blocks", "write_checkpoint"]

MAX_TOKENIZER = 8192  # tokens that the text's own tokenizer has at most: one of a few megabytes of text has no more
TOKENIZER_BYTES, MAX_BYTES = 2 << 20, 64 << 20
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "encodings", "pydoc_data"}  # no code of its own
SHARDED_BYTES = 16  # of a parameter, over the ranks that hold it: master weight, two moments, their gradient
INDEX = "model.safetensors.index.json"


def write_checkpoint(plan: TrainPlan) -> Path:
    """The checkpoint's folder; written unless an equal one is there already.

    Raises:
        ConfigError: the disk is too full for it.
    """
    from transformers import AutoModelForCausalLM

    config = plan.config
    config.dtype = plan.torch_dtype
    key = hashlib.sha256(config.to_json_string().encode()).hexdigest()
    folder, done = plan.checkpoint, plan.checkpoint / "complete"
    if done.is_file() and done.read_text(encoding="utf-8") == key:
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    needed = sum(weight.numel() for weight in _without_memory(plan).parameters()) * config.dtype.itemsize
    free = shutil.disk_usage(plan.shared).free
    if needed > free:
        raise ConfigError(
            f"--work ({plan.shared}) must have {needed / 1e9:.1f} GB free for the weights, it has {free / 1e9:.1f}; "
            "name a folder on another disk, or fewer --layers."
        )
    folder.mkdir(parents=True)
    places: dict[str, str] = {}
    for layer in tqdm(range(plan.layers), desc="writing random weights", unit="layer", disable=None):
        one = copy.deepcopy(config)
        one.num_hidden_layers, one.vocab_size = 1, config.vocab_size if layer == 0 else 8
        torch.manual_seed(layer)
        model = AutoModelForCausalLM.from_config(one, dtype=torch.float32)
        # The first file also has what is in no layer: embeddings, the last norm, the head.
        kept = {
            name.replace("model.layers.0.", f"model.layers.{layer}."): value.to(plan.torch_dtype).contiguous()
            for name, value in model.state_dict().items()
            if layer == 0 or name.startswith("model.layers.0.")
        }
        file = f"model-{layer + 1:05}-of-{plan.layers:05}.safetensors"
        save_file(kept, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(kept, file)
        config.architectures = [type(model).__name__]
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}), encoding="utf-8")
    config.save_pretrained(folder)
    done.write_text(key, encoding="utf-8")
    return folder


def write_blocks(plan: TrainPlan) -> Path:
    """The file with the token ids of every step, int32 [steps x sequences of a step, tokens].

    Text that is too short for all steps is read again from its start.

    Raises:
        ConfigError: this Python has no sources of its standard library.
    """
    path, rows = plan.text, plan.num_sequences
    if path.is_file():
        return path
    texts = list(_texts())
    if not texts:
        raise ConfigError(
            f"folder ({sysconfig.get_path('stdlib')}) must hold the sources of Python's standard library, the text to "
            "train on; it has none."
        )
    tokenizer, ids = _trained(texts, min(DEPTHS[plan.model][1], MAX_TOKENIZER)), list[int]()
    for text in tqdm(texts, desc="tokenizing", unit="file", disable=None):
        if len(ids) >= rows * plan.sequence:
            break
        ids += tokenizer.encode(text).ids
    stream = torch.tensor(ids, dtype=torch.int32)
    stream = stream.repeat(-(-rows * plan.sequence // len(ids)))[: rows * plan.sequence]
    save_file({"ids": stream.view(rows, plan.sequence).contiguous()}, path)
    return path


def read_blocks(path: str | Path) -> torch.Tensor:
    """What `write_blocks` wrote, as int64."""
    return load_file(path)["ids"].long()


def flops_per_token(plan: TrainPlan) -> float:
    """Of the whole model, forward and backward (`fluid_hf.metrics.model_flops_per_token`); the same in all variants."""
    model = _without_memory(plan)
    layers: dict[str, Any] = {
        name: _WholeExperts(module, SHAPES[plan.model].experts, SHAPES[plan.model].top_k)
        for name, module in model.named_modules()
        if name.endswith(".experts")
    }
    return model_flops_per_token(model, layers, plan.sequence)


def state_bytes(plan: TrainPlan) -> float:
    """Weights, gradients and what ZeRO keeps of them, for a rank of the variants on DeepSpeed."""
    element = torch.finfo(plan.torch_dtype).bits // 8
    total = 0.0
    for name, parameter in _without_memory(plan).named_parameters():
        expert = ".experts." in name
        held = parameter.numel() / (plan.ep if expert else 1)
        shards = plan.ranks // (plan.ep if expert else 1)
        total += held * (element + (element if plan.zero < 2 else element / shards) + SHARDED_BYTES / shards)
    return total


def _without_memory(plan: TrainPlan) -> Any:
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights():
        return AutoModelForCausalLM.from_config(plan.config)


class _WholeExperts:
    """As much of an expert-parallel layer as the count of operations asks for, around experts that are not split."""

    ep_size = 1

    def __init__(self, module: torch.nn.Module, num_experts: int, top_k: int) -> None:
        self.parameters, self.num_experts, self.last_top_k = module.parameters, num_experts, top_k


def _texts() -> Iterator[str]:
    """Sources of the standard library, in a fixed mixed order."""
    folder = Path(sysconfig.get_path("stdlib"))
    files = sorted(path for path in folder.rglob("*.py") if path.is_file())
    random.Random(0).shuffle(files)
    num_bytes = 0
    for path in files:
        if num_bytes < MAX_BYTES and not SKIPPED_FOLDERS.intersection(path.relative_to(folder).parts):
            text = path.read_text(encoding="utf-8", errors="ignore")
            num_bytes += len(text)
            yield text


def _trained(texts: list[str], vocabulary: int) -> Tokenizer:
    """A byte-level BPE tokenizer, from the first megabytes of the text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=alphabet, show_progress=False)
    sample, num_bytes = list[str](), 0
    for text in texts:
        if num_bytes < TOKENIZER_BYTES:
            sample.append(text)
            num_bytes += len(text)
    tokenizer.train_from_iterator(sample, trainer)
    return tokenizer
