"""Capabilities (capabilities(7)): giving all of them up, for fork servers, before user code is imported.

A service that binds a low port without root has CAP_NET_BIND_SERVICE, which is the master's. A fork inherits it, and through the
ambient set each program that is executed does, too. Not for a process that runs as root, to which they would come back with the
next exec.
"""

import ctypes
import os

from prefork.system.process import prctl

_VERSION_3 = 0x20080522  # of the 64 bits in two halves, since Linux 2.6.26
_HALVES = 2
_PR_CAPBSET_DROP = 24
_LAST = 63
_libc = ctypes.CDLL(None, use_errno=True)


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Half(ctypes.Structure):
    _fields_ = (("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32))


def give_up() -> None:
    """Have no capability any more, nor leave one to anybody. Raises OSError where a sandbox forbids it."""
    sets = (_Half * _HALVES)()
    _call("capget", sets)
    if not any(half.effective | half.permitted | half.inheritable for half in sets):
        return  # nor an ambient one
    _bound()
    _call("capset", (_Half * _HALVES)())  # which clears the ambient set, too


def _bound() -> None:
    """Where this process may (CAP_SETPCAP): no set-user-ID program gives them back, either."""
    for capability in range(_LAST + 1):
        try:
            prctl(_PR_CAPBSET_DROP, capability)
        except OSError:  # not permitted; or beyond the last one that this kernel knows
            return


def _call(name: str, sets: "ctypes.Array[_Half]") -> None:
    if getattr(_libc, name)(ctypes.byref(_Header(_VERSION_3, 0)), sets) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
