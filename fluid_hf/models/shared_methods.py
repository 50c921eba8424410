"""Methods of a block, or of the decoder layer around it, that run a shared expert in the communication window: made
from their own source (`fluid_hf.models.shared_calls`), where that is understood.
"""

from __future__ import annotations

import ast
import copy
import functools
import inspect
import types
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from fluid_hf.models.code_reading import function_source
from fluid_hf.models.expert_lists import FUNCTIONS
from fluid_hf.models.in_place import OwnCalls, may_change, returns_fresh
from fluid_hf.models.put_off import carries, put_off, run_experts, take
from fluid_hf.models.shared_calls import PUT_OFF, RUN_EXPERTS, TAKE, SharedCalls, carry, experts_calls
from fluid_hf.moe.layer import ExpertParallelLayer

__all__ = ["block_functions", "carrying_forward", "compiled", "layer_forward", "shared_children", "with_shared_put_off"]

Forward = Callable[..., Any]
# Where modules are defined that change nothing they are given, unless they say `inplace`.
TRUSTED = ("torch.nn.modules.", "transformers.activations")
# Names that transformers' function around the forward of a decoder layer closes over.
CHECKPOINTING = ("forward", "forward_with_checkpointing")


def shared_children(module: nn.Module) -> frozenset[str]:
    """Children that are shared experts, by their names; beside experts an MLP is one, too (Gemma 4)."""
    names = {name for name, _ in module.named_children()}
    shared = {name for name in names if "shared" in name and "gate" not in name and "router" not in name}
    return frozenset(shared | (names & {"mlp"} if "experts" in names else set()))


def block_functions(block: nn.Module, attribute: str) -> dict[str, ast.FunctionDef]:
    """A block's methods that call its experts, by name: those whose source is what they are."""
    found = {}
    for name in dir(type(block)):
        method = inspect.getattr_static(type(block), name)
        if not inspect.isfunction(method) or name in vars(block) or hasattr(nn.Module, name) and name != "forward":
            continue
        function = _source(method)
        if function is not None and experts_calls(function, attribute):
            found[name] = function
    return found


def with_shared_put_off(
    block: nn.Module, attribute: str, functions: Mapping[str, ast.FunctionDef]
) -> dict[str, ast.FunctionDef]:
    """The methods of a block with its shared experts put off: those that change; none if there is nothing to put off.

    Args:
        block: holds the experts and the shared experts.
        attribute: name of the experts in it.
        functions: methods that call them as `self.experts(hidden, index, weights)`, by name.
    """
    shared = shared_children(block)
    carriers = {name: function for name, function in functions.items() if name != "forward" and _can_carry(function)}
    forward = (
        functions.get("forward") or ("forward" not in vars(block) and function_source(type(block).forward)) or None
    )
    if not shared or forward is None:
        return {}
    made = {"forward": copy.deepcopy(forward)}
    own = _Own(block, functions, attribute).calls()
    if not SharedCalls(attribute, frozenset(carriers), shared, own).rewrite(made["forward"]):
        return {}
    for name, function in carriers.items():
        made[name] = copy.deepcopy(function)
        carry(made[name], attribute)
    return made


def carrying_forward(block: nn.Module, attribute: str) -> Forward | None:
    """A block's forward that takes a call that was put off along to its experts; `None` if it is not understood."""
    function = block_functions(block, attribute).get("forward")
    if function is None or not _can_carry(function):
        return None
    carry(function, attribute)
    return compiled(function, type(block).forward)


def layer_forward(layer: nn.Module, child: str) -> Forward | None:
    """The forward of a layer that calls a shared expert beside the block `child`, put off; `None` if there is none.

    Such a forward gives the block what it put off, which the block must carry.
    """
    shared = shared_children(layer)
    if not shared or "forward" in vars(layer):
        return None
    function = _source(type(layer).forward)
    if function is None:
        return None
    if not SharedCalls(None, frozenset({child}), shared, _Own(layer, {}, child).calls()).rewrite(function):
        return None
    return compiled(function, type(layer).forward)


def _is_checkpointing(method: Any) -> bool:
    """Whether a forward is transformers' own around that of a layer, which recomputes it in backward if asked."""
    free = getattr(getattr(method, "__code__", None), "co_freevars", ())
    return set(free) == set(CHECKPOINTING) and method.__globals__.get("__name__") == "transformers.modeling_layers"


