"""What every command line of the project does alike: parse a dataclass, and fail in one line."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_type_hints

from sim.compiled.packages import prefer_compiled
from sim.parser_errors import in_one_line
from sim.user_code import UserCodeError

if TYPE_CHECKING:
    import tyro

T = TypeVar("T")

BAD_INPUT, INTERRUPTED, PIPE_CLOSED, TERMINATED = 2, 130, 141, 143
"""Exit statuses; but for the first, what a shell reports for a command that SIGINT, SIGPIPE or SIGTERM ended."""


_INCOMPLETE = "the result is not complete"
_INTERRUPTION = f"interrupted: {_INCOMPLETE}"


def answer_interrupts() -> None:
    """From now on, end in one line when Ctrl-C is pressed; `run_command` restores Python's way of raising it.

    For a module that is run: to be called ahead of its imports, which take seconds and, written in C in part, do not
    all pass a KeyboardInterrupt on.
    """
    signal.signal(signal.SIGINT, _leave)


def begin_command(command: ModuleSpec | None) -> None:
    """Answer interrupts, and start over with the compiled packages if there are any (see sim.compiled.packages).

    For a module that replays requests when it is run: to be called with its __spec__, ahead of its imports.
    """
    answer_interrupts()
    prefer_compiled(command)


def _leave(*_: object) -> None:
    print(_INTERRUPTION, file=sys.stderr, flush=True)
    os._exit(INTERRUPTED)  # nothing has been made yet that would have to be cleaned up


class Terminated(BaseException):
    """Raised where a command was when it was asked to end, so that it cleans up as it does when interrupted."""


def _terminate(*_: object) -> None:
    raise Terminated


@contextlib.contextmanager
def when_ended(complete: str) -> Iterator[None]:
    """Have the line of `run_command` say what is complete, in place of that the result is not, if it ends in here."""
    try:
        yield
    except (KeyboardInterrupt, Terminated) as stop:
        stop.args = (complete,)
        raise


def run_command(action: Callable[[], object]) -> int:
    """Run a command and return its exit status. Bad input, Ctrl-C and SIGTERM end in one line on stderr.

    It ends in silence where the reader of its output, `head` for example, wants no more. Below the line on an error
    in a class of the user's stands how it came about there.
    """
    answers = threading.current_thread() is threading.main_thread()
    answers = answers and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    try:
        if signal.getsignal(signal.SIGINT) is _leave:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if answers:
            signal.signal(signal.SIGTERM, _terminate)
        action()
        if sys.stdout is not None:  # as it is where whoever called has closed it
            sys.stdout.flush()
    except BrokenPipeError:
        # What is still buffered would be written, and fail again, when the interpreter ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    except (ValueError, OSError) as error:
        print(" ".join(f"error: {error}".split()), file=sys.stderr)
        if isinstance(error, UserCodeError):
            print(error.trace, end="", file=sys.stderr)
        return BAD_INPUT
    except MemoryError as error:
        print(" ".join(f"error: there is not enough memory {error}".split()), file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt as stop:
        print(f"interrupted: {str(stop) or _INCOMPLETE}", file=sys.stderr)
        return INTERRUPTED
    except Terminated as stop:
        print(f"terminated: {str(stop) or _INCOMPLETE}", file=sys.stderr)
        return TERMINATED
    finally:
        if answers:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
    return 0


def require_writable(name: str, path: Path) -> None:
    """Raise ValueError unless `path` is a file that can be written, or can be made. Leaves everything as it is."""
    existed = path.exists()
    try:
        with path.open("a"):
            pass
        if not existed:
            path.unlink()
    except OSError as error:
        raise ValueError(f"{name} ({path}) cannot be written: {error.strerror}") from None


def parse_dataclass(
    kind: type[T], prog: str, arguments: list[str], default: T | None = None, description: str | None = None
) -> T:
    """Parse flags into a dataclass whose nested dataclasses are flattened: field names are the flags.

    The help begins with `description`, or else with the dataclass's docstring.

    Raises ValueError where a dataclass refuses its values, for a flag that is unknown, ill-typed or missing, for a text
    or a path that is no UTF-8, and for an empty path. Exits with 0, after having printed it, where the help is asked
    for.
    """
    import tyro

    given: Any = default
    empty: list[Path] = []
    paths = _path_registry(empty)

    def parse() -> T:
        parsed: T = tyro.cli(
            kind,
            prog=prog,
            description=description,
            args=arguments,
            default=given,
            config=(tyro.conf.OmitArgPrefixes,),
            registry=paths,
        )
        return parsed

    made = parse_plainly(prog, parse)
    for name, value in _values(made):
        if any(value is each for each in empty):
            raise empty_path(name)
        if isinstance(value, str | Path):
            require_utf8(name, value)
    return made


def _path_registry(empty: list[Path]) -> tyro.constructors.ConstructorRegistry:
    """Return how paths are parsed: as tyro does it, the empty ones being noted.

    They equal the working directory, and are told from it by being objects of their own.
    """
    import tyro

    registry = tyro.constructors.ConstructorRegistry()

    def parse(texts: list[str]) -> Path:
        path = Path(*texts)
        if texts == [""]:
            empty.append(path)
        return path

    @registry.primitive_rule
    def path_rule(
        info: tyro.constructors.PrimitiveTypeInfo,
    ) -> tyro.constructors.PrimitiveConstructorSpec[Any] | None:
        if info.type is not Path:
            return None
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs=1,
            metavar="PATH",
            instance_from_str=parse,
            is_instance=lambda value: isinstance(value, Path),
            str_from_instance=lambda value: [str(value)],
        )

    return registry


def _values(options: Any) -> Iterator[tuple[str, Any]]:
    """Yield name and value of each field of a dataclass, those of nested dataclasses in place of them."""
    for each in dataclasses.fields(options):
        value = getattr(options, each.name)
        if dataclasses.is_dataclass(value):
            yield from _values(value)
        else:
            yield each.name, value


def empty_path(name: str) -> ValueError:
    """Return the error for an option that is an empty path."""
    return ValueError(f"{name} ('') must name a place: an empty path is the working directory")


def require_utf8(name: str, value: str | Path) -> None:
    """Raise ValueError for a text that is no UTF-8, or a path that is none once it is absolute.

    Neither a manifest nor a Parquet file's name can be anything else, and that would be found out after the run.
    """
    text = os.path.abspath(value) if isinstance(value, Path) else value
    try:
        text.encode()
    except UnicodeEncodeError:
        shown = text.encode("utf-8", "backslashreplace").decode()
        raise ValueError(f"{name} ({shown}) must be UTF-8 text") from None


def parse_plainly(prog: str, parse: Callable[[], T]) -> T:
    """Return what a call of tyro's parser returns. Raises ValueError, in one line, where it gives up."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return parse()
    except SystemExit as stop:
        refusal = _refusal(stop)
        if refusal is None and stop.code:
            refusal = in_one_line(said.getvalue(), prog)
        if refusal is not None:
            raise ValueError(refusal) from None
        sys.stderr.write(said.getvalue())
        raise


