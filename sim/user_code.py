"""Classes that users name as package.module:Class: what is wrong with one is told in a line that says whose it was."""

from __future__ import annotations

import inspect
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import TracebackType
from typing import Any

_CALL_FAILED = re.compile(r"([\w.<>]+)\.(\w+)\(\) (?:takes|missing|got) ")
"""How Python begins to say that a method does not take the arguments with which it was called."""


class UserCodeError(ValueError):
    """A method of a user's class raised something. Says which in one line; `trace` has the lines that led there."""

    def __init__(self, message: str, trace: str) -> None:
        super().__init__(message, trace)
        self.trace = trace

    def __str__(self) -> str:
        return str(self.args[0])


@contextmanager
def blaming(**named: str) -> Iterator[None]:
    """Raise UserCodeError for what a user's class raises within the context; what others raise passes through.

    `named` has the option by which each class was chosen, and its name; names of the project's own are ignored.
    """
    try:
        yield
    except UserCodeError:
        raise
    except (Exception, SystemExit) as error:
        for option, name in named.items():
            if ":" in name and (found := _fault(_class_of(name), error)) is not None:
                method, trace, raised, reason = found
                raise UserCodeError(_told(option, name, method, raised, reason), trace) from error
        raise


def attribute(option: str, name: str, made: object, wanted: str, default: object) -> Any:
    """Return an attribute of a user's object. Raises UserCodeError for what a property of the user's raises."""
    try:
        return getattr(made, wanted, default)
    except Exception as error:
        raise failed_in(wanted, option, name, error) from error


def failed_in(method: str, option: str, name: str, error: BaseException) -> UserCodeError:
    """Return the UserCodeError for what a method of a user's class raised, as caught where it was called."""
    way = error.__traceback__
    within = None if way is None else way.tb_next  # without the frame of the call
    trace = "".join(traceback.format_exception(type(error), error, within, chain=False))
    return UserCodeError(_told(option, name, method, type(error).__name__, str(error)), trace)


def _told(option: str, name: str, method: str, raised: str, reason: str) -> str:
    return f"{option} ({name}) failed in {method}: " + ": ".join(filter(None, [raised, reason]))


def require_methods(option: str, name: str, made: object, contract: type, called: str | None = None) -> None:
    """Raise ValueError unless each method that a user's object has of a contract can be called as it says there.

    `called` is what users know the contract as; the default is where it is defined.
    """
    for method, wanted in inspect.getmembers(contract, inspect.isfunction):
        if method.startswith("_"):
            continue
        own = attribute(option, name, made, method, wanted)
        if own is wanted or getattr(own, "__func__", None) is wanted:
            continue
        if not callable(own):
            raise ValueError(f"{option} ({name}): {method} ({own!r}) must be a method")
        _, *parameters = inspect.signature(wanted).parameters
        try:
            inspect.signature(own).bind(*parameters)
        except TypeError:
            raise ValueError(
                f"{option} ({name}): {method} must take ({', '.join(parameters)}), "
                f"as {called or f'{contract.__module__}.{contract.__name__}'}.{method} does"
            ) from None
        except ValueError:  # written in C, without a signature to look at
            continue


def _class_of(name: str) -> type:
    module, _, kind = name.partition(":")
    found: type = getattr(import_module(module), kind)
    return found


def _fault(kind: type, error: BaseException) -> tuple[str, str, str, str] | None:
    """Return which method of a class raised an error, the way there, its type and what it says; None if none did."""
    if not isinstance(kind, type):  # a function that makes objects: of which class, nobody knows
        return None
    # A generator makes a RuntimeError of a StopIteration, which a compiled one has as its context alone.
    for each in filter(None, (error, error.__cause__ or error.__context__)):
        at: TracebackType | None = each.__traceback__
        while at is not None:
            code = at.tb_frame.f_code
            if code.co_argcount and isinstance(at.tb_frame.f_locals.get(code.co_varnames[0]), kind):
                lines = traceback.format_exception(type(each), each, at, chain=False)
                return code.co_name, "".join(lines), type(each).__name__, str(each)
            at = at.tb_next
    called = _CALL_FAILED.match(str(error)) if isinstance(error, TypeError) else None
    if called and called[1] in [base.__qualname__ for base in kind.__mro__]:
        return called[2], "", type(error).__name__, str(error)
    return None
