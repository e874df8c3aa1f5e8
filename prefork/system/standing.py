"""How another process stands, as the kernel tells it (proc_pid_status(5)): for people, and as evidence of what it has heard.

A process that has gone, or that may not be looked at (hidepid, ProtectProc), has no standing.
"""

import os
from dataclasses import dataclass

# The file has 1.5 KiB; the lines that are read here are in its first half.
_READ = 4096
_TICKS = os.sysconf("SC_CLK_TCK")
# Of what comes after the name in proc_pid_stat(5).
_UTIME = 11


@dataclass(frozen=True, slots=True)
class Standing:
    """The main thread's state, as in "D (disk sleep)", the pid of the process that traces it, or 0, and masks of signals.

    ``deaf`` are those that the main thread blocks and those that are ignored, ``pending`` what has arrived and was not taken yet
    (None where the kernel's text was too long to find out).
    """

    state: str
    tracer: int
    deaf: int = 0
    pending: int | None = None

    @property
    def sleeps_in_the_kernel(self) -> bool:
        """State D: it takes no signal before that is over."""
        return self.state.startswith("D")

    @property
    def stands_still(self) -> bool:
        """It was stopped or is traced, or it has ended and was not reaped yet."""
        return self.state[:1] in ("T", "t", "Z", "X")

    def is_deaf_to(self, signo: int) -> bool:
        """Whether it takes no such signal."""
        return bool(self.deaf >> (signo - 1) & 1)

    def has_taken(self, signo: int) -> bool:
        """Whether the main thread has taken each such signal that has come, so that it is not in a system call of before."""
        return (
            not self.stands_still
            and not self.is_deaf_to(signo)
            and self.pending is not None
            and not self.pending >> (signo - 1) & 1
        )

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
    pending = int(fields["SigPnd"], 16) | int(fields["ShdPnd"], 16) if "SigBlk" in fields else None
    return Standing(fields.get("State", "?"), int(fields.get("TracerPid", "0")), deaf, pending)


def cpu_seconds(pid: int) -> float | None:
    """What all threads of a process have used of CPUs, in steps of a tick (10 ms; proc_pid_stat(5))."""
    try:
        with open(f"/proc/{pid}/stat", "rb", buffering=0) as file:
            text = file.read(_READ)
    except OSError:  # it has gone, or we may not look
        return None
    # The name is in parentheses and may hold anything.
    fields = text[text.rfind(b")") + 2 :].split(maxsplit=13)
    return (int(fields[_UTIME]) + int(fields[_UTIME + 1])) / _TICKS if len(fields) > _UTIME + 1 else None


def is_in_call_on(pid: int, fd: int) -> bool | None:
    """Whether the main thread is in a system call whose first argument is this descriptor (proc_pid_syscall(5)).

    None where that is not known: who may not trace a process is not told.
    """
    try:
        with open(f"/proc/{pid}/syscall", "rb", buffering=0) as file:
            fields = file.read(_READ).split()
    except OSError:  # it has gone, or we may not look
        return None
    # "running", or the call's number, its arguments and two registers.
    return len(fields) > 1 and fields[1] == b"%#x" % fd
