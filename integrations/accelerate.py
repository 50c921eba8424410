"""accelerate's `ParallelismConfig(sp_size=n, sp_backend="deepspeed")`: one sequence parallel size, in agreement.

The Trainer cuts its training batches and computes its loss as it does for DeepSpeed's Ulysses; attention is ours.
Evaluation batches stay whole on every rank, as the Trainer leaves them. Before they are cut, training batches get
`position_ids` if they have none, and are filled up to a length that `sp_size` divides.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import IterableDataset
from transformers.trainer_utils import has_length

from fluid_hf.attention.sequence import fill_up
from fluid_hf.config import FluidConfig
from fluid_hf.errors import ConfigError, RankMismatchError
from fluid_hf.models.sequence_inputs import PACKING_KEYWORDS
from fluid_hf.process_groups import backend_of

__all__ = [
    "CutBatches",
    "FilledBatches",
    "agree_on_sp_size",
    "check_loss",
    "check_ranks",
    "check_sp_size",
    "fill_batches",
    "first_epoch",
    "give_head_size",
    "name_attention",
    "parallelism_of",
    "scale_noise",
]


def _asked(parallelism_config: Any) -> int:
    return int(getattr(parallelism_config, "sp_size", None) or 1)


def agree_on_sp_size(config: FluidConfig, parallelism_config: Any) -> FluidConfig:
    """The settings with the `sp_size` of a `ParallelismConfig`, if they leave it open.

    Raises:
        ConfigError: both give one, and they differ.
    """
    if config.sp_size is None:
        return dataclasses.replace(config, sp_size=_asked(parallelism_config))
    check_sp_size(config.sp_size, parallelism_config)
    return config


def check_sp_size(sp_size: int, parallelism_config: Any) -> None:
    """Raise unless the Trainer cuts its batches over as many ranks as the attention layers expect.

    Raises:
        ConfigError: the sizes differ.
    """
    asked = _asked(parallelism_config)
    if asked != sp_size:
        raise ConfigError(
            f"sp_size ({sp_size}) of the fluid settings must equal sp_size ({asked}) of the Trainer's "
            f'ParallelismConfig; set ParallelismConfig(sp_size={sp_size}, sp_backend="deepspeed"), or leave sp_size '
            "out of the fluid settings."
        )


def parallelism_of(args: Any, accelerator: Any) -> Any:
    """The `ParallelismConfig` that a Trainer cuts its batches by: its arguments', or `accelerate launch`'s.

    Args:
        args: the Trainer's `TrainingArguments`.
        accelerator: its `Accelerator`, if known; it has read what the launcher leaves in the environment.
    """
    given = getattr(args, "parallelism_config", None)
    return given if given is not None else getattr(accelerator, "parallelism_config", None)


def check_ranks(parallelism_config: Any, world_size: int) -> None:
    """Raise unless the groups that share sequences are as many as the `ParallelismConfig` says.

    Args:
        parallelism_config: the Trainer's.
        world_size: number of ranks.

    Raises:
        ConfigError: they are not: accelerate would compute the batch size by its number, and DeepSpeed end with an
            assertion about batch sizes.
    """
    sp_size = _asked(parallelism_config)
    if sp_size > 1 and world_size % sp_size == 0 and sp_size * parallelism_config.data_parallel_size != world_size:
        raise ConfigError(
            f"dp_shard_size ({parallelism_config.dp_shard_size}) of the Trainer's ParallelismConfig must be "
            f"{world_size // sp_size} with sp_size ({sp_size}) on {world_size} ranks; set "
            f'ParallelismConfig(sp_size={sp_size}, dp_shard_size={world_size // sp_size}, sp_backend="deepspeed").'
        )


def name_attention(parallelism_config: Any, accelerator: Any, model: nn.Module) -> None:
    """Name the model's core attention where a `ParallelismConfig` leaves it open: DeepSpeed compares the two.

    The name goes into a copy, for the accelerator: the next model may have another one.

    Args:
        parallelism_config: the Trainer's; `None` without one.
        accelerator: the Trainer's `Accelerator`; without one nothing is done.
        model: a transformers model, or PEFT's around one.
    """
    given = getattr(parallelism_config, "named_from", parallelism_config)  # itself, or what an earlier call has copied
    handler = getattr(given, "sp_handler", None)
    if accelerator is None or handler is None or handler.sp_attn_implementation is not None:
        return
    named = copy.copy(given)
    named.named_from, named.sp_handler = given, copy.copy(handler)
    named.sp_handler.sp_attn_implementation = getattr(model.config, "_attn_implementation", None)
    accelerator.state.parallelism_config = named


def give_head_size(accelerator: Any, config: Any) -> None:
    """Let DeepSpeed read the size of a head from a config that leaves it to the model (Mixtral's `head_dim` is `None`).

    Its own attention, which is not used, is built with that size, and does not take `None`. The config says it only
    while accelerate prepares the model, so that what is saved stays as it was.

    Args:
        accelerator: the Trainer's `Accelerator`; without one nothing is done.
        config: the model's config.
    """
    if accelerator is None or not hasattr(config, "get_text_config"):
        return
    own: Any = type(accelerator)._prepare_deepspeed

    @functools.wraps(own)
    def prepare(*args: Any, **kwargs: Any) -> Any:
        with _head_size_in(config.get_text_config()):
            return own(accelerator, *args, **kwargs)

    accelerator._prepare_deepspeed = prepare


@contextlib.contextmanager
def _head_size_in(config: Any) -> Iterator[None]:
    if getattr(config, "head_dim", 0) is not None:  # without the name, DeepSpeed computes it
        yield
        return
    config.head_dim = config.hidden_size // config.num_attention_heads
    try:
        yield
    finally:
        config.head_dim = None


def check_loss(sp_size: int, world_size: int, args: Any, loss_function: Any = None) -> None:
    """Raise if the Trainer would leave out of its loss what its arguments ask for, or torch has no gradient of it.

    Args:
        sp_size: ranks that share a sequence.
        world_size: number of ranks.
        args: the Trainer's `TrainingArguments`.
        loss_function: its `compute_loss_func`.

    Raises:
        ConfigError: with `sp_size` over 1 it computes its loss by itself, without either of these; and over gloo the
            gradient of what it gathers is scattered from global ranks 0, 1, ..., which other groups do not have.
    """
    if 1 < sp_size < world_size and args.device.type == "cpu":
        raise ConfigError(
            f"sp_size ({sp_size}) must be {world_size}, the number of ranks, or 1 on CPUs: over gloo torch has no "
            "gradient of the Trainer's loss in a group without rank 0; use GPUs, or compute the loss in a loop of your "
            "own (model.fluid.sequence_loss)."
        )
    smoothing = float(getattr(args, "label_smoothing_factor", 0.0) or 0.0)
    if sp_size > 1 and smoothing:
        raise ConfigError(
            f"label_smoothing_factor ({smoothing}) must be 0 with sp_size ({sp_size}) over 1: the Trainer leaves it "
            "out of the loss of sequences that ranks share; set it to 0, or compute the loss in a loop of your own."
        )
    if sp_size > 1 and loss_function is not None:
        named = getattr(loss_function, "__name__", type(loss_function).__name__)
        raise ConfigError(
            f"compute_loss_func ({named}) must be None with sp_size ({sp_size}) over 1: the Trainer does not call it "
            "where ranks share sequences; override compute_loss, or compute the loss in a loop of your own."
        )


def scale_noise(model: nn.Module, alpha: float | None, sp_size: int) -> None:
    """Let NEFTune add to a piece what it adds to the whole sequence: its noise falls with the root of the length.

    Args:
        model: the model that is trained; it has the Trainer's hook already, which takes itself off in the end.
        alpha: `neftune_noise_alpha` of the Trainer's arguments.
        sp_size: ranks that share a sequence.
    """
    if alpha is not None and sp_size > 1:
        embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
        embeddings.neftune_noise_alpha = alpha / math.sqrt(sp_size)


class FilledBatches:
    """A data loader's batches, each of a length that all ranks can share (`fluid_hf.attention.sequence.fill_up`).

    Args:
        loader: the data loader.
        sp_size: ranks that share a sequence.
        pad_token_id: token to fill up with.
        mark_tokens: tell the batch's tokens from the padding.
        group: the ranks that share a sequence, each of which brings batches; `None` for one rank by itself.
        device: where its collectives take their tensors.
    """

    def __init__(
        self,
        loader: Any,
        sp_size: int,
        pad_token_id: int,
        mark_tokens: bool = False,
        group: dist.ProcessGroup | None = None,
        device: torch.device | None = None,
    ) -> None:
        self._loader, self._sp_size, self._pad_token_id = loader, sp_size, pad_token_id
        self._mark_tokens, self._group, self._device = mark_tokens, group, device

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self.each(iter(self._loader))

    def each(self, batches: Iterator[Any]) -> Iterator[dict[str, Any]]:
        """What is left of the batches, filled up; with a group collective over it, at their end too.

        Raises:
            RankMismatchError: the ranks bring batches of other numbers of rows, or not equally many.
        """
        for batch in batches:
            self._check_names(batch)
            yield self.fill(batch, self._common_length(batch))
        self._common_length(None)

    def _check_names(self, batch: Any) -> None:
        missing = [name for name in ("input_ids", "labels") if name not in batch]
        if missing:
            raise ConfigError(
                f"{' and '.join(missing)} must be in the training batches with sp_size ({self._sp_size}) over 1: they "
                f"have {', '.join(map(str, batch))}, and the Trainer computes the loss of sequences that ranks share "
                "from labels; let the collator return them, or set sp_size 1 (for DPO and the like)."
            )

    def _common_length(self, batch: Any) -> int:
        """What this batch's length must be a multiple of; `None` is the end of the batches.

        Over gloo the group's longest: DeepSpeed gathers pieces of other lengths, which gloo does not.
        """
        if self._group is None:
            return self._sp_size
        rows, length = (-1, 0) if batch is None else batch["input_ids"].shape[:2]
        own = torch.tensor([rows, length], device=self._device)
        values = [torch.empty_like(own) for _ in range(self._sp_size)]
        dist.all_gather(values, own, group=self._group)
        found = torch.stack(values).tolist()  # host synchronisation, once for sp_size batches, as DeepSpeed's own
        counts = [count for count, _ in found]
        if len(set(counts)) > 1:
            said = ["no more batches" if count < 0 else f"{count} rows" for count in counts]
            raise RankMismatchError(
                f"batches of the ranks that share sequences ({', '.join(said)}) must have equally many rows, and be "
                "equally many; leave accelerator_config.even_batches on, or set dataloader_drop_last=True."
            )
        longest = max(length for _, length in found)
        filled: int = longest + -longest % self._sp_size
        over_gloo = backend_of(self._group, own.device.type) == "gloo"
        return filled if over_gloo and filled else self._sp_size

    def __len__(self) -> int:
        return len(self._loader)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def fill(self, batch: Any, multiple: int | None = None) -> dict[str, Any]:
        """One batch, filled up, without what flash attention's collators add: attention takes it from `position_ids`.

        Args:
            batch: the batch.
            multiple: what its length must be a multiple of; `sp_size` by default.

        Raises:
            ConfigError: samples are told apart by that alone.
        """
        packed = [name for name in PACKING_KEYWORDS if batch.get(name) is not None]
        if packed and batch.get("position_ids") is None:
            raise ConfigError(
                f"position_ids must be given beside {', '.join(packed)} with sp_size ({self._sp_size}) over 1, as they "
                "tell packed samples apart there; let the collator return them "
                "(DataCollatorWithFlattening(return_position_ids=True))."
            )
        kept = {name: value for name, value in batch.items() if name not in PACKING_KEYWORDS}
        return fill_up(kept, multiple or self._sp_size, self._pad_token_id, mark_tokens=self._mark_tokens)


class CutBatches(IterableDataset):  # type: ignore[misc, type-arg]
    """The batches of DeepSpeed's adapter as a data set, so that accelerate can skip some of them.

    Args:
        loader: the adapter.
    """

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __iter__(self) -> Iterator[Any]:
        return iter(self._loader)

    def __len__(self) -> int:
        return len(self._loader)


def first_epoch(loader: Any, step: int, accumulation: int) -> int:
    """The epoch in which the Trainer goes on after `step` optimizer steps.

    It counts epochs by the settings of now; a checkpoint's own count is by those it was written with.

    Args:
        loader: the Trainer's training data loader.
        step: optimizer steps that are done.
        accumulation: micro-batches of an optimizer step.
    """
    return step // max(1, -(-len(loader) // accumulation)) if has_length(loader) else 0


def fill_batches(loader: Any, sp_size: int, config: Any, epoch: int = 0) -> None:
    """Fill up what DeepSpeed's adapter is about to cut; a loader that is no such adapter is left alone.

    Without it DeepSpeed stops the ranks of the group that met a length `sp_size` does not divide, and those only.

    Args:
        loader: the Trainer's training data loader.
        sp_size: ranks that share a sequence.
        config: the model's config, for the padding token and whether there is a balancing loss.
        epoch: the one that training begins in; resuming within it, the Trainer does not tell the loader.
    """
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPDataLoaderAdapter

    class Epochs(UlyssesSPDataLoaderAdapter):  # type: ignore[misc]
        """Begins anew for every epoch.

        The Trainer takes as many batches as an epoch has and no more, so the adapter does not see its end, tells it at
        the begin of the next one, and each later epoch loses a step.
        """

        begun = ended = False

        def __iter__(self) -> Iterator[Any]:
            if self.begun:
                self.iter = iter(self.dl)
                self.begun = self.ended = False
                self.micro_batches.clear()
            return self

        def __next__(self) -> Any:
            if self.ended:  # the adapter would go on with the next epoch's batches
                raise StopIteration
            self.begun = True
            try:
                return super().__next__()
            except StopIteration:
                self.ended = True
                raise

        def set_epoch(self, epoch: int) -> None:
            """The Trainer says it before each epoch; samplers shuffle by it."""
            if hasattr(self.dl, "set_epoch"):
                self.dl.set_epoch(epoch)

    if not isinstance(loader, UlyssesSPDataLoaderAdapter) or isinstance(loader.dl, FilledBatches):
        return
    loader.__class__ = Epochs
    # Resuming within an epoch, the Trainer skips batches by these; the adapter lacks them.
    loader.dataset, loader.batch_size, loader.drop_last = CutBatches(loader), None, False
    loader.prefetch_factor = None
    pad = getattr(config, "pad_token_id", None)
    marked = bool(getattr(config, "output_router_logits", False))
    token = pad if isinstance(pad, int) and pad >= 0 else 0
    filled = FilledBatches(loader.dl, sp_size, token, marked, loader.sp_group, loader.device)
    loader.dl, loader.iter = filled, filled.each(loader.iter)
    loader.set_epoch(epoch)
