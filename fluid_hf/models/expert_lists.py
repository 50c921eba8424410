"""Experts that are one module each, in a `nn.ModuleList`: how models wrote them before transformers 5, and models whose
code comes from the Hub (`trust_remote_code`) still do.

An expert qualifies by its code: its forward must be `down(act(gate(x)) * up(x))`, `down(act(up(x)))`, or the first with
gate and up side by side in one projection, whatever its layers are called. Their weights are stacked to one tensor for
all experts; checkpoints keep the names and shapes that the model gave them.
"""

from __future__ import annotations

import ast
import copy
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers.activations import ACT2CLS

from fluid_hf.errors import UnsupportedModelError
from fluid_hf.models.code_reading import choose_branches, follow, function_source, same_words
from fluid_hf.models.expert_hooks import has_hooks
from fluid_hf.models.stored_experts import StoredExperts
from fluid_hf.moe.expert_math import ExpertFormat

__all__ = ["AbsentExpert", "ExpertList", "is_expert_list", "read_expert_list"]

# Elementwise activations: their slope is taken element by element.
FUNCTIONS = (functional.silu, functional.gelu, functional.relu, torch.relu, torch.sigmoid, torch.tanh)
MODULES = {nn.SiLU, nn.GELU, *(entry[0] if isinstance(entry, tuple) else entry for entry in ACT2CLS.values())}


@dataclass(frozen=True)
class _Mlp:
    """An expert's layers by their use, as its forward calls them."""

    first: tuple[str, ...]
    down: str
    act: Callable[[torch.Tensor], torch.Tensor]
    gated: bool


class AbsentExpert(nn.Module):
    """Stands in a list for an expert that this rank has not loaded."""


