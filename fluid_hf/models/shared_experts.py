"""Shared experts inside the communication window: the forward of a block that calls one, with the calls reordered.

A shared expert needs no exchange, so it can run while the routed rows travel: between the experts and the sum of their
results (`fluid_hf.moe.expert_parallel`). HF's blocks call it before or after `self.experts`; the functions of
`fluid_hf.models.block_forms` make the same calls with the shared expert handed to `self.experts` as `between`.

A block qualifies by the text of its forward, not by its family: it must read exactly like the text beside the
function, names of local variables and annotations aside. A block that reads otherwise, in another version of
transformers or patched by somebody else, keeps its own forward: the same results, without this overlap.
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

__all__ = [
    "bind_blocks",
    "bind_methods",
    "canonical_text",
    "find_form",
    "has_form",
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

    try:
        text = canonical_text(inspect.getsource(block.forward))
    except (OSError, TypeError, SyntaxError):  # no source, or not a function in a file of its own
        return None
    return None if text is None else _FORMS.get(text)


def has_form(source: str) -> bool:
    """Whether a forward with this source is known."""
    from fluid_hf.models import block_forms  # noqa: F401 - registers the forms

    return canonical_text(source) in _FORMS


def bind_blocks(model: nn.Module, experts: Iterable[str]) -> list[str]:
    """Let the blocks around these experts (by module name) run by their forms; the names of those that do."""
    bound: dict[str, None] = {}
    for name in experts:
        parent = name.rpartition(".")[0]
        for block_name in (parent, parent.rpartition(".")[0]):
            block = model.get_submodule(block_name)
            form = find_form(type(block))
            if form is not None and block_name not in bound and "forward" not in vars(block):
                block.forward = types.MethodType(form, block)  # type: ignore[method-assign]
                bound[block_name] = None
    return list(bound)


def unbind_blocks(model: nn.Module, names: Iterable[str]) -> None:
    """Give the blocks their classes' own forwards back."""
    for name in names:
        unbind_methods(model.get_submodule(name), ["forward"])


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
    """The block's routed experts, with `shared` run in their window: both results."""
    routed, other = block.experts(hidden_TH, index_TK, weights_TK, shared)
    return routed, other
