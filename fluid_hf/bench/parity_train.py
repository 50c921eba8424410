"""One cell of the parity matrix: training steps of a patched model, and of the plain model in one process.

The optimizer is SGD without momentum, so the change of every weight is its clipped gradient, scale included.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from fluid_hf.bench.parity_cells import Cell
from fluid_hf.checkpoint.gather import iterate_weights, weight_specs
from fluid_hf.config import FluidConfig
from fluid_hf.patching import get_state, patch_model
from fluid_hf.process_groups import release_exchange_groups
from fluid_hf.state import FluidState

__all__ = ["Outcome", "train_patched", "train_plain"]

STEPS, VOCABULARY = 2, 96
CLIP, RATE, AUX = 0.5, 0.5, 0.1
TIMEOUT = 120.0  # seconds for a peer to come: it may still compile its kernels
LOSS_SCALE = 2.0**8  # float16: small enough not to overflow, large enough for the smallest gradients
FLOAT32 = ("float32", "autocast")
EXCHANGES: dict[str, dict[str, Any]] = {"planned": {}, "waves3": {"waves": 3}, "serial": {"overlap": False}}


@dataclasses.dataclass
class Outcome:
    """What a training run left.

    Attributes:
        losses: mean over ranks and micro-batches, of each step.
        norms: gradient norm before clipping, of each step; NaN where DeepSpeed reports none (some types at stage 0).
        before, after: weights by name, float64 on the CPU; empty except on rank 0.
        trained: names of the weights that were trained.
    """

    losses: list[float]
    norms: list[float]
    before: dict[str, torch.Tensor]
    after: dict[str, torch.Tensor]
    trained: set[str]


def _dtype(cell: Cell) -> torch.dtype:
    """Of the weights."""
    found: torch.dtype = torch.float32 if cell.dtype in FLOAT32 else getattr(torch, cell.dtype.removesuffix("_static"))
    return found


def build_model(cell: Cell, device: torch.device) -> nn.Module:
    """A model of two layers and four experts with the same random weights on every rank."""
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        # In reduced types every token takes all experts: otherwise rounding would send some elsewhere, a jump in all
        # that follows, with and without fluid_hf.
        "num_experts_per_tok": 2 if cell.dtype == "float32" else 4,
        "output_router_logits": cell.aux_loss,
        "router_aux_loss_coef": AUX,
        "initializer_range": 0.1,
        "use_cache": False,
    }
    if cell.family == "mixtral":
        sizes |= {"intermediate_size": 48, "num_local_experts": 4, "router_jitter_noise": 0.1 if cell.jitter else 0.0}
    else:
        sizes |= {"num_experts": 4, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 40, "head_dim": 8}
    torch.manual_seed(0)
    model: nn.Module = AutoModelForCausalLM.from_config(AutoConfig.for_model(cell.family, **sizes))
    return model.to(device, _dtype(cell)).train()


def freeze(cell: Cell, model: nn.Module) -> None:
    """Leave trainable what the cell trains; LoRA freezes by itself."""
    for name, parameter in model.named_parameters():
        expert = ".experts." in name
        keep = {
            "no_experts": not expert,
            "no_down": not name.endswith("experts.down_proj"),
            "only_experts": expert,
            "no_router": not name.endswith((".gate.weight", ".router.weight")),
        }.get(cell.trained, True)
        parameter.requires_grad_(keep)


def add_lora(cell: Cell, model: Any) -> Any:
    """The model inside PEFT, with random adapters that are equal on all ranks."""
    from peft import LoraConfig, get_peft_model

    options: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"]}
    if cell.trained == "lora_experts":
        options = {"target_modules": ["o_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(r=2, lora_alpha=4, init_lora_weights=False, **options))


def prepare(cell: Cell, device: torch.device, patch: Callable[[nn.Module], object]) -> Any:
    """Build, freeze, patch, wrap in PEFT and enable checkpointing, in the order of the cell."""
    model: Any = build_model(cell, device)
    freeze(cell, model)
    lora = cell.trained.startswith("lora")
    if lora and cell.lora_order == "lora_first":
        model = add_lora(cell, model)
    patch(model)
    if lora and cell.lora_order == "patch_first":
        model = add_lora(cell, model)
    model.to(_dtype(cell))  # PEFT makes its own weights float32; DeepSpeed would change them back
    if cell.checkpointing != "none":
        model.gradient_checkpointing_enable({"use_reentrant": cell.checkpointing == "reentrant"})
        if lora and cell.checkpointing == "reentrant":
            model.enable_input_require_grads()
    return model


def inputs(cell: Cell, device: torch.device, step: int, micro: int, rank: int) -> dict[str, torch.Tensor]:
    """One micro-batch of one rank, or of one group of ranks that share their sequences."""
    generator = torch.Generator().manual_seed((step * 16 + micro) * 64 + rank)
    rows, length = (1 + rank % 3, 7 + 3 * rank) if cell.batch == "uneven" else (2, 12)
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=generator)
    found = {"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids)}
    if cell.batch != "even":
        keep = torch.randint(3, length + 1, (rows,), generator=generator)
        padding = torch.arange(length) >= keep[:, None]
        found["attention_mask"][padding] = 0
        found["labels"][padding] = -100
    return {name: value.to(device) for name, value in found.items()}


def seed_noise(step: int, micro: int, rank: int) -> None:
    """Jitter draws from the global generator: the same numbers for a rank wherever it is computed."""
    torch.manual_seed(1 + (step * 16 + micro) * 64 + rank)


def loss_options(cell: Cell, device: torch.device, step: int, readers: int) -> tuple[dict[str, int], float]:
    """Further arguments of the model, and the factor on its loss that makes the mean over `readers` batches right."""
    if not cell.num_items:
        return {}, 1.0
    batches = [inputs(cell, device, step, m, r) for m in range(cell.accumulation) for r in range(readers)]
    items = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    return {"num_items_in_batch": items}, float(readers * cell.accumulation)


def autocast(cell: Cell, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """bfloat16 autocast, if the cell wants it."""
    return torch.autocast(device.type, torch.bfloat16, enabled=cell.dtype == "autocast")


def train_plain(cell: Cell, device: torch.device, world: int, *, exact: bool) -> Outcome:
    """The unpatched model in one process, which plays all ranks in turn.

    Args:
        cell: its reduced types keep float32 master weights where DeepSpeed does.
        device: where.
        world: number of ranks, of which `sp_size` share a batch.
        exact: compute in float32 instead of the cell's type, from the same starting weights.
    """
    model = prepare(cell, device, lambda model: None)
    if exact:
        model.float()
        cell = dataclasses.replace(cell, dtype="float32")
    scale = LOSS_SCALE if cell.dtype.startswith("float16") else 1.0
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    masters = {name: p.detach().float() for name, p in trained.items()}
    before = {name: value.detach().double().cpu() for name, value in model.state_dict().items()}
    outcome = Outcome([], [], before, {}, set(trained))
    readers = world // cell.sp_size
    for step in range(STEPS):
        options, factor = loss_options(cell, device, step, readers)
        total = torch.zeros((), dtype=torch.float64, device=device)
        grads = {name: torch.zeros_like(master) for name, master in masters.items()}
        for micro in range(cell.accumulation):
            for rank in range(readers):
                seed_noise(step, micro, rank)
                with autocast(cell, device):
                    loss = model(**inputs(cell, device, step, micro, rank), **options).loss * factor
                (loss * (scale / (readers * cell.accumulation))).backward()
                total += loss.detach().double() / (readers * cell.accumulation)
                for name, parameter in trained.items():
                    if parameter.grad is not None:
                        grads[name] += parameter.grad.float() / scale
                        parameter.grad = None
        norm = torch.stack([grad.double().norm() for grad in grads.values()]).norm()
        clip = float((CLIP / (norm + 1e-6)).clamp(max=1.0))
        with torch.no_grad():
            for name, parameter in trained.items():
                masters[name] -= RATE * clip * grads[name]
                parameter.copy_(masters[name])
                if cell.engine == "torch":
                    masters[name] = parameter.detach().float()
        outcome.losses.append(float(total))
        outcome.norms.append(float(norm))
    outcome.after = {name: value.detach().double().cpu() for name, value in model.state_dict().items()}
    return outcome


def train_patched(cell: Cell, device: torch.device, *, patched: bool = True) -> Outcome:
    """The model on all ranks. Collective.

    Args:
        cell: settings.
        device: of this rank.
        patched: `False` to see whether the plain model can train in this way; without weights in the outcome.

    Raises:
        FluidError: fluid_hf refuses the cell.
    """
    with contextlib.ExitStack() as stack:

        def patch(model: nn.Module) -> None:
            if patched:
                settings = {"wgrad": cell.wgrad, "recompute": cell.recompute, **EXCHANGES[cell.exchange]}
                settings["timeout_seconds"] = TIMEOUT
                patch_model(model, FluidConfig(ep_size=cell.ep_size, sp_size=cell.sp_size, **settings))
                stack.callback(_forget, model)

        model = prepare(cell, device, patch)
        if cell.compiled:
            torch.compiler.reset()  # transformers finds no router logits in code compiled for a model that gave none
            model.compile(backend="inductor" if device.type == "cuda" else "aot_eager")
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=RATE)
        if cell.engine == "torch":
            return _run(cell, device, model, _plain_step(cell, model, optimizer))
        with _engine(cell, model, optimizer) as engine:
            return _run(cell, device, model, _engine_step(cell, engine))


Step = Callable[[list[Callable[[], torch.Tensor]]], tuple[float, float]]


def _run(cell: Cell, device: torch.device, model: Any, step_of: Step) -> Outcome:
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    outcome = Outcome([], [], _weights(model), {}, set())
    model_call = getattr(step_of, "engine", model)
    reader = rank // cell.sp_size
    for step in range(STEPS):
        options, factor = loss_options(cell, device, step, world // cell.sp_size)

        def forward(micro: int, step: int = step, options: Any = options, factor: float = factor) -> torch.Tensor:
            seed_noise(step, micro, rank)
            batch = inputs(cell, device, step, micro, reader)
            if cell.sp_size == 1 or not hasattr(model, "fluid"):
                return model_call(**batch, **options).loss * factor
            return _sequence_loss(get_state(model), model_call, batch, **options) * factor

        loss, norm = step_of([lambda m=m: forward(m) for m in range(cell.accumulation)])  # type: ignore[misc]
        total = torch.tensor(loss, dtype=torch.float64, device=device)
        if world > 1:
            dist.all_reduce(total)
        outcome.losses.append(float(total) / world)
        outcome.norms.append(norm)
    outcome.after = _weights(model)
    return outcome


def _sequence_loss(state: FluidState, model_call: Any, batch: dict[str, torch.Tensor], **options: int) -> torch.Tensor:
    """The loss of whole sequences from this rank's piece, as a loop without the Trainer computes it."""
    shard = state.shard_batch(batch)
    output = model_call(**shard)
    loss = state.sequence_loss(output.logits, shard["shift_labels"], **options)
    return loss if output.aux_loss is None else loss + AUX * output.aux_loss


