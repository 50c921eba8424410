"""Blocks that call a list of experts in a loop of their own: which methods take the place of theirs.

The router, shared experts, auxiliary losses and what is returned stay the block's own code; only its loop is replaced
(`fluid_hf.models.expert_loops`), and shared experts are put off until the routed ones' communication window where that
gives the same (`fluid_hf.models.shared_methods`). For a block whose loop is not known, `register_block` takes a
forward.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from fluid_hf.errors import ConfigError, UnsupportedModelError
from fluid_hf.models.code_reading import function_source
from fluid_hf.models.expert_loops import UnknownLoopError, replace_loops
from fluid_hf.models.shared_methods import compiled, with_shared_put_off

__all__ = ["block_methods", "register_block"]

# Attribute of a block's class: the forward given by `register_block`.
REGISTERED = "_fluid_forward"
Forward = Callable[..., Any]


def register_block(block: type[nn.Module]) -> Callable[[Forward], Forward]:
    """Decorator: `function(self, ...)` is the forward of such blocks while a model is patched.

    For a block whose own loop over its `nn.ModuleList` of experts is not known. The function takes and returns what the
    block's forward does, and calls the experts once, on every rank and also without tokens:
    `self.experts(hidden [T, H], index [T, K] (int64), weights [T, K]) -> [T, H]`, by the name that the list has. With
    a function as fourth argument, a shared expert, they return a pair: their result, and the function's, which was
    called while rows travelled.

    Args:
        block: the class, of a model from the Hub `type(model.model.layers[0].mlp)`. The function is kept on it.

    Raises:
        ConfigError: it is no class of modules.
    """
    if not (isinstance(block, type) and issubclass(block, nn.Module)):
        raise ConfigError(f"block ({block!r}) must be a class of modules; use register_block(type(block)).")

    def register(function: Forward) -> Forward:
        setattr(block, REGISTERED, function)
        return function

    return register


def block_methods(block: nn.Module, attribute: str, where: str) -> dict[str, Forward]:
    """Methods that take the place of the block's own, by name.

    Args:
        block: holds the list of experts.
        attribute: name of the list in it.
        where: the block, for messages.

    Raises:
        UnsupportedModelError: a method calls the experts in a way that is not known; says which.
    """
    registered = getattr(type(block), REGISTERED, None)
    if registered is not None:
        return {"forward": registered}
    functions: dict[str, ast.FunctionDef] = {}
    for name, method in _own_methods(block).items():
        if f"self.{attribute}" not in _text(method):
            continue
        function = function_source(method)
        if function is None or name in vars(block):
            raise _unknown(block, where, name, "which is decorated or replaced")
        try:
            functions[name] = replace_loops(function, block, attribute)
        except UnknownLoopError as error:
            raise _unknown(block, where, name, f"in a way that is not known ({error})") from None
    if not functions:
        raise _unknown(block, where, "forward", f"which does not name self.{attribute} or has no source")
    functions |= with_shared_put_off(block, attribute, functions)
    return {name: compiled(function, getattr(type(block), name)) for name, function in functions.items()}


def _own_methods(block: nn.Module) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for cls in type(block).__mro__:
        if cls is nn.Module:
            break
        for name, value in vars(cls).items():
            if inspect.isfunction(value) and name != "__init__":
                found.setdefault(name, value)
    return found


def _text(method: Any) -> str:
    try:
        return inspect.getsource(inspect.unwrap(method))
    except (OSError, TypeError):
        return ""


def _unknown(block: nn.Module, where: str, method: str, why: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{where} runs its experts in its method {method}, {why}; write its forward with one call of "
        f"self.experts(hidden, index, weights) and register it: fluid_hf.register_block({type(block).__name__})."
    )
