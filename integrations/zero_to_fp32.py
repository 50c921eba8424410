"""A complete Hugging Face model in float32 from a DeepSpeed checkpoint whose experts are split over ranks.

DeepSpeed's own script of this name does not know split experts; a patched model's checkpoints get one that calls this.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from deepspeed.checkpoint import ds_to_universal

from fluid_hf.checkpoint.files import TensorSpec
from fluid_hf.checkpoint.gather import weight_specs
from fluid_hf.checkpoint.saving import write_checkpoint
from fluid_hf.errors import CheckpointError
from fluid_hf.integrations.safe_files import check_files, read_file, read_tag
from fluid_hf.integrations.universal import Source, find_source, read_value, recorded_shapes

__all__ = ["main", "write_fp32_model"]


def write_fp32_model(checkpoint: Path, output: Path, tag: str | None = None, **options: Any) -> None:
    """Write the float32 weights that the optimizer holds as a plain Hugging Face model.

    Goes through a universal checkpoint in a temporary folder beside `output`: needs room for three float32 values a
    weight there, and the memory of a layer.

    Args:
        checkpoint: the folder given to `save_checkpoint`.
        output: where to write.
        tag: which checkpoint; the latest by default.
        **options: those of transformers' `save_pretrained` (`max_shard_size`).

    Raises:
        CheckpointError: the checkpoint is not there or not complete; names the file or tensor.
    """
    if tag is None:
        tag = read_tag(checkpoint, "latest", "give the checkpoint's folder, or --tag.")
    source = checkpoint / tag
    if not (source / "config.json").is_file():
        raise CheckpointError(f"file ({source / 'config.json'}) is missing; copy the model's there.")
    check_files(source.glob("*.pt"))  # DeepSpeed's converter unpickles what they name
    config = transformers.AutoConfig.from_pretrained(source)
    config.dtype = torch.float32
    model_class = _model_class(config.architectures, source)
    with torch.device("meta"):
        model = model_class(config)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as folder:
        arguments = argparse.Namespace(
            input_folder=str(source),
            output_folder=str(Path(folder) / "universal"),
            num_extract_workers=1,
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=True,
        )
        ds_to_universal.main(arguments)
        weights = _UniversalWeights(Path(folder) / "universal", source, weight_specs(model))
        write_checkpoint(model, output, weights, **options)


def _model_class(architectures: Any, source: Path) -> type[transformers.PreTrainedModel]:
    """The class that a checkpoint's configuration names: one of transformers' models, nothing else it exports."""
    name = str((architectures or ["(none)"])[0])
    found = getattr(transformers, name, None)
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise CheckpointError(
            f"architectures ({name}) in {source / 'config.json'} must name a model of transformers; correct it."
        )
    return found


class _UniversalWeights(Mapping[str, torch.Tensor]):
    """Float32 weights by transformers' names, read from a universal checkpoint one at a time."""

    def __init__(self, universal: Path, source: Path, specs: dict[str, TensorSpec]) -> None:
        self.specs = {name: TensorSpec(spec.shape, torch.float32) for name, spec in specs.items()}
        self._zero = universal / "zero"
        self._held = {path.name for path in self._zero.iterdir() if path.is_dir()}
        self._recorded = recorded_shapes(universal)
        states = next(iter(sorted(source.glob("*mp_rank_00_model_states.pt"))))
        # What is not trained is in the model's own states, whole at stages below 3.
        self._module: dict[str, Any] = read_file(states, mmap=True).get("module") or {}

    def __getitem__(self, name: str) -> torch.Tensor:
        shape = self.specs[name].shape
        found = find_source(name, self._held)
        if found is None:
            tensor = self._module.get(name)
            if tensor is None or tuple(tensor.shape) != shape:
                raise CheckpointError(
                    f"tensor ({name}) is not in the checkpoint in one piece; it is frozen: load it "
                    "from the model that training started from."
                )
            return tensor.float()
        paths = [self._zero / part / "fp32.pt" for part in found.names]
        return read_value(paths, found, shape, {**self._recorded, **_own_shape(found, shape)}).float()

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)


def _own_shape(source: Source, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """A weight taken as it is has the model's shape, even if the checkpoint has it flat."""
    return {source.names[0]: shape} if len(source.names) == 1 and source.half is None else {}


def main() -> None:
    """Command line, as DeepSpeed's script has it."""
    parser = argparse.ArgumentParser(description="Write a Hugging Face model in float32 from a DeepSpeed checkpoint.")
    parser.add_argument("checkpoint_dir", type=Path, help="folder with the file `latest`")
    parser.add_argument("output_dir", type=Path, help="folder to write")
    parser.add_argument("-t", "--tag", help="which checkpoint; default: the latest")
    parser.add_argument("--max_shard_size", default="5GB")
    arguments = parser.parse_args()
    write_fp32_model(
        arguments.checkpoint_dir, arguments.output_dir, arguments.tag, max_shard_size=arguments.max_shard_size
    )


if __name__ == "__main__":
    main()