class ExpertList(StoredExperts):
    """The experts of a `nn.ModuleList`.

    Attributes:
        modules: the list.
        parts: names of each stacked weight's parts within an expert, side by side along its outputs.
        gated: whether there is a gate.
    """

    def __init__(
        self,
        modules: nn.ModuleList,
        parts: Mapping[str, tuple[str, ...]],
        act_fn: Callable[[torch.Tensor], torch.Tensor],
        gated: bool,
    ) -> None:
        super().__init__(modules, tuple(parts), act_fn)
        self.modules, self.parts, self.gated = modules, parts, gated
        self._loaded = _present(modules)

    @property
    def format(self) -> ExpertFormat | None:
        if self.gated:
            return ExpertFormat(self._gate) if len(self.parts) == 4 else None
        return ExpertFormat(self.act_fn)

    def _gate(self, gate_up_SN: torch.Tensor) -> torch.Tensor:
        gate_SI, up_SI = gate_up_SN.chunk(2, dim=-1)
        return self.act_fn(gate_SI) * up_SI

    def parameters(self, name: str) -> list[nn.Parameter]:
        return [expert.get_parameter(part) for expert in self._loaded for part in self.parts[name]]

    def shape(self, name: str) -> tuple[int, ...]:
        part = self.parameters(name)[0]
        first, *others = getattr(part, "ds_shape", part.shape)
        return (len(self.modules), len(self.parts[name]) * first, *others)

    def take(self, name: str, held: slice) -> torch.Tensor:
        # Of those loaded, if not all are.
        chosen = self._loaded if len(self._loaded) < len(self.modules) else self._loaded[held]
        rows = [[expert.get_parameter(part).data for part in self.parts[name]] for expert in chosen]
        out = rows[0][0].new_empty((len(rows), *self.shape(name)[1:]))
        for expert, weights in zip(out, rows, strict=True):
            torch.cat(weights, out=expert)
        return out

    def unstack(self, name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """Views by the names within the list: `0.gate_proj.weight` and so on."""
        found: dict[str, torch.Tensor] = {}
        for index, expert in enumerate(weight):
            for part, value in zip(self.parts[name], expert.chunk(len(self.parts[name])), strict=True):
                found[f"{index}.{part}"] = value
        return found

    def stack(self, name: str, stored: Mapping[str, torch.Tensor], held: slice) -> torch.Tensor:
        experts = range(len(self.modules))[held]
        return torch.stack([torch.cat([stored[f"{index}.{part}"] for part in self.parts[name]]) for index in experts])

    def put(self, name: str, weight: torch.Tensor) -> None:
        for index, expert in enumerate(self.modules):
            if isinstance(expert, AbsentExpert):
                self.modules[index] = copy.deepcopy(self._loaded[0])
        self._loaded = _present(self.modules)
        super().put(name, weight)


def _present(modules: nn.ModuleList) -> list[nn.Module]:
    return [expert for expert in modules if not isinstance(expert, AbsentExpert)]


def is_expert_list(name: str, module: nn.Module) -> bool:
    """Whether a module is a list of experts, by what it is called and holds."""
    if not isinstance(module, nn.ModuleList) or "expert" not in name.rpartition(".")[2]:
        return False
    return len(module) > 1 and "shared" not in name.rpartition(".")[2] and len({type(m) for m in _present(module)}) == 1


def read_expert_list(modules: nn.ModuleList, where: str) -> ExpertList:
    """The experts of a list as tensors.

    Raises:
        UnsupportedModelError: they are not alike, or their code is not known; says which and why.
    """
    expert = _present(modules)[0]
    mlp = _read_mlp(expert)
    if mlp is None:
        raise UnsupportedModelError(
            f"{where} has experts ({type(expert).__name__}) whose forward is not down(act(gate(x)) * up(x)) or "
            "down(act(up(x))) between nn.Linear layers, so their weights cannot be stacked."
        )
    first = "gate_up_proj" if mlp.gated else "up_proj"
    parts = {first: tuple(f"{layer}.weight" for layer in mlp.first), "down_proj": (f"{mlp.down}.weight",)}
    layers = [expert.get_submodule(layer) for layer in (*mlp.first, mlp.down)]
    biases = {layer.bias is not None for layer in layers}
    if len(biases) > 1:
        raise UnsupportedModelError(f"{where} has experts with biases in some of their projections only.")
    if biases == {True}:
        parts = {
            first: parts[first],
            f"{first}_bias": tuple(f"{layer}.bias" for layer in mlp.first),
            "down_proj": parts["down_proj"],
            "down_proj_bias": (f"{mlp.down}.bias",),
        }
    known = {part for names in parts.values() for part in names}
    _check_alike(modules, known, where)
    return ExpertList(modules, parts, mlp.act, mlp.gated)


def _check_alike(modules: nn.ModuleList, known: set[str], where: str) -> None:
    def describe(expert: nn.Module) -> dict[str, Any]:
        return {
            name: (tuple(getattr(p, "ds_shape", p.shape)), p.dtype, p.requires_grad, type(p.data))
            for name, p in expert.named_parameters()
        }

    present = _present(modules)
    first = describe(present[0])
    other = sorted(first.keys() - known)
    if other:
        raise UnsupportedModelError(f"{where}.0 has a parameter {other[0]} whose use is not known.")
    for index, expert in enumerate(modules):
        if isinstance(expert, AbsentExpert):
            continue
        for name, found in describe(expert).items():
            if found != first.get(name):
                raise UnsupportedModelError(
                    f"{where}.{index}.{name} ({found}) must have the shape, dtype and requires_grad of expert 0's "
                    f"({first.get(name)})."
                )
        if any(has_hooks(m) or "forward" in vars(m) for m in expert.modules()):
            raise UnsupportedModelError(
                f"{where}.{index} has hooks or a forward of its own, which would not be called any more."
            )


def _read_mlp(expert: nn.Module) -> _Mlp | None:
    function = function_source(type(expert).forward)
    if function is None or len(function.args.args) != 2:
        return None
    known: dict[str, ast.expr] = {function.args.args[1].arg: ast.Name("_x", ast.Load())}
    *body, last = choose_branches(function.body, expert)
    for statement in body:
        if not follow(statement, known):
            return None
    if not isinstance(last, ast.Return) or last.value is None:
        return None
    result = ast.parse(same_words(last.value, known), mode="eval").body
    down = _layer_call(expert, result)
    if down is None:
        return None
    return _read_inner(expert, down, result.args[0])  # type: ignore[attr-defined]


def _read_inner(expert: nn.Module, down: str, inner: ast.expr) -> _Mlp | None:
    """What is given to the down projection."""
    if isinstance(inner, ast.BinOp) and isinstance(inner.op, ast.Mult):
        for left, right in ((inner.left, inner.right), (inner.right, inner.left)):
            act = _activation(expert, left)
            if act is None or not isinstance(left, ast.Call):
                continue
            gate, up = _layer_call(expert, left.args[0], "_x"), _layer_call(expert, right, "_x")
            if gate is not None and up is not None and gate != up:
                return _Mlp((gate, up), down, act, gated=True)
            fused = _halves(expert, left.args[0], right)
            if fused is not None:
                return _Mlp((fused,), down, act, gated=True)
        return None
    act = _activation(expert, inner)
    up = _layer_call(expert, inner.args[0], "_x") if act is not None and isinstance(inner, ast.Call) else None
    return None if act is None or up is None else _Mlp((up,), down, act, gated=False)


def _halves(expert: nn.Module, left: ast.expr, right: ast.expr) -> str | None:
    """The layer of which `left` and `right` are the first and the second half of the outputs."""
    for layer, module in expert.named_children():
        if isinstance(module, nn.Linear):
            texts = [f"self.{layer}(_x).chunk(2, {dim})" for dim in ("dim=-1", "-1")]
            if any((ast.unparse(left), ast.unparse(right)) == (f"{t}[0]", f"{t}[1]") for t in texts):
                return layer
    return None


def _layer_call(expert: nn.Module, node: ast.expr, argument: str | None = None) -> str | None:
    """Name of the linear layer that an expression calls."""
    if not isinstance(node, ast.Call) or len(node.args) != 1 or node.keywords:
        return None
    called = ast.unparse(node.func)
    name = called.removeprefix("self.")
    if name == called or (argument is not None and ast.unparse(node.args[0]) != argument):
        return None
    return name if type(getattr(expert, name, None)) is nn.Linear else None


def _activation(expert: nn.Module, node: ast.expr) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """The function that an expression calls, if it is known to be elementwise."""
    if not isinstance(node, ast.Call) or len(node.args) != 1 or node.keywords:
        return None
    path = ast.unparse(node.func).split(".")
    scope = {"self": expert, **inspect.unwrap(type(expert).forward).__globals__}
    found = scope.get(path[0])
    for name in path[1:]:
        found = getattr(found, name, None)
    if isinstance(found, nn.Module):
        return found if type(found) in MODULES and not any(True for _ in found.parameters()) else None
    return found if any(found is known for known in FUNCTIONS) else None
