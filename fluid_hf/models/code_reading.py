"""Reads what a method computes from its source: local names replaced by what they stand for, rewordings made alike.

Only straight code is followed. What cannot be followed is left as it stands, so that it matches nothing.
"""

from __future__ import annotations

import ast
import copy
import inspect
import textwrap
from collections.abc import Callable, Iterable
from typing import Any

__all__ = [
    "Follow",
    "assigned_names",
    "choose_branches",
    "follow",
    "function_source",
    "is_setting",
    "read_names",
    "same_words",
]

NO_GRAD = ("torch.no_grad()", "torch.inference_mode()")
# A decorator of transformers that writes the docstring and returns the function itself.
DOCUMENTS = "auto_docstring"
# Calls that change the type or the placement in memory, not the values; those of a type take its name.
CASTS = ("to", "type", "type_as")


def function_source(method: Any) -> ast.FunctionDef | None:
    """A method's definition, without docstring and annotations; `None` if it is not what its source says.

    That is: there is no source, it closes over variables, or a decorator other than `torch.no_grad()` changed it.
    """
    plain = inspect.unwrap(method)
    if not inspect.isfunction(plain) or plain.__closure__:
        return None
    try:
        node = ast.parse(textwrap.dedent(inspect.getsource(plain))).body[0]
    except (OSError, TypeError, SyntaxError):
        return None
    if not isinstance(node, ast.FunctionDef):
        return None
    node.decorator_list = [d for d in node.decorator_list if not ast.unparse(d).startswith(DOCUMENTS)]
    if any(ast.unparse(d) not in NO_GRAD for d in node.decorator_list):
        return None
    if (plain is not method) != bool(node.decorator_list):
        return None
    first = node.body[0]
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
        del node.body[0]
    node.returns = None
    extras = [extra for extra in (node.args.vararg, node.args.kwarg) if extra is not None]
    for argument in [*node.args.args, *node.args.kwonlyargs, *node.args.posonlyargs, *extras]:
        argument.annotation = None
    return node


def choose_branches(body: list[ast.stmt], owner: Any) -> list[ast.stmt]:
    """The statements without those that settings of the module rule out (`if self.config.pretraining_tp > 1:`)."""
    chosen: list[ast.stmt] = []
    for statement in body:
        if isinstance(statement, ast.If) and is_setting(statement.test):
            try:
                test = eval(ast.unparse(statement.test), {"__builtins__": {}}, {"self": owner})
            except AttributeError:
                chosen.append(statement)
                continue
            chosen += choose_branches(statement.body if test else statement.orelse, owner)
        else:
            chosen.append(statement)
    return chosen


def is_setting(test: ast.expr) -> bool:
    """Whether a condition reads nothing but attributes of the module and constants, and not its mode."""
    allowed = (ast.Attribute, ast.Name, ast.Constant, ast.Compare, ast.BoolOp, ast.UnaryOp, ast.cmpop, ast.boolop)
    nodes = list(ast.walk(test))
    if not all(isinstance(node, (*allowed, ast.unaryop, ast.expr_context)) for node in nodes):
        return False
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    return names == {"self"} and not any(isinstance(n, ast.Attribute) and n.attr == "training" for n in nodes)


class Follow(ast.NodeTransformer):
    """Replaces names by the expressions that they stand for, then rewords.

    Args:
        known: expressions by name.
    """

    def __init__(self, known: dict[str, ast.expr]) -> None:
        self._known = known

    def visit_Name(self, node: ast.Name) -> ast.expr:  # noqa: N802 - named by ast
        if isinstance(node.ctx, ast.Load) and node.id in self._known:
            return copy.deepcopy(self._known[node.id])
        return node

    def visit_Call(self, node: ast.Call) -> ast.expr:  # noqa: N802
        node = self._visited(node)
        called = node.func
        if not isinstance(called, ast.Attribute):
            return node
        inner, name = called.value, called.attr
        arguments = ", ".join(map(ast.unparse, [*node.args, *(keyword.value for keyword in node.keywords)]))
        if name in CASTS and (arguments.endswith((".dtype", ".device")) or name == "type_as"):
            return inner
        if name in ("tolist", "contiguous") and not arguments:
            return inner
        if name == "squeeze" and arguments == "0" and ast.unparse(inner).endswith("[_e]"):
            return inner
        if name in ("reshape", "view") and isinstance(inner, ast.Subscript) and arguments.startswith("-1, "):
            return inner
        if name == "unsqueeze" and isinstance(inner, ast.Subscript) and isinstance(inner.slice, ast.Tuple):
            if arguments in ("-1", "1"):
                return _parse(f"{ast.unparse(inner.value)}[{_inside(inner.slice)}, None]")
        if name == "one_hot":
            node.func = ast.Name("one_hot", ast.Load())
        if name == "nonzero" and arguments == "True" and node.keywords:  # as_tuple
            return _parse(f"torch.where({ast.unparse(inner)})")
        return node

    def visit_Subscript(self, node: ast.Subscript) -> ast.expr:  # noqa: N802
        node = self._visited(node)
        parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else []
        if len(parts) == 2 and ast.unparse(parts[0]) == "None":  # rows of a tensor, with a dimension for nothing
            node.slice = parts[1]
        return node

    def _visited(self, node: Any) -> Any:
        return self.generic_visit(node)


def _inside(node: ast.Tuple) -> str:
    return ", ".join(map(ast.unparse, node.elts))


def _parse(text: str) -> ast.expr:
    return ast.parse(text, mode="eval").body


def same_words(node: ast.expr, known: dict[str, ast.expr] | None = None) -> str:
    """An expression's text, reworded."""
    return ast.unparse(Follow(known or {}).visit(copy.deepcopy(node)))


def follow(
    statement: ast.stmt, known: dict[str, ast.expr], special: Callable[[str], list[str] | None] = lambda _: None
) -> bool:
    """Take an assignment to local names into `known`; whether it was one.

    Args:
        statement: the statement.
        known: expressions by name, changed in place.
        special: for an assignment to several names, what each stands for, from the expression's text.
    """
    if not isinstance(statement, ast.Assign) or len(statement.targets) != 1:
        return False
    target = statement.targets[0]
    if isinstance(target, ast.Name):
        known[target.id] = Follow(known).visit(copy.deepcopy(statement.value))
        return True
    if isinstance(target, ast.Tuple) and all(isinstance(name, ast.Name) for name in target.elts):
        text = same_words(statement.value, known)
        parts = special(text) or [f"{text}[{index}]" for index in range(len(target.elts))]
        known.update(zip([ast.unparse(name) for name in target.elts], map(_parse, parts), strict=True))
        return True
    return False


def read_names(nodes: Iterable[ast.AST]) -> set[str]:
    """Names that are read."""
    return {n.id for node in nodes for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}


def assigned_names(nodes: Iterable[ast.AST]) -> set[str]:
    """Names that are assigned, also by `for` and `+=`."""
    return {n.id for node in nodes for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
