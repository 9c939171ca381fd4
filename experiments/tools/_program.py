"""Programs that a fuzz machine failed at: as a test to paste, explained, and as short as they can be made."""

from __future__ import annotations

import ast
import re
import traceback
from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from time import perf_counter
from types import TracebackType
from typing import Any

PASTED = {
    "allocator.retention": ("Retention", "RetentionConfig", "TokenRange"),
    "allocator.shadow": ("PromptSpec",),
}
"""What the arguments of a program are made of, by module."""

_PATIENCE_S = 60.0
_SET_UP = 2
"""Statements that make the machine and start it."""
_MOST_CHARACTERS = 80
Failure = tuple[type[BaseException], str, int]
"""What makes one failure the same as another: its kind, and the file and line it was raised at."""


def as_test(error: BaseException, machine: str, policy: str | None) -> str:
    """Return a failure's program as a test, followed by what went wrong."""
    errors = list(error.exceptions) if isinstance(error, ExceptionGroup) else [error]
    name = machine.rpartition(":")[2]
    imports = [f"from {machine.rpartition(':')[0] or 'allocator.fuzz'} import {name}"]
    body: list[str] = []
    if policy is not None:
        chosen = repr(policy)
        if ":" in policy:
            module, _, chosen = policy.partition(":")
            imports.append(f"from {module} import {chosen}")
        body += [f"class Machine({name}):", f"    policies = ({chosen},)", ""]
    body += ["def test_found_by_fuzzing() -> None:"]
    notes = getattr(errors[0], "__notes__", [])
    program = [re.sub(r"^state\.do\(call=(state\..*)\)$", r"\1", line) for line in statements(notes)]
    for module, names in PASTED.items():
        used = [each for each in names if any(f"{each}(" in line for line in program)]
        imports += [f"from {module} import {', '.join(used)}"] if used else []
    made = name if policy is None else "Machine"
    body += [f"    {line.replace(f'state = {name}()', f'state = {made}()')}" for line in program]
    what = [f"# {type(each).__name__}: {explained(each)}" for each in errors]
    return "\n".join([*sorted(imports), "", *body, *what])


def statements(notes: Iterable[str]) -> list[str]:
    """Return the program's statements, a line each; Hypothesis breaks what is long."""
    found: list[str] = []
    unfinished = False
    for line in (line for note in notes for line in note.splitlines()):
        if unfinished:
            found[-1] += " " + line.strip()
        elif line.startswith(("state", "class", "    ")):
            found.append(line)
        else:
            continue
        unfinished = any(found[-1].count(left) > found[-1].count(right) for left, right in ("()", "[]", "{}"))
    return found


# -------------------------------------------------------- what went wrong


def explained(error: BaseException) -> str:
    """Return what an error says, in a line; of an assertion without words, where it stands, and what it compared."""
    said = str(error).splitlines()
    if said:
        return said[0]
    trace = error.__traceback__
    if trace is None:
        return "?"
    while trace.tb_next is not None:
        trace = trace.tb_next
    (place,) = traceback.extract_tb(trace, limit=1)
    line = place.line or "?"
    return f"{Path(place.filename).name}:{place.lineno}: {line}{_compared(line, trace)}"


def _compared(line: str, trace: TracebackType) -> str:
    """Return the values of the two sides of an assertion, where it is a comparison that fits a line."""
    try:
        (asserted,) = ast.parse(line).body
    except (SyntaxError, ValueError):
        return ""
    if not (isinstance(asserted, ast.Assert) and isinstance(asserted.test, ast.Compare)):
        return ""
    values = []
    for side in (asserted.test.left, *asserted.test.comparators):
        try:
            value = eval(ast.unparse(side), trace.tb_frame.f_globals, trace.tb_frame.f_locals)
        except Exception:  # it may depend on what has changed since
            return ""
        values.append(repr(value)[:_MOST_CHARACTERS])
    return f" ({', '.join(values)})"


# -------------------------------------------------------- shorter


def shorter(test: str) -> str:
    """Return a test that fails at the same place, without steps that can be left out and with small numbers.

    Runs of steps are left out, long ones first, then single steps, and one number after the other is made smaller, as
    long as that helps, for a minute at most. Steps that cannot be done in the state they then meet are left out as
    well. Hypothesis would draw whole programs instead, which takes minutes, and gives up sooner.
    """
    tree = ast.parse(test)
    (function,) = (node for node in tree.body if isinstance(node, ast.FunctionDef))
    setting: dict[str, Any] = {}
    exec(
        compile(ast.Module([node for node in tree.body if node is not function], []), "<setting>", "exec"),
        setting,
    )
    failure, program = _failure(list(function.body), setting)
    if failure is None:
        return test
    until = perf_counter() + _PATIENCE_S

    def settles(smaller: list[ast.stmt]) -> bool:
        nonlocal program
        found, done = _failure(smaller, setting)
        if found == failure:
            program = done
        return found == failure

    before = None
    while program != before and perf_counter() < until:  # with smaller numbers, more steps may not be needed
        before = program
        size = len(program) // 2
        while size and perf_counter() < until:
            end, most = len(program), len(program)
            while end - size >= _SET_UP and perf_counter() < until:
                settles(program[: end - size] + program[end:])
                end = min(end - size, len(program))
            if size > 1 or len(program) == most:
                size //= 2
        at = 0
        while at < len(program) and perf_counter() < until:
            if not any(
                settles([*program[:at], less, *program[at + 1 :]]) for less in _with_less(program[at])
            ):
                at += 1
    ending = [line for line in test.splitlines() if line.startswith("# ")]
    kept = [f"    {ast.unparse(statement)}" for statement in program]
    return "\n".join([*test.splitlines()[: function.lineno], *kept, *ending])


def _with_less(statement: ast.stmt) -> Iterator[ast.stmt]:
    """Yield the statement with one of its numbers smaller."""
    numbers = [
        node
        for node in ast.walk(statement)
        if isinstance(node, ast.Constant) and type(node.value) is int and node.value > 0
    ]
    for place, number in enumerate(numbers):
        assert isinstance(number.value, int)
        for less in sorted({0, number.value // 2, number.value - 1}):
            copy = deepcopy(statement)
            found = [
                n
                for n in ast.walk(copy)
                if isinstance(n, ast.Constant) and type(n.value) is int and n.value > 0
            ]
            found[place].value = less
            yield copy


def _failure(program: list[ast.stmt], setting: Mapping[str, Any]) -> tuple[Failure | None, list[ast.stmt]]:
    """Run a program; return how it fails, and those of its statements that could be done until then."""
    names = dict(setting)
    done: list[ast.stmt] = []
    for statement in program:
        if not _can_be_done(statement, names):
            continue
        done.append(statement)
        try:
            exec(compile(ast.Module([statement], []), "<program>", "exec"), names)
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            return (type(error), place.filename, place.lineno or 0), done
    return None, done


def _can_be_done(statement: ast.stmt, names: Mapping[str, Any]) -> bool:
    """Return whether a statement is no operation of the machine, or one that can be done now."""
    call = statement.value if isinstance(statement, ast.Expr) else None
    if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute)):
        return True
    state = names.get("state")
    operation = getattr(state, "operations", {}).get(call.func.attr)
    return operation is None or bool(operation.when(state))
