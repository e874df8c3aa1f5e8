"""How another process stands, as the kernel tells it (proc_pid_status(5)): for people, and as evidence of what it has heard.

A process that has gone, or that may not be looked at (hidepid, ProtectProc), has no standing.
"""

from dataclasses import dataclass

# The file has 1.5 KiB; the lines that are read here are in its first half.
_READ = 4096


@dataclass(frozen=True, slots=True)
class Standing:
    """The main thread's state, as in "D (disk sleep)", the pid of the process that traces it, or 0, and the signals
    (a mask) that the main thread blocks or that are ignored.
    """

    state: str
    tracer: int
    deaf: int = 0

    @property
    def sleeps_in_the_kernel(self) -> bool:
        """State D: it takes no signal before that is over."""
        return self.state.startswith("D")

    @property
    def stands_still(self) -> bool:
        """It was stopped or is traced, or it has ended and nobody has reaped it yet."""
        return self.state[:1] in ("T", "t", "Z", "X")

    def is_deaf_to(self, signo: int) -> bool:
        """Whether it takes no such signal."""
        return bool(self.deaf >> (signo - 1) & 1)

    def __str__(self) -> str:
        return f"state {self.state}" + (f", traced by process {self.tracer}" if self.tracer else "")


def standing(pid: int) -> Standing | None:
    """How this process stands."""
    try:
        with open(f"/proc/{pid}/status", "rb", buffering=0) as file:
            text = file.read(_READ).decode("ascii", "replace")
    except OSError:  # it has gone, or we may not look
        return None
    # The name comes first and may hold anything, but no line's end.
    fields = dict(line.split(":\t", 1) for line in text.splitlines() if ":\t" in line)

    deaf = int(fields.get("SigBlk", "0"), 16) | int(fields.get("SigIgn", "0"), 16)
    return Standing(fields.get("State", "?"), int(fields.get("TracerPid", "0")), deaf)
