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
from fluid_hf.integrations.deepspeed import SplitExperts
from fluid_hf.integrations.safe_files import check_files, read_file, read_tag
from fluid_hf.integrations.universal import Source, find_source, read_value, recorded_shapes
from fluid_hf.models.registry import ExpertsSite, find_experts
from fluid_hf.models.stored_experts import StoredExperts

__all__ = ["main", "write_fp32_model"]


def write_fp32_model(checkpoint: Path, output: Path, tag: str | None = None, **options: Any) -> None:
    """Write the float32 weights that the optimizer holds as a plain Hugging Face model.

    Goes through a universal checkpoint in a temporary folder beside `output`: needs room for three float32 values a
    weight there, and the memory of a layer. At ZeRO 0, whose files hold the weights whole, there is none: they are as
    the model has them.

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
    if not any(source.glob("*zero_pp_rank_*_optim_states.pt")):
        write_checkpoint(model, output, _ModelWeights(model, source), **options)
        return
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
        weights = _UniversalWeights(model, source, Path(folder) / "universal")
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


class _ModelWeights(Mapping[str, torch.Tensor]):
    """Float32 weights by transformers' names, one at a time, from what the engine saves of the model itself."""

    def __init__(self, model: Any, source: Path) -> None:
        self.specs = {name: TensorSpec(spec.shape, torch.float32) for name, spec in weight_specs(model).items()}
        files = sorted(source.glob("*mp_rank_00_model_states.pt"))
        states = next(path for path in files if not path.name.startswith("layer_"))  # those are of experts
        # What is not trained is in the model's own states, whole at stages below 3.
        self._module: dict[str, Any] = read_file(states, mmap=True).get("module") or {}
        self._experts = _expert_weights(model)
        self._last: dict[str, torch.Tensor] = {}  # what was made of a weight: of a list, one tensor per expert
        self._of_expert: dict[str, Path] = {}  # files of split experts that no ZeRO holds, one for each
        for path in sorted(source.glob("layer_*_expert_*_model_states.pt")):
            self._of_expert.update(dict.fromkeys(read_file(path, mmap=True), path))

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._experts:
            return self._dense(name)
        if name not in self._last:
            site, weight = self._experts[name]
            parts = {part: f"{site.name}.experts.{part}" for part in _parts_of(site, weight)}
            if not all(map(self._has, parts.values())):
                return self._dense(name)
            shapes = _part_shapes(site)
            whole = _join(site, weight, [self._part(path, shapes[part]) for part, path in parts.items()])
            self._last = _as_stored(site, weight, whole)
        if self._last[name].shape != self.specs[name].shape:  # rows of experts without weights (LongCat-Flash)
            raise self._absent(name)
        return self._last[name].float()

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)

    def _absent(self, name: str) -> CheckpointError:
        return CheckpointError(
            f"tensor ({name}) is not in the checkpoint in one piece; it is not trained: load it from the model that "
            "training started from."
        )

    def _dense(self, name: str) -> torch.Tensor:
        tensor = self._module.get(name)
        if tensor is None or tuple(tensor.shape) != self.specs[name].shape:
            raise self._absent(name)
        found: torch.Tensor = tensor.float()
        return found

    def _has(self, part: str) -> bool:
        return f"{part}.0" in self._of_expert

    def _part(self, part: str, shape: tuple[int, ...]) -> torch.Tensor:
        """A parameter of the experts, of all of them."""
        names = [f"{part}.{index}" for index in range(shape[0])]
        lost = next((name for name in names if name not in self._of_expert), None)
        if lost is not None:
            raise CheckpointError(f"tensor ({lost}) must be in the checkpoint's files but is not; get them again.")
        return torch.stack([read_file(self._of_expert[name], mmap=True)[name].float() for name in names])


class _UniversalWeights(_ModelWeights):
    """The same, of what is trained from a universal checkpoint."""

    def __init__(self, model: Any, source: Path, universal: Path) -> None:
        super().__init__(model, source)
        self._zero = universal / "zero"
        self._held = {path.name for path in self._zero.iterdir() if path.is_dir()}
        self._recorded = recorded_shapes(universal)

    def _dense(self, name: str) -> torch.Tensor:
        shape = self.specs[name].shape
        found = find_source(name, self._held)
        if found is None:
            return super()._dense(name)
        paths = [self._zero / part / "fp32.pt" for part in found.names]
        return read_value(paths, found, shape, {**self._recorded, **_own_shape(found, shape)}).float()

    def _has(self, part: str) -> bool:
        return part in self._held

    def _part(self, part: str, shape: tuple[int, ...]) -> torch.Tensor:
        return read_value([self._zero / part / "fp32.pt"], Source((part,)), shape, {part: shape})


def _expert_weights(model: Any) -> dict[str, tuple[ExpertsSite, str]]:
    """Which weight of which experts a tensor of the model is, or is part of."""
    found = {}
    for site in find_experts(model):
        for weight in site.weight_names:
            meta = torch.empty(site.parameter_shape(weight), device="meta")
            found.update(dict.fromkeys(_as_stored(site, weight, meta), (site, weight)))
    return found


def _as_stored(site: ExpertsSite, weight: str, value: torch.Tensor) -> dict[str, torch.Tensor]:
    """A weight of all experts by the names, and as the tensors, of the unpatched model."""
    stored = site.module.unstack(weight, value) if isinstance(site.module, StoredExperts) else {weight: value}
    return {f"{site.name}.{name}": tensor for name, tensor in stored.items()}


def _transposed(site: ExpertsSite) -> bool:
    return site.format is not None and site.format.transposed


def _part_shapes(site: ExpertsSite) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters that DeepSpeed has of a layer's experts, of all of them."""
    weights = {name: torch.empty(site.parameter_shape(name), device="meta") for name in site.weight_names}
    split = SplitExperts(weights, dict.fromkeys(weights, False), _transposed(site))
    return {name: tuple(value.shape) for name, value in split.named_parameters()}


def _parts_of(site: ExpertsSite, weight: str) -> tuple[str, ...]:
    """Which of them make a weight."""
    if weight.endswith("_bias"):
        return ("w3",)
    if weight == "down_proj":
        return ("w2",)
    return ("w1",) if len(site.weight_names) == 4 else ("w1", "w3")


def _join(site: ExpertsSite, weight: str, tensors: list[torch.Tensor]) -> torch.Tensor:
    """The weight that `SplitExperts` has taken apart."""
    if not weight.endswith("_bias"):
        return torch.cat(tensors, dim=2 if _transposed(site) else 1)
    outputs = site.parameter_shape(site.weight_names[1])[1]
    return tensors[0][:, outputs:] if weight == "down_proj_bias" else tensors[0][:, :outputs]


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