def _plain_step(cell: Cell, model: Any, optimizer: torch.optim.Optimizer) -> Step:
    state = get_state(model) if hasattr(model, "fluid") else None

    def step(forwards: list[Callable[[], torch.Tensor]]) -> tuple[float, float]:
        total = 0.0
        for forward in forwards:
            with autocast(cell, next(model.parameters()).device):
                loss = forward()
            (loss / cell.accumulation).backward()
            total += float(loss.detach()) / cell.accumulation
            if state is not None:
                state.finish_batch()
        norm = torch.zeros(())
        if state is not None:
            state.reduce_gradients(model)
            norm = state.clip_grad_norm_(model, CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return total, float(norm)

    return step


def _engine_step(cell: Cell, engine: Any) -> Step:
    def step(forwards: list[Callable[[], torch.Tensor]]) -> tuple[float, float]:
        total = 0.0
        for forward in forwards:
            loss = forward()
            engine.backward(loss)
            engine.step()
            total += float(loss.detach()) / cell.accumulation
        norm = engine.get_global_grad_norm()
        return total, float("nan") if norm is None else float(norm)

    step.engine = engine  # type: ignore[attr-defined]
    return step


@contextlib.contextmanager
def _engine(cell: Cell, model: Any, optimizer: torch.optim.Optimizer) -> Iterator[Any]:
    import deepspeed

    zero: dict[str, Any] = {"stage": int(cell.engine[-1]), "stage3_param_persistence_threshold": 0}
    if cell.offload == "cpu":
        zero["offload_optimizer"] = {"device": "cpu"}
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": cell.accumulation,
        "gradient_clipping": CLIP,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    if cell.dtype == "bfloat16":
        settings["bf16"] = {"enabled": True}
    if cell.dtype.startswith("float16"):
        static = cell.dtype == "float16_static"
        scale = {"loss_scale": LOSS_SCALE} if static else {"initial_scale_power": int(math.log2(LOSS_SCALE))}
        settings["fp16"] = {"enabled": True, **scale}
    if cell.dtype == "autocast":
        settings["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    with float16_everywhere():
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
        try:
            yield engine
        finally:
            engine.destroy()


@contextlib.contextmanager
def float16_everywhere() -> Iterator[None]:
    """Let DeepSpeed train in float16 on CPUs without float16 instructions, where torch computes in it too, slowly."""
    import deepspeed

    accelerator = deepspeed.get_accelerator()
    if accelerator.is_fp16_supported():
        yield
        return
    accelerator.is_fp16_supported = lambda: True
    try:
        yield
    finally:
        del accelerator.is_fp16_supported


def _weights(model: Any) -> dict[str, torch.Tensor]:
    """Full weights under the names of the outermost model, on rank 0."""
    if not hasattr(model, "fluid"):
        return {}
    state = get_state(model)
    with state.gathering():
        weights = iterate_weights(model, state, list(weight_specs(model)))
        return {name: weight.double() for name, weight in weights if weight is not None}


def _forget(model: Any) -> None:
    """Take the model out of the backend's book-keeping; it is thrown away, so nothing is put back."""
    state = model.fluid
    state.backend.detach(model)
    state.control.close()
    release_exchange_groups(state.groups)