def _refusal(stop: SystemExit) -> str | None:
    """Return the ValueError by which a dataclass refused its values, if that is why tyro gave up.

    tyro names the part of the command line that failed: an argument of its own kind where a text would not
    convert, and the field's name where it was the dataclass that refused. Where it was the outermost one, the refusal
    is all there is.
    """
    failure = stop.__context__
    if type(failure) is ValueError:
        return str(failure)
    if failure is None or not isinstance(getattr(failure, "arg", None), str):
        return None
    return str(failure.__context__) if isinstance(failure.__context__, ValueError) else None


def flags_of(kind: type[Any]) -> dict[str, Any]:
    """Return the type of each flag that `parse_dataclass` knows for a dataclass, by the name of its field."""
    found: dict[str, Any] = {}
    types = get_type_hints(kind)
    for each in dataclasses.fields(kind):
        if dataclasses.is_dataclass(inner := types[each.name]) and isinstance(inner, type):
            found |= flags_of(inner)
        else:
            found[each.name] = inner
    return found


def option_value(arguments: list[str], flag: str) -> str | None:
    """Return the value of one flag, for when it is needed before the command line as a whole is understood."""
    for position, argument in enumerate(arguments):
        if argument.replace("_", "-") == flag and position + 1 < len(arguments):
            return arguments[position + 1]
        name, equals, value = argument.partition("=")
        if equals and name.replace("_", "-") == flag:
            return value
    return None
