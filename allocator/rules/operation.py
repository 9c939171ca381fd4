"""Operations: what a machine can do, what each of them draws, when it can be done and how often it is tried.

A machine of many Hypothesis rules spends more time on choosing one than on all the checks: Hypothesis asks each
rule whether it can run, and draws for each whether it is switched off in this program. Here a machine has one
rule, `ManagerMachine.do`, and chooses by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from hypothesis import assume
from hypothesis import strategies as st

if TYPE_CHECKING:
    from allocator.rules.base import ManagerMachine

Method = TypeVar("Method", bound=Callable[..., None])


class Operation:
    """One method of a machine that can be drawn."""

    def __init__(
        self, name: str, when: Callable[[Any], object], strategies: dict[str, st.SearchStrategy[Any]]
    ) -> None:
        self.name = name
        self.when = when
        self.strategies = strategies


def operation(
    *, when: Callable[[Any], object] = lambda _: True, **strategies: st.SearchStrategy[Any]
) -> Callable[[Method], Method]:
    """Make a method of a machine one that is drawn, with arguments from these strategies, `when` it can be done.

    A subclass takes it out by setting its name to None.
    """

    def mark(method: Method) -> Method:
        vars(method)["operation"] = Operation(method.__name__, when, strategies)
        return method

    return mark


def operations_of(machine: type) -> dict[str, Operation]:
    """Return the operations of a class by name, those of its bases first: to these, programs shrink."""
    names = dict.fromkeys(name for each in reversed(machine.__mro__) for name in vars(each))
    found = {name: getattr(getattr(machine, name), "operation", None) for name in names}
    return {name: each for name, each in found.items() if each is not None}


class Call:
    """An operation with its arguments. It reads as one does it oneself, so that programs can be pasted."""

    def __init__(self, name: str, arguments: dict[str, Any]) -> None:
        self.name = name
        self.arguments = arguments

    def __repr__(self) -> str:
        return f"state.{self.name}({', '.join(f'{key}={value!r}' for key, value in self.arguments.items())})"


_PLACES = st.integers(0, 999)


@st.composite
def calls(draw: st.DrawFn) -> Call | None:
    """Draw what the machine does next; nothing, if there is nothing that it can do.

    What is drawn does not depend on the state, lest Hypothesis, which varies programs by drawing parts of one in
    another, should find numbers out of range and put in zeros.
    """
    machine: ManagerMachine = draw(st.runner())
    slots, place = machine.slots, draw(_PLACES)
    chosen = slots[place % len(slots)]
    if not chosen.when(machine):
        able = {each.name for each in machine.operations.values() if each.when(machine)}
        left = [each for each in slots if each.name in able]
        if not left:  # all that can be done is switched off
            left = [machine.operations[name] for name in sorted(able - machine.never)]
        if not left:
            return None
        chosen = left[place % len(left)]
    return Call(chosen.name, {key: draw(strategy) for key, strategy in chosen.strategies.items()})


@st.composite
def switched_off(draw: st.DrawFn, always: tuple[str, ...]) -> tuple[str, ...]:
    """Draw which operations a program does without, but for those that it `always` has: none, a quarter, half, most.

    That is swarm testing (Groce et al., 2012): without release, pools stay full; without append, none is written
    twice. Fewer are left out by shrinking.
    """
    assume(draw(st.integers(0, 99)))  # or each run would begin with the same program, that of all zeros
    machine: ManagerMachine = draw(st.runner())
    share = draw(st.sampled_from([0, 0, 1, 2, 3]))
    if not share:
        return ()
    names = [name for name in machine.operations if name not in always]
    return tuple(name for name in names if draw(st.integers(0, 3)) < share)
