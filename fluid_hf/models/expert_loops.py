"""Loops over experts in a block's source, replaced by one call of all: `self.experts(hidden, index, weights)`.

A loop qualifies by what it computes, the weighted sum over each token's experts, in one of these ways:

    Mixtral's    for each expert, the tokens that a one-hot mask (or `index == e`) gives it: weighed, `index_add_`
    DeepSeek's   each token repeated K times, `y[flat_index == e] = expert(...)`, weighed and summed afterwards
    moe_infer    DeepSeek's method for evaluation (`fluid_hf.models.moe_infer`)

`_e` stands for the expert's number, `_expert` for the expert, `_where0` and `_where1` for the places of its tokens.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from typing import Any

from torch import nn

from fluid_hf.models.code_reading import assigned_names, follow, read_names, same_words
from fluid_hf.models.moe_infer import call_of_sorted_rows

__all__ = ["UnknownLoopError", "replace_loops"]

N = r"([A-Za-z_]\w*)"
WEIGHT = rf"{N}\[_where([01]), _where([01]), None\]"
WEIGHED = (rf"_expert\({N}\[_where([01])\]\) \* {WEIGHT}", rf"{WEIGHT} \* _expert\({N}\[_where([01])\]\)")
ADDED = (rf"{N}\.index_add_\(0, _where([01]), (.+)\)", rf"{N}\[_where([01])\] \+= (.+)")
ONE_HOT = rf"one_hot\({N}, (?:num_classes=)?[^)]+\)?\)\.permute\(\(?(2, 1, 0|2, 0, 1)\)?\)\[_e\]"
ASSIGNED = rf"{N}\[{N} == _e\] = _expert\({N}\[{N} == _e\]\)"
REPEATED = rf"(?:torch\.repeat_interleave\({N}, |{N}\.repeat_interleave\().+, (?:dim=)?0\)"
# Conditions that hold for experts without tokens, and for those with.
ROWS = r"(?:_where[01]|\(?\w+ == _e\)?)"
COUNT = rf"(?:{ROWS}(?:\.shape\[0\]|\.numel\(\)|\.size\(0\))|len\({ROWS}\))"
EMPTY = rf"{COUNT} == 0|not {ROWS}\.any\(\)"
FILLED = rf"{COUNT} (?:> 0|!= 0)|{ROWS}\.any\(\)"
# Functions without effects: what they compute is left out where nobody reads it any more.
PURE = {"one_hot", "permute", "greater", "gt", "sum", "nonzero", "view", "reshape", "flatten"}


class UnknownLoopError(ValueError):
    """The experts are used in a way that is not known; its text is the code."""


def replace_loops(function: ast.FunctionDef, block: nn.Module, attribute: str) -> ast.FunctionDef:
    """A method of a block with one call of all experts for each of its loops over them.

    Args:
        function: from `function_source`; changed.
        block: the module, for its settings.
        attribute: name of the list of experts in it.

    Raises:
        UnknownLoopError: the method uses the list in another way.
    """
    return _Rewriter(block, attribute).rewrite(function)


class _Rewriter:
    def __init__(self, block: nn.Module, attribute: str) -> None:
        self._block, self._experts = block, f"self.{attribute}"
        self._num_experts = len(getattr(block, attribute))
        self._function: ast.AST = ast.Module([], [])

    def rewrite(self, function: ast.FunctionDef) -> ast.FunctionDef:
        call = call_of_sorted_rows(function, self._block, self._experts)
        if call is not None:
            function.body = ast.parse(call).body
            return function
        self._function = function
        function.body = self._rewrite_body(function.body, [])
        made = ast.parse(ast.unparse(function).replace(f"len({self._experts})", f"{self._experts}.num_experts"))
        (function,) = made.body  # type: ignore[assignment]
        parents = {id(child): node for node in ast.walk(function) for child in ast.iter_child_nodes(node)}
        for node in ast.walk(function):
            if ast.unparse(node) == self._experts and isinstance(node, ast.Attribute):
                parent = parents[id(node)]
                called = isinstance(parent, ast.Call) and parent.func is node
                if not called and not (isinstance(parent, ast.Attribute) and parent.attr == "num_experts"):
                    raise UnknownLoopError(ast.unparse(parent).partition("\n")[0])
        _drop_unread(function)
        return function

    def _rewrite_body(self, body: list[ast.stmt], before: list[ast.stmt]) -> list[ast.stmt]:
        """Statements with the loops among them replaced; `before` are those that run before them."""
        out: list[ast.stmt] = []
        rest = list(body)
        while rest:
            statement = rest.pop(0)
            if isinstance(statement, ast.For) and self._experts in ast.unparse(statement):
                self._check_names(statement)
                made = self._sum_of_experts(statement, before, out) or self._pairs(statement, before, out, rest)
                if made is None:
                    raise UnknownLoopError(ast.unparse(statement).partition("\n")[0])
                out += ast.parse(made).body
                continue
            for field in ("body", "orelse"):
                inner = getattr(statement, field, None)
                if inner and not isinstance(statement, ast.For | ast.While):
                    setattr(statement, field, self._rewrite_body(inner, before + out))
            out.append(statement)
        return out

    def _check_names(self, loop: ast.For) -> None:
        """What a loop assigns must not be read after it, but for its result, which is changed in place."""
        end = loop.end_lineno or 0
        later = [n for n in ast.walk(self._function) if isinstance(n, ast.Name) and n.lineno > end]
        for name in assigned_names([loop]):
            first = next((n for n in sorted(later, key=_position) if n.id == name), None)
            if first is not None and isinstance(first.ctx, ast.Load) and not self._stored_on(first):
                raise UnknownLoopError(f"{name}, read after the loop in line {first.lineno}")

    def _stored_on(self, read: ast.Name) -> bool:
        """Whether the name is assigned by the same `for` that reads it further on."""
        loops = [n for n in ast.walk(self._function) if isinstance(n, ast.For) and n.lineno == read.lineno]
        return any(read.id in assigned_names([n.target]) for n in loops)

    def _sum_of_experts(self, loop: ast.For, before: list[ast.stmt], out: list[ast.stmt]) -> str | None:
        """Mixtral's way."""
        read = self._read_loop(loop, before + out)
        if read is None:
            return None
        effect, mask = read
        found = next((m for m in (re.fullmatch(p, effect) for p in ADDED) if m), None)
        if found is None or mask is None:
            return None
        total, token, value = found.groups()
        weighed = re.fullmatch(WEIGHED[0], value) or re.fullmatch(WEIGHED[1], value)
        if weighed is None:
            return None
        groups = weighed.groups()
        hidden, at, weights, row, column = groups if weighed.re.pattern == WEIGHED[0] else groups[3:] + groups[:3]
        if not at == row == token != column:
            return None
        index = self._index_of(mask, token, before + out)
        if index is None or {hidden, weights, index, total} & assigned_names([loop]):
            return None
        call = f"{self._experts}({hidden}, {index}, {weights})"
        place = _last_assignment(total, out)
        if place is not None and re.match(r"torch\.zeros(_like)?\(", ast.unparse(out[place].value)):  # type: ignore[attr-defined]
            if total not in read_names(out[place + 1 :]):
                del out[place]
                return f"{total} = {call}"
        return f"{total} = {total} + {call}"

    def _pairs(self, loop: ast.For, before: list[ast.stmt], out: list[ast.stmt], rest: list[ast.stmt]) -> str | None:
        """DeepSeek's way; takes the statements before and after the loop along."""
        read = self._read_loop(loop, before + out)
        found = re.fullmatch(ASSIGNED, read[0]) if read is not None else None
        if found is None or not rest:
            return None
        result, flat, repeated, same = found.groups()
        place, made = _last_assignment(repeated, out), _last_assignment(result, out)
        if flat != same or place is None or made is None:
            return None
        source = re.fullmatch(REPEATED, ast.unparse(out[place].value))  # type: ignore[attr-defined]
        empty = re.match(r"torch\.(empty|zeros)_like\(", ast.unparse(out[made].value))  # type: ignore[attr-defined]
        index = self._resolve(flat, before + out)
        indexed = re.fullmatch(rf"{N}\.(?:view\(-1\)|reshape\(-1\)|flatten\(\))", index or "")
        summed = re.fullmatch(
            rf"{N} = \({result}\.view\(\*{N}\.shape, -1\) \* \2\.unsqueeze\((?:dim=)?-1\)\)\.sum\(dim=1\)",
            ast.unparse(rest[0]),
        )
        if source is None or empty is None or indexed is None or summed is None:
            return None
        hidden = source[1] or source[2]
        used = [n for s in (*out[place + 1 :], *rest[1:]) for n in _values_of(repeated, s) if s is not out[made]]
        if used or hidden != repeated and hidden in assigned_names(out[place + 1 :]):
            return None
        rest.pop(0)
        for position in sorted((place, made), reverse=True):
            del out[position]
        return f"{summed[1]} = {self._experts}({hidden}, {indexed[1]}.view({summed[2]}.shape), {summed[2]})"

    def _read_loop(self, loop: ast.For, before: list[ast.stmt]) -> tuple[str, str | None] | None:
        """The one effect that each turn of a loop has, and the mask of the expert's tokens."""
        iterated = ast.unparse(loop.iter)
        names = [ast.unparse(n) for n in (loop.target.elts if isinstance(loop.target, ast.Tuple) else [loop.target])]
        known: dict[str, ast.expr] = {names[0]: ast.Name("_e", ast.Load())}
        masks: list[str] = []
        if iterated == f"enumerate({self._experts})" and len(names) == 2:
            known[names[1]] = ast.Name("_expert", ast.Load())
        elif len(names) != 1 or loop.orelse:
            return None

        def places(text: str) -> list[str] | None:
            found = re.fullmatch(r"torch\.where\((.+)\)", self._clean(text))
            if found is None:
                return None
            masks.append(found[1])
            return ["_where0", "_where1"]

        effects = self._effects(loop.body, known, places)
        if effects is None or len(effects) != 1 or len(masks) > 1:
            return None
        mask = masks[0] if masks else None
        if len(names) == 1 and not self._visits_all(loop.iter, mask, before):
            return None
        return effects[0], mask

    def _visits_all(self, iterated: ast.expr, mask: str | None, before: list[ast.stmt]) -> bool:
        """Whether a loop visits every expert that has tokens."""
        text = ast.unparse(iterated)
        counted = re.fullmatch(r"range\((?:0, )?(.+)\)", text)
        if counted is not None:
            if counted[1] == f"len({self._experts})":
                return True
            value: Any = self._block
            path = (self._resolve(counted[1], before) or counted[1]).split(".")
            for name in path[1:] if path[0] == "self" else ["missing"]:
                value = getattr(value, name, None)
            return bool(value == self._num_experts)
        name = (mask or "").removesuffix("[_e]")
        text = self._resolve(text, before) or text
        hit = rf"(?:torch\.(?:greater|gt)\({name}\.sum\(dim=\(-1, -2\)\), 0\)|\({name}\.sum\(dim=\(-1, -2\)\) > 0\))"
        return bool(name) and re.fullmatch(rf"{hit}\.nonzero\((?:as_tuple=False)?\)", text) is not None

    def _effects(self, body: list[ast.stmt], known: dict[str, ast.expr], places: Any) -> list[str] | None:
        effects: list[str] = []
        for statement in body:
            if isinstance(statement, ast.If) and not statement.orelse:
                test = self._clean(same_words(statement.test, known))
                if (
                    re.fullmatch(EMPTY, test)
                    and len(statement.body) == 1
                    and isinstance(statement.body[0], ast.Continue)
                ):
                    continue
                inner = self._effects(statement.body, known, places) if re.fullmatch(FILLED, test) else None
                if inner is None:
                    return None
                effects += inner
            elif not follow(statement, known, places):
                text = self._effect(statement, known)
                if text is None:
                    return None
                effects.append(self._clean(text))
        return effects

    @staticmethod
    def _effect(statement: ast.stmt, known: dict[str, ast.expr]) -> str | None:
        if isinstance(statement, ast.Expr):
            return same_words(statement.value, known)
        if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
            return f"{same_words(statement.targets[0], known)} = {same_words(statement.value, known)}"
        if isinstance(statement, ast.AugAssign) and isinstance(statement.op, ast.Add):
            return f"{same_words(statement.target, known)} += {same_words(statement.value, known)}"
        return None

    def _clean(self, text: str) -> str:
        """Other wordings of the expert's number and of the expert."""
        text = re.sub(r"int\(_e\)|_e\[0\]|_e\.item\(\)|int\(_e\.item\(\)\)", "_e", text)
        return text.replace(f"{self._experts}[_e]", "_expert").replace("[_e].squeeze(0)", "[_e]")

    def _index_of(self, mask: str, token: str, before: list[ast.stmt]) -> str | None:
        """Name of the experts' numbers [T, K] from which a mask was made."""
        equal = re.fullmatch(rf"{N} == _e", mask)
        if equal is not None:
            return equal[1] if token == "0" else None
        found = None
        for _ in range(3):
            found = re.fullmatch(ONE_HOT, mask)
            name = re.match(N, mask)
            if found is not None or name is None:
                break
            place = _last_assignment(name[1], before)
            if place is None:
                return None
            made = same_words(before[place].value)  # type: ignore[attr-defined]
            mask = made + mask.removeprefix(name[1])
            changed, before = assigned_names(before[place + 1 :]), before[:place]
            if re.match(rf"one_hot\({N}", mask) and re.match(rf"one_hot\({N}", mask)[1] in changed:  # type: ignore[index]
                return None
        if found is None or token != {"2, 1, 0": "1", "2, 0, 1": "0"}[found[2]]:
            return None
        return found[1]

    @staticmethod
    def _resolve(name: str, before: list[ast.stmt]) -> str | None:
        """Text of what a name was assigned last."""
        place = _last_assignment(name, before)
        return None if place is None else same_words(before[place].value)  # type: ignore[attr-defined]


