"""What tyro prints of a command line that it cannot understand, a box of many lines, told in one."""

from __future__ import annotations

import re

_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_ITEM = " " * 4
"""How tyro indents a flag in a list; what it says of the flag is indented further."""
_HELP = "For full helptext"
_FLAG = "Argument helptext"
_AFTER = (_HELP, _FLAG)
"""How parts begin that are not about what is wrong."""
_UNREAD = "error parsing "


def in_one_line(printed: str, prog: str) -> str | None:
    """Return what the box says is wrong, and which flags may have been meant; None if it is no such box."""
    sections = _sections(printed)
    if not sections or not any(section[0].startswith(_HELP) for section in sections):
        return None
    told = [_told(section) for section in sections if not section[0].startswith(_AFTER)]
    flag, colon, reason = told[0].removeprefix(_UNREAD).partition(": ")
    if told[0].startswith(_UNREAD) and colon:
        described = [
            section[1].strip() for section in sections if section[0].startswith(_FLAG) and section[1:]
        ]
        told[0] = f"{described[0] if described else flag}: {reason}"
    return f"{'; '.join(told)} ({prog} --help explains)"


def _sections(printed: str) -> list[list[str]]:
    """Return the lines of each part of the box, without its frame; none if it is no box.

    The frame is drawn with lines, or where the terminal is not known to have such characters, with blanks and dashes.
    """
    sections: list[list[str]] = [[]]
    for line in _COLOURS.sub("", printed).splitlines():
        if line.startswith(("│ ", "  ")):
            inner = line[2:].rstrip("│ ")
            if inner and not inner.strip("─-"):
                sections.append([])
            else:
                sections[-1].append(inner)
        elif not line.startswith(("╭", "╰", " ")):
            return []
    return [section for section in sections if section]


def _told(section: list[str]) -> str:
    """Return a part as a phrase: its sentence up to an empty line, or its heading and the flags listed under it."""
    items = [line.strip() for line in section if line.startswith(_ITEM) and line[len(_ITEM) :][:1] != " "]
    if items:
        text = f"{section[0]} {', '.join(items)}"
    else:
        text = " ".join(section[: section.index("")] if "" in section else section)
    return text[:1].lower() + text[1:].removesuffix(".")
