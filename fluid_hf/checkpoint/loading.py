"""`from_pretrained`: a patched model of which each rank reads and holds its own experts only."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import os
import socket
from collections.abc import Iterator, Mapping
from typing import Any

import torch.distributed as dist
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.auto.auto_factory import add_generation_mixin_to_remote_model

from fluid_hf.backends import LOADED_SHARE
from fluid_hf.checkpoint.files import TensorSpec
from fluid_hf.checkpoint.memory import return_freed_memory
from fluid_hf.checkpoint.reading import (
    ExpertShare,
    check_inside,
    match_tensors,
    open_share,
    read_headers,
    select_share,
)
from fluid_hf.checkpoint.saving import quiet_progress
from fluid_hf.config import FluidConfig
from fluid_hf.control import ControlGroup
from fluid_hf.errors import CheckpointError, ConfigError, FluidError, UnsupportedModelError
from fluid_hf.models.adapters import adapters_of
from fluid_hf.models.expert_lists import AbsentExpert, ExpertList
from fluid_hf.models.registry import ExpertsSite, find_experts
from fluid_hf.models.stored_experts import StoredExperts
from fluid_hf.patching import check_config, patch_model, requested_config
from fluid_hf.process_groups import resolve_ep_size

__all__ = ["from_pretrained"]

# Which of transformers' options say where files are.
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
# How long ranks wait for the slowest to read its share: a slow file system is not an error.
LOADING_TIMEOUT_SECONDS = 3600.0


def from_pretrained(
    path: str | os.PathLike[str],
    config: FluidConfig | None = None,
    *,
    auto_class: Any = AutoModelForCausalLM,
    **hf_kwargs: Any,
) -> Any:
    """Load a model by shares and patch it. Collective over all ranks.

    Models with code of their own (`trust_remote_code=True`) are loaded so, too.

    Equal to `patch_model(AutoModelForCausalLM.from_pretrained(path))`, but a rank reads only the shared weights and
    its own experts, into a model built without memory. Both layouts are read: one tensor per expert, as on the Hub, and
    all experts in one tensor, as models of transformers 5 hold them. Under ZeRO 3 the model is built so, too, and
    partitioned by the engine.

    Args:
        path: a folder or a name on the Hub, with safetensors files.
        config: settings, as for `patch_model`; not transformers' own `config`, which is read from `path`.
        auto_class: transformers' auto class, or a model class.
        **hf_kwargs: those of transformers' `from_pretrained` (`dtype`, `attn_implementation`, `device_map`, ...).

    Returns:
        The patched model, in evaluation mode; with `output_loading_info=True` a pair, it and transformers' report.

    Raises:
        CheckpointError: on every rank: files are missing, cut off or do not fit the model; names the file and tensor.
        ConfigError: the settings are no `FluidConfig`, or do not fit the model or the world size.
        UnsupportedModelError: the model cannot be patched, or its experts are not read by shares (DBRX, LongCat-Flash).
    """
    path, control = os.fspath(path), ControlGroup(LOADING_TIMEOUT_SECONDS, "fluid_hf.from_pretrained")
    with_info = hf_kwargs.pop("output_loading_info", False)
    rank = dist.get_rank() if dist.is_initialized() else 0
    try:
        loader = _ShareLoader(path, control, control.hosts("fluid_hf.from_pretrained"))
        try:
            _check_settings(config)
            loader.requested = requested_config(config)
            _check_folder(path)
            with _without_zero_init(), quiet_progress(rank != 0):
                loading_class = _loading_class(auto_class, loader, path, hf_kwargs)
                model, info = loading_class.from_pretrained(path, output_loading_info=True, **hf_kwargs)
            loader.check_complete(info)
            model.__class__ = loader.model_class
        except Exception as error:
            loader.agree(error)
            raise
        loader.agree(None)
    finally:
        control.close()
    return_freed_memory()
    patched = patch_model(model, config)
    return (patched, info) if with_info else patched


def _check_settings(config: Any) -> None:
    """transformers' own function takes the model's configuration under this name."""
    if isinstance(config, PreTrainedConfig):
        raise ConfigError(
            f"config ({type(config).__name__}) must be a FluidConfig; fluid_hf.from_pretrained reads the model's own "
            "config.json from its folder: change fields by keyword (num_experts_per_tok=1), or load the model with "
            "transformers and call patch_model."
        )
    check_config(config)


def _check_folder(path: str) -> None:
    """A path that is none would be looked for on the Hub, and refused as a wrong name there."""
    if (os.path.isabs(path) or path.startswith(".")) and not os.path.isdir(path):
        raise CheckpointError(
            f"folder ({path}) must be there for every rank but is not on {socket.gethostname()}; copy the model to "
            "every node, or to a folder that all of them share."
        )


class _ShareLoader:
    """Stands between transformers' construction of the empty model and its loading of the weights."""

    def __init__(self, path: str, control: ControlGroup, hosts: list[str]) -> None:
        self.requested: FluidConfig = FluidConfig()
        self.model_class: Any = None
        self._path = path
        self._control = control
        self._hosts = hosts
        self._failed = False
        self._base_info: Any = None
        self._shares: list[tuple[ExpertsSite, ExpertShare]] = []

    def load(self, load: Any, model: Any, files: list[str], load_config: Any) -> Any:
        """Check the files and ranks, make the experts' tensors smaller, and let transformers load this rank's part."""
        if not files or not all(str(file).endswith(".safetensors") for file in files):
            raise CheckpointError(
                f"files of {self._path} ({', '.join(map(str, files or ['none']))}) must be safetensors to be read by "
                "shares; convert them, or load the whole model and call patch_model."
            )
        weight_map = (load_config.sharded_metadata or {}).get("weight_map", {})
        check_inside(self._path, weight_map)
        stored = read_headers(files, weight_map)
        expected = {name: TensorSpec.of(tensor) for name, tensor in model.state_dict().items()}
        sites = find_experts(model)
        world = dist.get_world_size() if dist.is_initialized() else 1
        split: dict[str, ExpertShare] = {}
        absent: set[str] = set()
        shares = []
        for site in sites:
            ep_size = resolve_ep_size(self.requested.ep_size, world, site.num_experts, self._hosts)
            held = site.num_experts // ep_size
            start = (dist.get_rank() % ep_size if world > 1 else 0) * held
            share = ExpertShare(site.num_experts, start, start + held)
            if isinstance(site.module, ExpertList):
                absent.update(_outside(site, share))
            elif isinstance(site.module, StoredExperts):
                raise UnsupportedModelError(
                    f"experts ({site.name}) of {self._path} are stored in a way that is not read by shares; load the "
                    "whole model with transformers and call patch_model."
                )
            else:
                split.update({f"{site.name}.{key}": share for key in site.weight_names})
            shares.append((site, share))
        matched = match_tensors(model, stored, load_config.weight_mapping or [])
        self._check_names(model, expected, matched, files)
        held_here = {name: sources for name, sources in matched.items() if name not in absent}
        wanted = select_share(expected, held_here, split)
        self.agree(None)  # nobody starts to read gigabytes before all have found their files in order
        for site, share in shares:
            _shrink(site, share)
        self._shares = shares
        with _one_tensor_at_a_time():
            self._base_info, offloaded = load(model, open_share(stored, wanted), files, load_config)
        return self._base_info, offloaded

    def check_adapters(self, model: Any) -> None:
        """Refuse adapters, put into a model that was loaded by shares, that PEFT gave experts in shares for whole ones.

        Raises:
            UnsupportedModelError: names the experts.
        """
        for site, share in self._shares:
            experts = site.module.module if isinstance(site.module, StoredExperts) else site.module
            inside = any(hasattr(module, "get_base_layer") for module in experts.modules())
            if (inside or adapters_of(model, experts)) and share.stop - share.start < share.num_experts:
                raise UnsupportedModelError(
                    f"adapters ({self._path}) of experts ({site.name}) are not read by shares; load the model and its "
                    "adapters with transformers or PEFT and call patch_model, or set ep_size 1."
                )

    def check_complete(self, info: Mapping[str, Any]) -> None:
        """transformers would fill with random numbers what it did not find."""
        if self.model_class is None:
            raise UnsupportedModelError(
                f"{self._path} has code that loads it in a way of its own; load the whole model and call patch_model."
            )
        # Of a folder with adapters, transformers reports on these alone.
        reports = [info] if self._base_info is None else [self._base_info.to_dict(), info]
        for report, kind in itertools.product(reports, ("missing_keys", "mismatched_keys", "error_msgs")):
            if report.get(kind):
                first = sorted(map(str, report[kind]))[0]
                raise CheckpointError(f"tensor ({first}) of {self._path} could not be loaded ({kind}); get it again.")

    def agree(self, error: Exception | None) -> None:
        """Raise on every rank if any rank has an error. A rank that has raised here takes no further part."""
        if self._failed:
            return
        if error is not None and not isinstance(error, (FluidError, TypeError, ImportError)):
            named = CheckpointError(f"{self._path} cannot be loaded: {type(error).__name__}: {error}")
            named.__cause__ = error
            error = named
        text = None if error is None else f"{type(error).__name__}: {error}"
        try:
            reports = self._control.gather(text, "fluid_hf.from_pretrained")
        except FluidError:
            self._failed = True
            raise
        failed = {rank: report for rank, report in enumerate(reports) if report is not None}
        self._failed = bool(failed)
        if error is not None:
            raise error
        if failed:
            rank, report = next(iter(failed.items()))
            raise CheckpointError(f"loading failed on rank {rank}: {report}")

    def _check_names(
        self, model: Any, expected: Mapping[str, TensorSpec], matched: Mapping[str, Any], files: list[str]
    ) -> None:
        """Every parameter must be in the files, save what is tied to another or kept out of checkpoints."""
        tied = set(getattr(model, "all_tied_weights_keys", None) or ())
        ignored = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
        several = {target for target in matched if None not in matched[target].by_pattern}
        for name, _ in model.named_parameters():
            if name in matched or name in tied or any(pattern in name for pattern in ignored):
                continue
            if any(name.rpartition(".")[0] == target.rpartition(".")[0] for target in several):
                continue  # one conversion may give several tensors and is known by the first; checked after loading
            where = files[0] if len(files) == 1 else f"{len(files)} files beside {files[0]}"
            raise CheckpointError(
                f"tensor ({name}, shape {list(expected[name].shape)}) must be in the checkpoint ({where}) but is not; "
                "get the files again, or the config.json that belongs to them; a model with a new head is loaded by "
                "its own from_pretrained and then patched."
            )


