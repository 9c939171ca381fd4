"""What the CPU runner raises."""

from __future__ import annotations


class KernelError(RuntimeError):
    """A kernel broke a rule of CUDA while it ran.

    The message is one line that names kernel, block, thread, source line and the rule; the attributes hold the same.
    `block` and `thread` are None, `file` empty and `line` 0 where they are not known.
    """

    def __init__(
        self,
        kernel: str,
        rule: str,
        *,
        block: tuple[int, ...] | None = None,
        thread: tuple[int, ...] | None = None,
        file: str = "",
        line: int = 0,
    ) -> None:
        self.kernel = kernel
        self.rule = rule
        self.block = block
        self.thread = thread
        self.file = file
        self.line = line
        where = [f"kernel {kernel}"]
        if block is not None:
            where.append(f"block {block}")
        if thread is not None:
            where.append(f"thread {thread}")
        if file and line:
            where.append(f"{file}:{line}")
        super().__init__(", ".join(where) + ": " + rule)

    def but(self, rule: str) -> KernelError:
        """Return the same error with another wording of the rule."""
        return KernelError(
            self.kernel, rule, block=self.block, thread=self.thread, file=self.file, line=self.line
        )
