"""Whether code may change a tensor in place: read from the source, and yes where it cannot be told.

Names are followed through assignments, wherever they stand: what may share memory with a name stands for it.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch

__all__ = ["OwnCalls", "called", "may_change", "returns_fresh"]

# Functions and methods whose result has memory of its own.
FRESH = frozenset(
    """
    argmax argsort bmm cat clone cumsum dim empty empty_like exp full full_like gather gelu index_select item linear log
    matmul mean mm new_empty new_zeros norm numel one_hot ones ones_like relu repeat_interleave rsqrt sigmoid silu size
    softmax stack sum tanh tolist topk where zeros zeros_like
    """.split()
)
BUILTINS = frozenset("bool float int isinstance len list max min range tuple".split())
# Methods whose result may share the memory of their tensor, but not of what they are given.
VIEWS = frozenset(
    """
    bfloat16 chunk contiguous detach double expand expand_as flatten float half narrow permute reshape select split
    squeeze to transpose type type_as unflatten unsqueeze view view_as
    """.split()
)
# Attributes of a tensor that are no part of its memory.
DESCRIBING = ("device", "dtype", "ndim", "shape")
TORCH = ("torch", "F", "nn.functional", "torch.nn.functional", "torch.special", "torch.linalg")
# Methods that put what they are given into their object.
KEEPING = ("append", "extend", "insert", "update", "set_", "setdefault")


@dataclass(frozen=True)
class OwnCalls:
    """What is known of a module's calls of its own methods and children, `self.x(...)`, by name.

    Attributes:
        leaves_alone: whether it changes nothing that it is given.
        is_fresh: whether its result has memory of its own.
    """

    leaves_alone: Callable[[str], bool]
    is_fresh: Callable[[str], bool]


def may_change(statements: Iterable[ast.AST], names: set[str], function: ast.FunctionDef, own: OwnCalls) -> bool:
    """Whether statements of a function may change in place what these names stand for.

    Args:
        statements: the statements.
        names: names of tensors.
        function: the function that holds the statements.
        own: calls of the module's own.
    """
    local = _local_names(function)
    same = _aliases(function, names, local, own)
    return any(bool(_changed(node, own, local) & same) for statement in statements for node in ast.walk(statement))


def returns_fresh(function: ast.FunctionDef, own: OwnCalls) -> bool:
    """Whether what a function returns shares no memory with its arguments."""
    local = _local_names(function)
    given = {argument.arg for argument in [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]}
    same = _aliases(function, given | {"self"}, local, own)
    returned = [node.value for node in ast.walk(function) if isinstance(node, ast.Return) and node.value is not None]
    return not any(_shared(value, own, local) & same for value in returned)


def called(node: ast.AST) -> str | None:
    """`x` of `self.x(...)`."""
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
        return None
    return node.func.attr if isinstance(node.func.value, ast.Name) and node.func.value.id == "self" else None


def _local_names(function: ast.FunctionDef) -> set[str]:
    arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    arguments += [extra for extra in (function.args.vararg, function.args.kwarg) if extra is not None]
    stored = {n.id for n in ast.walk(function) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    return {argument.arg for argument in arguments} | stored


def _aliases(function: ast.FunctionDef, names: set[str], local: set[str], own: OwnCalls) -> set[str]:
    """All names that may share memory with one of `names`."""
    links = [link & local for node in ast.walk(function) for link in _links(node, own, local)]
    same = set(names)
    while True:
        grown = same.union(*(link for link in links if link & same))
        if grown == same:
            return same
        same = grown


def _links(node: ast.AST, own: OwnCalls, local: set[str]) -> Iterator[set[str]]:
    """Sets of names that may share memory after a node."""
    if isinstance(node, ast.Assign):
        pairs = [(target, node.value) for target in node.targets]
        first = node.targets[0]
        if len(pairs) == 1 and isinstance(first, ast.Tuple) and isinstance(node.value, ast.Tuple):
            if len(first.elts) == len(node.value.elts) and not any(isinstance(e, ast.Starred) for e in ast.walk(node)):
                pairs = list(zip(first.elts, node.value.elts, strict=True))
        for target, value in pairs:
            yield _names(target) | _shared(value, own, local)
    elif isinstance(node, ast.AnnAssign | ast.NamedExpr) and node.value is not None:
        yield _names(node.target) | _shared(node.value, own, local)
    elif isinstance(node, ast.For | ast.comprehension):
        yield _names(node.target) | _shared(node.iter, own, local)
    elif isinstance(node, ast.withitem) and node.optional_vars is not None:
        yield _names(node.optional_vars) | _names(node.context_expr)
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in KEEPING:
        yield _names(node)


def _names(node: ast.AST) -> set[str]:
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}


def _shared(node: ast.expr, own: OwnCalls, local: set[str]) -> set[str]:
    """Names with which an expression's value may share memory."""
    if isinstance(node, ast.Constant | ast.Compare | ast.JoinedStr):
        return set()
    if isinstance(node, ast.BinOp | ast.UnaryOp):
        several = any(isinstance(n, ast.List | ast.Tuple | ast.Dict) for n in ast.walk(node))
        return _names(node) if several else set()
    if isinstance(node, ast.Attribute) and node.attr in DESCRIBING:
        return set()
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in VIEWS:
        if called(node) is None and _is_torch(node.func, local) and ast.unparse(node.func.value) not in TORCH:
            return _shared(node.func.value, own, local)
    if isinstance(node, ast.IfExp):
        return _shared(node.body, own, local) | _shared(node.orelse, own, local)
    if isinstance(node, ast.Call) and _is_fresh(node, own, local):
        return set()
    found = {node.id} if isinstance(node, ast.Name) else set()
    children = [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.expr)]
    children += [keyword.value for keyword in getattr(node, "keywords", [])]
    return found.union(*(_shared(child, own, local) for child in children))