def _loading_class(auto_class: Any, loader: _ShareLoader, path: str, options: dict[str, Any]) -> Any:
    """`auto_class`, or a model class, that loads through `loader`; the class itself if the model brings its own."""
    mapping = getattr(auto_class, "_model_mapping", None)
    if mapping is None:
        return _with_shares(auto_class, loader)
    own = _class_of_its_own(auto_class, path, options) if options.get("trust_remote_code") else None
    if own is not None:
        return _with_shares(own, loader)
    return type(auto_class.__name__, (auto_class,), {"_model_mapping": _ClassMapping(mapping, loader)})


def _class_of_its_own(auto_class: Any, path: str, options: dict[str, Any]) -> Any:
    """The class that comes with a model, as transformers' auto classes find it; `None` if it is transformers' own."""
    where = {name: options[name] for name in HUB_OPTIONS if name in options}
    revision = options.pop("code_revision", None)
    config = AutoConfig.from_pretrained(path, trust_remote_code=True, code_revision=revision, **where)
    reference = (getattr(config, "auto_map", None) or {}).get(auto_class.__name__)
    if reference is None:
        return None
    model_class: Any = get_class_from_dynamic_module(reference, path, code_revision=revision, **where)
    model_class.register_for_auto_class(auto_class)
    return add_generation_mixin_to_remote_model(model_class)