def _inside_checkpointing(method: Any) -> Any:
    while _is_checkpointing(method):
        method = inspect.getclosurevars(method).nonlocals["forward"]
    return method


def _source(method: Any) -> ast.FunctionDef | None:
    return function_source(_inside_checkpointing(method))


def _as_checkpointed(method: Any, forward: Forward) -> Forward:
    """`forward` inside transformers' function for checkpointing, if `method` is inside it."""
    if not _is_checkpointing(method):
        return forward
    free = method.__code__.co_freevars
    cells = tuple(types.CellType({"forward": forward}.get(name, method)) for name in free)
    made = types.FunctionType(method.__code__, method.__globals__, method.__name__, None, cells)
    return functools.update_wrapper(made, method)


def compiled(function: ast.FunctionDef, method: Any) -> Forward:
    """A method from its changed source, with the names of the module that defined it."""
    plain = inspect.unwrap(_inside_checkpointing(method))
    maker = ast.parse(f"def make({PUT_OFF}, {RUN_EXPERTS}, {TAKE}): return 0").body[0]
    assert isinstance(maker, ast.FunctionDef)
    maker.body = [function, ast.Return(ast.Name(function.name, ast.Load()))]
    module = ast.fix_missing_locations(ast.Module([maker], []))
    scope: dict[str, Any] = {}
    exec(compile(module, f"<{plain.__qualname__} as fluid_hf calls it>", "exec"), plain.__globals__, scope)
    made: Forward = scope["make"](put_off, run_experts, take)
    return _as_checkpointed(method, made)


def _can_carry(function: ast.FunctionDef) -> bool:
    """Whether a method calls the experts in the state that it is called in: not under autocast of its own."""
    return not any(isinstance(node, ast.With) for node in ast.walk(function))


class _Own:
    """What a module's own methods and children do with what they are given, from their source.

    Args:
        module: the module.
        functions: sources of methods that take the place of its own.
        experts: name of its routed experts, or of a block that holds them.
    """

    def __init__(self, module: nn.Module, functions: Mapping[str, ast.FunctionDef], experts: str | None) -> None:
        self._module, self._functions, self._experts = module, functions, experts
        self._reading: set[str] = set()

    def calls(self) -> OwnCalls:
        return OwnCalls(self.leaves_alone, self.is_fresh)

    def leaves_alone(self, name: str) -> bool:
        found = getattr(self._module, name, None)
        if isinstance(found, nn.Module):
            if self._is_experts(name, found):
                return True
            if type(found).__module__.startswith(TRUSTED):
                return not getattr(found, "inplace", False)
            return _Own(found, {}, None).leaves_alone("forward")
        if any(found is known for known in FUNCTIONS):  # an activation
            return True
        function = self._source(name)
        if function is None or name in self._reading:
            return False
        self._reading.add(name)
        given = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
        names = {argument.arg for argument in given} - {"self"}
        changes = may_change(function.body, names, function, self.calls())
        self._reading.remove(name)
        return not changes

    def is_fresh(self, name: str) -> bool:
        found = getattr(self._module, name, None)
        if isinstance(found, nn.Module):
            if type(found) is nn.Linear or self._is_experts(name, found):
                return True
            return not type(found).__module__.startswith(TRUSTED) and _Own(found, {}, None).is_fresh("forward")
        function = self._source(name)
        if function is None or name in self._reading:
            return False
        self._reading.add(name)
        fresh = returns_fresh(function, self.calls())
        self._reading.remove(name)
        return fresh

    def _is_experts(self, name: str, module: nn.Module) -> bool:
        """Whether these are routed experts, called as one: a list of them is about to be replaced."""
        return isinstance(module, ExpertParallelLayer) or isinstance(module, nn.ModuleList) and name == self._experts

    def _source(self, name: str) -> ast.FunctionDef | None:
        if name in self._functions:
            return self._functions[name]
        method = inspect.getattr_static(type(self._module), name, None)
        if name in vars(self._module) or not inspect.isfunction(method):
            bound = vars(self._module).get(name)
            return function_source(bound.__func__) if inspect.ismethod(bound) and not carries(bound) else None
        return function_source(method)