def _is_fresh(node: ast.Call, own: OwnCalls, local: set[str]) -> bool:
    name = called(node)
    if name is not None:
        return own.is_fresh(name)
    return isinstance(node.func, ast.Attribute) and node.func.attr in FRESH and _is_torch(node.func, local)


def _is_torch(function: ast.Attribute, local: set[str]) -> bool:
    """Whether a function is torch's, or a method of a local name or of a result, called like one of a tensor."""
    if ast.unparse(function.value) in TORCH:
        return True
    is_tensor = isinstance(function.value, ast.Call) or _root(function) in local - {"self"}
    return is_tensor and hasattr(torch.Tensor, function.attr)


def _root(node: ast.expr) -> str | None:
    """The name at the start of `name.a.b`, `name[0].view(1)`."""
    while isinstance(node, ast.Attribute | ast.Subscript | ast.Call | ast.Starred):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else None


def _changed(node: ast.AST, own: OwnCalls, local: set[str]) -> set[str]:
    """Names of what one node may change by itself."""
    if isinstance(node, ast.AugAssign):
        return {_root(node.target) or ""}
    if isinstance(node, ast.Assign | ast.AnnAssign | ast.For | ast.Delete):
        targets = node.targets if isinstance(node, ast.Assign | ast.Delete) else [node.target]
        places = [n for t in targets for n in ast.walk(t) if isinstance(n, ast.Attribute | ast.Subscript)]
        return {_root(place) or "" for place in places}
    if not isinstance(node, ast.Call):
        return set()
    method = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    settings = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
    if settings.get("inplace", "False") != "False" or "out" in settings or None in settings:
        return _names(node)
    if method.endswith("_") and not method.endswith("__"):
        return _names(node.func) if _root(node.func) in local - {"self"} else _names(node)
    if _leaves_alone(node, own, local):
        return set()
    return set().union(*map(_names, [*node.args, *(keyword.value for keyword in node.keywords)]))


def _leaves_alone(node: ast.Call, own: OwnCalls, local: set[str]) -> bool:
    """Whether a call that does not say so by its name leaves what it is given alone."""
    name = called(node)
    if name is not None:
        return own.leaves_alone(name)
    if isinstance(node.func, ast.Name):
        return node.func.id in BUILTINS - local
    if not isinstance(node.func, ast.Attribute):
        return False
    flags = [argument for argument in node.args if isinstance(argument, ast.Constant) and argument.value is True]
    return _is_torch(node.func, local) and not flags  # F.relu(x, True)