class _ClassMapping:
    """An auto class's table of model classes, giving classes that load by shares."""

    def __init__(self, mapping: Any, loader: _ShareLoader) -> None:
        self._mapping, self._loader = mapping, loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._mapping, name)

    def __contains__(self, key: Any) -> bool:
        return key in self._mapping

    def __iter__(self) -> Iterator[Any]:
        return iter(self._mapping)

    def __getitem__(self, key: Any) -> Any:
        found = self._mapping[key]
        if isinstance(found, (list, tuple)):
            return [_with_shares(model_class, self._loader) for model_class in found]
        return _with_shares(found, self._loader)


def _with_shares(model_class: Any, loader: _ShareLoader) -> Any:
    """A class equal to `model_class` in all but the loading of weights; the model gets its own class back."""

    def load(model: Any, state_dict: Any, checkpoint_files: Any, load_config: Any, *args: Any, **kwargs: Any) -> Any:
        if loader.model_class is not None:  # adapters, into the model that was loaded before
            loader.check_adapters(model)
            return model_class._load_pretrained_model(model, state_dict, checkpoint_files, load_config, *args, **kwargs)
        loader.model_class = model_class
        return loader.load(
            lambda *parts: model_class._load_pretrained_model(*parts, *args, **kwargs),
            model,
            checkpoint_files,
            load_config,
        )

    members = {
        "_load_pretrained_model": staticmethod(load),
        "__module__": model_class.__module__,
        "__qualname__": model_class.__qualname__,
    }
    return type(model_class.__name__, (model_class,), members)


