"""Shared experts inside the communication window, in code that is read: where a function calls a shared expert beside
the routed ones, its source is changed so that the call is put off (`fluid_hf.models.put_off`) and made in their window.

The result of the call must be the same there: its arguments are names that keep their values in between, nothing
in between may change them in place (`fluid_hf.models.in_place`), and the call depends on settings only. Otherwise it
stays where it is.
"""

from __future__ import annotations

import ast
import copy
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

from fluid_hf.models.code_reading import assigned_names, is_setting, read_names
from fluid_hf.models.in_place import OwnCalls, called, may_change
from fluid_hf.models.put_off import CARRIED

__all__ = ["PUT_OFF", "RUN_EXPERTS", "TAKE", "SharedCalls", "carry", "experts_calls"]

# Names of the functions of `put_off` in the changed source.
PUT_OFF, RUN_EXPERTS, TAKE = "_fluid_put_off", "_fluid_run_experts", "_fluid_take"
# What arguments of the call may be made of, beside names.
VIEWS = ("view", "reshape", "flatten", "size", "contiguous", "dim")


@dataclass(frozen=True)
class SharedCalls:
    """The calls that a module makes, by the names of its children and methods.

    Attributes:
        experts: child that holds the routed experts; called as `self.x(hidden, index, weights)`.
        carriers: methods, and children, that call them and take a call that was put off along.
        shared: children that are shared experts.
        own: what else it calls.
    """

    experts: str | None
    carriers: frozenset[str]
    shared: frozenset[str]
    own: OwnCalls

    def rewrite(self, function: ast.FunctionDef) -> bool:
        """Put off the shared experts that a function calls; changes it, and says whether there was one."""
        return _Rewriter(self, function).rewrite(function.body)


def carry(function: ast.FunctionDef, experts: str) -> None:
    """Let a method that calls the experts take a call that was put off along."""
    function.args.kwonlyargs.append(ast.arg(CARRIED))
    function.args.kw_defaults.append(ast.Constant(None))
    for call in experts_calls(function, experts):
        _give(call, experts, CARRIED)


def experts_calls(function: ast.AST, experts: str) -> list[ast.Call]:
    """The calls `self.experts(hidden, index, weights)` in a function."""
    found = [node for node in ast.walk(function) if called(node) == experts]
    return [n for n in found if isinstance(n, ast.Call) and len(n.args) == 3 and not n.keywords and not _starred(n)]


def _starred(call: ast.Call) -> bool:
    return any(isinstance(argument, ast.Starred) for argument in call.args)


def _give(call: ast.Call, experts: str | None, run: str) -> None:
    """Change a call of the experts, or of what carries, so that it takes `run` along."""
    if called(call) == experts:
        call.args = [call.func, *call.args, ast.Name(run, ast.Load())]
        call.func = ast.Name(RUN_EXPERTS, ast.Load())
    else:
        call.keywords.append(ast.keyword(CARRIED, ast.Name(run, ast.Load())))


@dataclass
class _Found:
    """A call of a shared expert.

    Attributes:
        call, leaf: the call, and the statement that makes it.
        body: the statements that `leaf` is one of.
        tests: conditions under which it runs, from the statement of the outer body inwards; `None` where one is no
            setting.
        beside: the other statements around `leaf` under these conditions: those before, and those after it.
    """

    call: ast.Call
    leaf: ast.stmt
    body: list[ast.stmt]
    tests: list[ast.expr] = field(default_factory=list)
    before: list[ast.stmt] = field(default_factory=list)
    after: list[ast.stmt] = field(default_factory=list)


