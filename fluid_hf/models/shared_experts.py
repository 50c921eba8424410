"""Shared experts inside the communication window: the forward of a block that calls one, with the calls reordered.

A shared expert needs no exchange, so it can run while the routed rows travel: between the experts and the sum of their
results (`fluid_hf.moe.expert_parallel`). HF's blocks call it before or after `self.experts`; the functions of
`fluid_hf.models.block_forms` make the same calls with the shared expert handed to `self.experts` as `between`.

A block has a form by the text of its forward, not by its family: it must read exactly like the text beside the
function, names of local variables and annotations aside. The forward of another block, or of a layer that calls the
shared expert beside the block, is made from its own source (`fluid_hf.models.shared_methods`). What is not understood,
or was patched by somebody else, keeps its own forward: the same results, without this overlap.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from fluid_hf.models.expert_hooks import is_watched
from fluid_hf.models.shared_methods import (
    block_functions,
    carrying_forward,
    compiled,
    layer_forward,
    shared_children,
    with_shared_put_off,
)

__all__ = [
    "bind_blocks",
    "bind_methods",
    "canonical_text",
    "find_form",
    "has_form",
    "method_text",
    "register_form",
    "unbind_blocks",
    "unbind_methods",
]

Forward = Callable[..., Any]
_FORMS: dict[str, Forward] = {}


def register_form(text: str) -> Callable[[Forward], Forward]:
    """Decorator: the function replaces the forward of blocks whose source is `text`."""

    def register(function: Forward) -> Forward:
        canonical = canonical_text(text)
        assert canonical is not None
        _FORMS[canonical] = function
        return function

    return register


def canonical_text(source: str) -> str | None:
    """A function's source with local names numbered, without docstring and annotations; `None` if it is decorated."""
    function = ast.parse(textwrap.dedent(source)).body[0]
    if not isinstance(function, ast.FunctionDef) or function.decorator_list:
        return None
    first = function.body[0]
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
        del function.body[0]
    function.returns = None
    arguments = [*function.args.args, *function.args.kwonlyargs]
    stored = [n.id for n in ast.walk(function) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]
    local = [argument.arg for argument in arguments if argument.arg != "self"]
    names = {name: f"v{index}" for index, name in enumerate(dict.fromkeys([*local, *stored]))}
    for argument in arguments:
        argument.arg, argument.annotation = names.get(argument.arg, argument.arg), None
    for node in ast.walk(function):
        if isinstance(node, ast.Name):
            node.id = names.get(node.id, node.id)
    return ast.unparse(function)


def find_form(block: type[nn.Module]) -> Forward | None:
    """The forward that runs the shared expert of such a block in the window; `None` if none is known."""
    from fluid_hf.models import block_forms  # noqa: F401 - registers the forms

    text = method_text(block.forward)
    return None if text is None else _FORMS.get(text)


def method_text(method: Any) -> str | None:
    """`canonical_text` of a method; `None` if it has no source of its own, or somebody wrapped it."""
    if hasattr(method, "__wrapped__"):
        return None
    try:
        return canonical_text(inspect.getsource(method))
    except (OSError, TypeError, SyntaxError):  # no source, or not a function in a file of its own
        return None


def has_form(source: str) -> bool:
    """Whether a forward with this source is known."""
    from fluid_hf.models import block_forms  # noqa: F401 - registers the forms

    return canonical_text(source) in _FORMS


def bind_blocks(model: nn.Module, experts: Iterable[str]) -> dict[str, tuple[nn.Module, list[str]]]:
    """Let what is around these experts (by module name) run its shared expert in their window: the block, by a form or
    by its own source, or the layer that calls the block. Their modules and names of the methods bound, by module name.
    """
    bound: dict[str, tuple[nn.Module, list[str]]] = {}

    def bind(name: str, methods: Mapping[str, Forward | None]) -> bool:
        found = {method: function for method, function in methods.items() if function is not None}
        bind_methods(model.get_submodule(name), found)
        if found:
            bound[name] = model.get_submodule(name), list(found)
        return bool(found)

    for experts_name in experts:
        name, _, attribute = experts_name.rpartition(".")
        outer, _, child = name.rpartition(".")
        block, layer = model.get_submodule(name), model.get_submodule(outer)
        is_own = bind(name, _methods(block, attribute)) or name in bound
        form = find_form(type(layer)) if outer not in bound and "forward" not in vars(layer) else None
        beside = form is not None or outer in bound or bool(shared_children(layer))
        can_carry = name and beside and not is_own and "forward" not in vars(block)
        carrying = carrying_forward(block, attribute) if can_carry else None
        if carrying is not None and form is None and outer not in bound:
            form = layer_forward(layer, child)
        if bind(outer, {"forward": form}) or outer in bound:
            bind(name, {"forward": carrying})
    return bound


def _methods(block: nn.Module, attribute: str) -> dict[str, Forward | None]:
    """The block's methods by its form or, if it has none, by its source."""
    if "forward" in vars(block):
        return {}
    form = find_form(type(block))
    if form is not None:
        return {"forward": form}
    made = with_shared_put_off(block, attribute, block_functions(block, attribute)) if shared_children(block) else {}
    return {name: compiled(function, getattr(type(block), name)) for name, function in made.items()}


def unbind_blocks(bound: Mapping[str, tuple[nn.Module, Iterable[str]]]) -> None:
    """Give the blocks their classes' own methods back, wherever they are now."""
    for block, methods in bound.values():
        unbind_methods(block, methods)


def bind_methods(block: nn.Module, methods: Mapping[str, Forward]) -> None:
    """Give a block these methods instead of its class's."""
    for name, method in methods.items():
        setattr(block, name, types.MethodType(method, block))


def unbind_methods(block: nn.Module, names: Iterable[str]) -> None:
    """Give a block its class's own methods back."""
    for name in names:
        vars(block).pop(name, None)


def run_between(
    block: Any, hidden_TH: torch.Tensor, index_TK: torch.Tensor, weights_TK: torch.Tensor, shared: Callable[[], Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The block's routed experts, with `shared` run in their window: both results. Hooks on the experts see what
    they see in the unpatched model; `shared` then runs outside.
    """
    if is_watched(block.experts):
        return block.experts(hidden_TH, index_TK, weights_TK), shared()
    routed, other = block.experts(hidden_TH, index_TK, weights_TK, shared)
    return routed, other