def _shrink(site: ExpertsSite, share: ExpertShare) -> None:
    """Leave room for this rank's experts only; the module is on the meta device."""
    if share.stop - share.start == share.num_experts:
        return
    if isinstance(site.module, ExpertList):
        for index in set(range(share.num_experts)) - set(range(share.start, share.stop)):
            site.module.modules[index] = AbsentExpert()
        return
    for key in site.weight_names:
        value = getattr(site.module, key)
        data = value.data.new_empty((share.stop - share.start, *value.shape[1:]))
        setattr(site.module, key, nn.Parameter(data, requires_grad=value.requires_grad))
    setattr(site.module, LOADED_SHARE, share.num_experts)


def _outside(site: ExpertsSite, share: ExpertShare) -> Iterator[str]:
    """Names of the tensors of other ranks' experts, where an expert is a module."""
    assert isinstance(site.module, ExpertList)
    for index in range(share.num_experts):
        if not share.start <= index < share.stop:
            for parts in site.module.parts.values():
                yield from (f"{site.name}.{index}.{part}" for part in parts)


@contextlib.contextmanager
def _one_tensor_at_a_time() -> Iterator[None]:
    """transformers' reading threads run ahead of its conversions and would hold a share twice; this is its switch."""
    switch = "HF_DEACTIVATE_ASYNC_LOAD"
    held = os.environ.get(switch)
    os.environ[switch] = "1"
    try:
        yield
    finally:
        if held is None:
            del os.environ[switch]
        else:
            os.environ[switch] = held


@contextlib.contextmanager
def _without_zero_init() -> Iterator[None]:
    """Under a ZeRO-3 configuration transformers would build the model partitioned, and read it whole on rank 0."""
    if importlib.util.find_spec("deepspeed") is None:
        yield
        return
    from transformers.integrations import deepspeed as integration

    held = integration._hf_deepspeed_config_weak_ref
    integration.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        integration._hf_deepspeed_config_weak_ref = held