class _Rewriter:
    def __init__(self, calls: SharedCalls, function: ast.FunctionDef) -> None:
        self._calls, self._function, self._count = calls, function, 0

    def rewrite(self, body: list[ast.stmt]) -> bool:
        """Statements that run one after the other, and those inside their conditions first."""
        changed = False
        self._sink(body)
        for statement in body:
            if isinstance(statement, ast.If):
                changed |= self.rewrite(statement.body)
                changed |= self.rewrite(statement.orelse)
        done = False
        while not done:
            done = not any(self._move(body, s, found) for s in range(len(body)) for found in self._find(body[s], body))
            changed |= not done
        return changed

    def _sink(self, body: list[ast.stmt]) -> None:
        """Take a shared expert just before a setting, under which the experts run, into both of its branches."""
        for first, second in itertools.pairwise(list(body)):
            if not isinstance(second, ast.If) or not is_setting(second.test) or not _is_plain_assignment(first):
                continue
            if any(self._find(first, body)) and any(map(self._routed, second.body)):
                second.body.insert(0, first)
                second.orelse.insert(0, copy.deepcopy(first))
                body.remove(first)

    def _find(self, statement: ast.stmt, body: list[ast.stmt]) -> Iterator[_Found]:
        """Calls of shared experts in a statement, also under conditions that are settings."""
        if isinstance(statement, ast.If):
            if not is_setting(statement.test):
                return
            for branch, inverted in ((statement.body, False), (statement.orelse, True)):
                test = ast.UnaryOp(ast.Not(), statement.test) if inverted else statement.test
                for place, inner in enumerate(branch):
                    for found in self._find(inner, branch):
                        found.tests.insert(0, test)
                        found.before = branch[:place] + found.before
                        found.after = found.after + branch[place + 1 :]
                        yield found
        elif isinstance(statement, ast.Assign | ast.AnnAssign | ast.AugAssign | ast.Return):
            conditional = (ast.Lambda, ast.IfExp, ast.BoolOp, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
            if any(isinstance(node, (*conditional, ast.NamedExpr)) for node in ast.walk(statement)):
                return
            for node in ast.walk(statement):
                if isinstance(node, ast.Call) and called(node) in self._calls.shared and _is_plain(node):
                    yield _Found(node, statement, body)

    def _routed(self, statement: ast.stmt) -> list[ast.Call]:
        """The calls of the routed experts in a statement that none was given to yet; none if some are unlike others."""
        carriers = self._calls.carriers
        found = [n for n in ast.walk(statement) if isinstance(n, ast.Call) and called(n) in carriers]
        found = [n for n in found if not any(k.arg in (CARRIED, None) for k in n.keywords) and not _starred(n)]
        if self._calls.experts is not None:
            found += experts_calls(statement, self._calls.experts)
        inner = (ast.For, ast.While, ast.With, ast.Try, ast.FunctionDef, ast.Lambda, ast.comprehension, ast.Match)
        return [] if any(isinstance(node, inner) for node in ast.walk(statement)) else found

    def _move(self, body: list[ast.stmt], s: int, found: _Found) -> bool:
        last = s + (found.leaf is body[s])  # one statement may call both
        earlier = [e for e in range(last) if self._routed(body[e])]
        if earlier:
            return self._hoist(body, earlier[-1], s, found)
        later = [e for e in range(s + 1, len(body)) if self._routed(body[e])]
        return bool(later) and self._delay(body, s, later[0], found)

    def _hoist(self, body: list[ast.stmt], e: int, s: int, found: _Found) -> bool:
        """The experts run in statement `e`, the shared expert in the later statement `s`."""
        between = [*body[e:s], *found.before]
        names = read_names([*found.call.args, *found.call.keywords]) - {"self"}
        if names & assigned_names(between) or _sets_what_is_read(between, found.call):
            return False
        if self._may_change([*between, found.leaf], names):
            return False
        run, put_off = self._put_off(found.call)
        if found.tests:
            put_off.value = ast.IfExp(_all(found.tests), put_off.value, ast.Constant(None))
        for call in self._routed(body[e]):
            _give(call, self._calls.experts, run)
        body.insert(e, put_off)
        _become_take(found.call, run)
        return True

    def _delay(self, body: list[ast.stmt], s: int, e: int, found: _Found) -> bool:
        """The shared expert runs in statement `s`, the experts in the later statement `e`: what is made of its result
        is made after them."""
        leaf = found.leaf
        if not _is_plain_assignment(leaf):
            return False
        moved, stay = [leaf], []
        targets = assigned_names([leaf])
        for statement in [*found.after, *body[s + 1 : e + 1]]:
            if not targets & (read_names([statement]) | assigned_names([statement])):
                stay.append(statement)
            elif found.tests or not _is_plain_assignment(statement) or self._routed(statement):
                return False
            else:
                moved.append(statement)
                targets |= assigned_names([statement])
        names = (read_names(moved) | targets) - {"self"}
        inside = {id(node) for node in ast.walk(found.call)}
        beside = {n.id for n in ast.walk(leaf) if isinstance(n, ast.Name) and id(n) not in inside}
        later = (beside | read_names(moved[1:])) - targets
        if later & assigned_names(stay) or any(_sets_what_is_read(stay, statement) for statement in moved):
            return False
        if self._may_change(stay, names) or self._may_change(moved, names | (read_names(stay) - {"self"})):
            return False
        run, put_off = self._put_off(found.call)
        for call in self._routed(body[e]):
            _give(call, self._calls.experts, run)
        _become_take(found.call, run)
        if not found.tests:
            body[s : e + 1] = [put_off, *stay, *moved]
            return True
        found.body[found.body.index(leaf)] = put_off
        after: ast.stmt = leaf
        for test in reversed(found.tests):
            after = ast.If(copy.deepcopy(test), [after], [])
        body.insert(e + 1, after)
        body.insert(s, ast.Assign([ast.Name(run, ast.Store())], ast.Constant(None)))
        return True

    def _may_change(self, statements: list[ast.stmt], names: set[str]) -> bool:
        return may_change(statements, names, self._function, self._calls.own)

    def _put_off(self, call: ast.Call) -> tuple[str, ast.Assign]:
        run, self._count = f"_fluid_run{self._count}", self._count + 1
        made = ast.Call(ast.Name(PUT_OFF, ast.Load()), [call.func, *call.args], call.keywords)
        return run, ast.Assign([ast.Name(run, ast.Store())], copy.deepcopy(made))


def _is_plain_assignment(statement: ast.stmt) -> bool:
    """Whether all that a statement does is to give one name a value."""
    return isinstance(statement, ast.Assign) and [type(target) for target in statement.targets] == [ast.Name]


def _sets_what_is_read(statements: list[ast.stmt], read: ast.AST) -> bool:
    """Whether statements set an attribute of the module that is read."""
    nodes = [node for statement in statements for node in ast.walk(statement) if isinstance(node, ast.Attribute)]
    stored = {ast.unparse(node) for node in nodes if not isinstance(node.ctx, ast.Load)}
    return any(ast.unparse(node) in stored for node in ast.walk(read) if isinstance(node, ast.Attribute))


def _all(tests: list[ast.expr]) -> ast.expr:
    copied = copy.deepcopy(tests)
    return copied[0] if len(copied) == 1 else ast.BoolOp(ast.And(), copied)


def _become_take(call: ast.Call, run: str) -> None:
    call.func, call.args, call.keywords = ast.Name(TAKE, ast.Load()), [ast.Name(run, ast.Load())], []


def _is_plain(call: ast.Call) -> bool:
    """Whether the arguments are names and views of them: the same wherever they are read while the names stay."""
    for argument in [*call.args, *(keyword.value for keyword in call.keywords)]:
        for node in ast.walk(argument):
            if isinstance(node, ast.Call):
                if not isinstance(node.func, ast.Attribute) or node.func.attr not in VIEWS or node.keywords:
                    return False
            elif not isinstance(
                node,
                ast.Name | ast.Attribute | ast.Constant | ast.UnaryOp | ast.unaryop | ast.Starred | ast.expr_context,
            ):
                return False
    return all(keyword.arg is not None for keyword in call.keywords)
