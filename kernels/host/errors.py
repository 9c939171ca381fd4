"""What the CPU runner raises."""

from __future__ import annotations


class KernelError(RuntimeError):
    """A kernel broke a rule of CUDA while it ran.

    The message names kernel, block, thread and source line, and the rule; the attributes hold the same.
    """

    def __init__(
        self,
        kernel: str,
        rule: str,
        *,
        block: tuple[int, int, int] | None = None,
        thread: tuple[int, int, int] | None = None,
        file: str = "",
        line: int = 0,
        details: str = "",
    ) -> None:
        self.kernel = kernel
        self.rule = rule
        self.block = block
        self.thread = thread
        self.file = file
        self.line = line
        self.details = details
        where = [f"kernel {kernel}"]
        if block is not None:
            where.append(f"block {block}")
        if thread is not None:
            where.append(f"thread {thread}")
        if file and line:
            where.append(f"{file}:{line}")
        message = ", ".join(where) + ": " + rule
        super().__init__(message + ("\n" + details if details else ""))
