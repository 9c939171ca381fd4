"""with_field_docs: let help() and notebooks show of a dataclass what its source says below each field."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
from itertools import pairwise
from typing import TypeVar

T = TypeVar("T")


def with_field_docs(kind: type[T]) -> type[T]:
    """Decorate a dataclass: behind its docstring come those of its fields, as a list of attributes.

    Python keeps no string that stands below a field, though editors and command lines read it there. The source is read
    when somebody asks for the docstring, not before: it takes a while. Where there is none, the docstring is as it was.
    """
    if kind.__doc__ is not None:
        type.__setattr__(kind, "__doc__", _LazyDoc(kind.__doc__))  # becomes a str when it is asked for
    return kind


class _LazyDoc:
    """A docstring that is made when a class is asked for it."""

    def __init__(self, own: str) -> None:
        self._own = own
        self._whole: str | None = None

    def __get__(self, instance: object, kind: type) -> str:
        if self._whole is None:
            docs = field_docs(kind)
            listed = [f"{name}: {' '.join(text.split())}" for name, text in docs.items()]
            self._whole = inspect.cleandoc(self._own)
            if listed:
                self._whole += "\n\nAttributes:\n" + "\n".join(map(_hanging, listed))
        return self._whole


def _hanging(text: str) -> str:
    return textwrap.fill(text, 110, initial_indent=" " * 4, subsequent_indent=" " * 8, break_on_hyphens=False)


def field_docs(kind: type) -> dict[str, str]:
    """Return what stands below each field in the source of a dataclass, and of those it inherits from."""
    if not dataclasses.is_dataclass(kind):
        return {}
    found: dict[str, str] = {}
    for each in reversed(kind.__mro__):
        if not dataclasses.is_dataclass(each):
            continue
        try:
            source = inspect.getsource(each)
        except (OSError, TypeError):
            continue
        (tree,) = ast.parse(textwrap.dedent(source)).body
        assert isinstance(tree, ast.ClassDef)
        for field, text in pairwise(tree.body):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(text, ast.Expr)
                and isinstance(text.value, ast.Constant)
                and isinstance(text.value.value, str)
            ):
                found[field.target.id] = inspect.cleandoc(text.value.value)
    names = [each.name for each in dataclasses.fields(kind)]
    return {name: found[name] for name in names if name in found}
