"""A sandbox that refuses system calls, as a service's or a container's does: ``python sandbox.py ERRNO CALL[,CALL...] COMMAND...``.

    subprocess.run([*refusing(errno.EPERM, "memfd_create"), sys.executable, "-m", "prefork", ...])

By seccomp(2), whose filter stays over an exec and is inherited. So the command's start has to get along without the call.
"""

import ctypes
import os
import platform
import struct
import sys

import pytest

_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 38, 22, 2
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
# linux/audit.h: the machine whose numbers these are; asm/unistd.h: the calls.
_NUMBERS = {
    "x86_64": (
        0xC000003E,
        {"socket": 41, "bind": 49, "setpriority": 141, "prctl": 157, "setresuid": 117, "setpgid": 109, "setsid": 112}
        | {"memfd_create": 319, "pidfd_open": 434, "signalfd4": 289, "pipe2": 293, "socketpair": 53},
    ),
    "aarch64": (
        0xC00000B7,
        {"socket": 198, "bind": 200, "setpriority": 140, "prctl": 167, "setresuid": 147, "setpgid": 154, "setsid": 157}
        | {"memfd_create": 279, "pidfd_open": 434, "signalfd4": 74, "pipe2": 59, "socketpair": 199},
    ),
}


def refusing(errno: int, *calls: str) -> list[str]:
    """What a command has to be started by, to be refused these calls with this errno."""
    if platform.machine() not in _NUMBERS:
        pytest.skip(f"the numbers of system calls on {platform.machine()} are not known here")
    return [sys.executable, __file__, str(errno), ",".join(calls)]


def _refuse(errno: int, calls: list[str]) -> None:
    machine, numbers = _NUMBERS[platform.machine()]
    load, equals, answer = 0x20, 0x15, 0x06
    steps = [(load, 0, 0, 4), (equals, 1, 0, machine), (answer, 0, 0, _ALLOW), (load, 0, 0, 0)]
    for call in calls:
        steps += [(equals, 0, 1, numbers[call]), (answer, 0, 0, _ERRNO | errno)]
    steps.append((answer, 0, 0, _ALLOW))
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *step) for step in steps))
    program = ctypes.create_string_buffer(struct.pack("@HP", len(steps), ctypes.addressof(code)))
    libc = ctypes.CDLL(None, use_errno=True)
    for option, *arguments in ((_PR_SET_NO_NEW_PRIVS, 1, 0), (_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, program)):
        if libc.prctl(option, *arguments, 0, 0) != 0:
            sys.exit(f"no sandbox: {os.strerror(ctypes.get_errno())}")


if __name__ == "__main__":
    _refuse(int(sys.argv[1]), sys.argv[2].split(","))
    os.execvp(sys.argv[3], sys.argv[3:])
