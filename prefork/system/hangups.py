"""SIGHUP with its sender, and whether it is the hang-up of the terminal that this process was started on.

A terminal that is closed sends the signal that people send for a reload. Who has sent it stands beside it in a signalfd(2), for
which it stays blocked, and a signal that is blocked waits there even if it is ignored (signal(7)): so its action is left as it was
at the start, also for another program of this process.
"""

import ctypes
import errno
import os
import signal
import struct

# struct signalfd_siginfo: signal, errno, code, pid; 128 bytes, of which these are the first.
_INFO = struct.Struct("=IiiI")
_INFO_BYTES = 128
# The kernel itself has sent it (sigaction(2)).
_SI_KERNEL = 0x80
_TERMINAL = "/dev/tty"
_libc = ctypes.CDLL(None, use_errno=True)


class HangUps:
    """The SIGHUPs of this process, readable from ``fileno()``. ``ignored``: it was started so, as by nohup(1)."""

    def __init__(self) -> None:
        self.ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        self._had_terminal = _has_terminal()
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
        self._fd = _signalfd(signal.SIGHUP)

    def fileno(self) -> int:
        return self._fd

    def close(self) -> None:
        """Read no more of them."""
        os.close(self._fd)

    def take_hang_up(self) -> bool:
        """Take the SIGHUP that has come. Whether it is the terminal's hang-up, and no wish for a reload.

        The kernel sends one to the foreground of a terminal whose session ends. A shell passes its own on to its jobs, and looks no
        different when it carries out `kill -HUP %1`: there the terminal can still be opened. Signals are levels: of several that
        come together one is told.
        """
        _, _, code, sender = _INFO.unpack_from(os.read(self._fd, _INFO_BYTES))
        if not self._had_terminal:
            return False
        # The sender is 0 where it is of another pid namespace.
        return code == _SI_KERNEL or (sender != 0 and sender == os.getsid(0) and not _has_terminal())


def _has_terminal() -> bool:
    try:
        os.close(os.open(_TERMINAL, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC))
    except OSError as error:
        # ENXIO: there is none (any more). What else may be wrong with the path tells nothing of a hang-up.
        return error.errno != errno.ENXIO
    return True


def _signalfd(signo: int) -> int:
    wanted = ctypes.create_string_buffer(_INFO_BYTES)  # a sigset_t, which has as many bytes
    _libc.sigemptyset(wanted)
    _libc.sigaddset(wanted, signo)
    fd: int = _libc.signalfd(-1, wanted, os.O_NONBLOCK | os.O_CLOEXEC)
    if fd < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"signalfd: {os.strerror(number)}")
    return fd
