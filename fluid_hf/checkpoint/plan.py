"""Which tensor of a Hugging Face checkpoint goes to which file, decided from shapes alone."""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from fluid_hf.checkpoint.files import TensorSpec
from fluid_hf.checkpoint.gather import as_stored

__all__ = ["SavePlan", "to_checkpoint_layout"]

LAYER = re.compile(r"(.*?\.\d+)\.")


@dataclass(frozen=True)
class SavePlan:
    """Files of a checkpoint.

    Attributes:
        units: names of the model's weights in groups that are converted to the checkpoint's layout together.
        files: names and shapes of each file's tensors.
        weights_name: file of an unsharded model.
        index_name: index of a sharded one.
        original_format: whether tensors are saved under the names they have on the Hub.
    """

    units: list[list[str]]
    files: dict[str, dict[str, TensorSpec]]
    weights_name: str
    index_name: str
    original_format: bool

    @classmethod
    def make(cls, model: Any, specs: Mapping[str, TensorSpec], options: dict[str, Any]) -> SavePlan:
        """Plan for weights of these names and shapes; `options` are those of transformers' `save_pretrained`."""
        variant = f".{options['variant']}" if options.get("variant") else ""
        original = bool(options.get("save_original_format", True))
        ignored = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
        names = [name for name in specs if name not in ignored]
        whole = _converted(model, names, specs, original)
        units = _by_layer(names)
        # One layer at a time, unless a conversion joins weights of several layers.
        tensors: dict[str, TensorSpec] = {}
        for unit in units:
            tensors.update(_converted(model, unit, specs, original))
        if tensors != whole:
            units, tensors = [names], whole
        stem = f"model{variant}"
        split = split_torch_state_dict_into_shards(
            # A meta view of a chunk would count as the whole chunked tensor.
            {name: spec.meta() for name, spec in tensors.items()},
            filename_pattern=f"{stem}{{suffix}}.safetensors",
            max_shard_size=options.get("max_shard_size") or _default_shard_size(),
        )
        files = {
            file: {name: tensors[name] for name in names} for file, names in split.filename_to_tensors.items() if names
        }
        return cls(units, files, f"{stem}.safetensors", f"model.safetensors.index{variant}.json", original)

    @property
    def num_bytes(self) -> int:
        """Size of all tensors."""
        return sum(spec.num_bytes for file in self.files.values() for spec in file.values())

    def index(self, total_parameters: int) -> dict[str, Any]:
        """Contents of the index file."""
        return {
            "metadata": {"total_parameters": total_parameters, "total_size": self.num_bytes},
            "weight_map": {name: file for file, tensors in self.files.items() for name in tensors},
        }


def to_checkpoint_layout(
    model: Any, tensors: dict[str, torch.Tensor], original_format: bool
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors under the names and in the layout of the model's checkpoints on the Hub (experts one by one)."""
    tensors = as_stored(model, tensors)
    if original_format:
        with _whole_parameters(model, tensors):
            tensors = revert_weight_conversion(model, tensors)
    yield from tensors.items()


@contextlib.contextmanager
def _whole_parameters(model: Any, tensors: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """While it lasts, `model.get_parameter` gives these tensors: some converters ask it for the shape of a weight.

    The patched model has none of that name, or a share of it.
    """
    own, bound = model.get_parameter, vars(model).get("get_parameter")
    model.get_parameter = lambda name: tensors[name] if name in tensors else own(name)
    try:
        yield
    finally:
        del model.get_parameter
        if bound is not None:
            model.get_parameter = bound


def _converted(
    model: Any, names: list[str], specs: Mapping[str, TensorSpec], original_format: bool
) -> dict[str, TensorSpec]:
    tensors = {name: specs[name].meta() for name in names}
    return {name: TensorSpec.of(t) for name, t in to_checkpoint_layout(model, tensors, original_format)}


def _by_layer(names: list[str]) -> list[list[str]]:
    groups: dict[str, list[str]] = {}
    for name in names:
        match = LAYER.match(name)
        groups.setdefault(match.group(1) if match else "", []).append(name)
    return list(groups.values())


def _default_shard_size() -> Any:
    return inspect.signature(PreTrainedModel.save_pretrained).parameters["max_shard_size"].default