def _position(node: ast.Name) -> tuple[int, bool, int]:
    """Order in which names of straight code are used: within a line what is read comes before what is assigned."""
    return node.lineno, isinstance(node.ctx, ast.Store), node.col_offset


def _last_assignment(name: str, statements: list[ast.stmt]) -> int | None:
    """Place of the statement `name = ...` that gave a name its value; `None` if it may be another."""
    for place in reversed(range(len(statements))):
        statement = statements[place]
        if name in assigned_names([statement]):
            plain = isinstance(statement, ast.Assign) and [ast.unparse(t) for t in statement.targets] == [name]
            return place if plain else None
    return None


def _values_of(name: str, statement: ast.stmt) -> list[ast.Name]:
    """Where a name is read, but for its type and place."""
    parents = {id(child): node for node in ast.walk(statement) for child in ast.iter_child_nodes(node)}
    found = [n for n in ast.walk(statement) if isinstance(n, ast.Name) and n.id == name and isinstance(n.ctx, ast.Load)]
    kept = [parents.get(id(n)) for n in found]
    return [
        n
        for n, p in zip(found, kept, strict=True)
        if not (isinstance(p, ast.Attribute) and p.attr in ("dtype", "device"))
    ]


def _drop_unread(function: ast.FunctionDef) -> None:
    """Leave out what was computed for the loop only."""
    while True:
        assignments: dict[str, list[ast.AST]] = {}
        for node in ast.walk(function):
            if isinstance(node, ast.Assign | ast.AugAssign | ast.For):
                for name in assigned_names([node]) if not isinstance(node, ast.For) else assigned_names([node.target]):
                    assignments.setdefault(name, []).append(node)
        reads = _count_reads(function)
        dropped = [
            node
            for name, nodes in assignments.items()
            if all(_is_pure(node) for node in nodes)
            and sum(_count_reads(n).get(name, 0) for n in nodes) == reads.get(name, 0)
            for node in nodes
        ]
        if not dropped:
            return
        for node in ast.walk(function):
            for field in ("body", "orelse"):
                inner = getattr(node, field, None)
                if isinstance(inner, list):
                    kept = [statement for statement in inner if statement not in dropped]
                    setattr(node, field, kept or ([ast.Pass()] if field == "body" else []))


def _count_reads(node: ast.AST) -> Counter[str]:
    return Counter(n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load))


def _is_pure(statement: ast.AST) -> bool:
    """Whether all that a statement does is to give one name the result of functions without effects."""
    if not isinstance(statement, ast.Assign) or not all(isinstance(target, ast.Name) for target in statement.targets):
        return False
    calls = [node.func for node in ast.walk(statement.value) if isinstance(node, ast.Call)]
    return bool(calls) and all(isinstance(call, ast.Attribute) and call.attr in PURE for call in calls)
