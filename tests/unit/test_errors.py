"""What helps where the kernel has refused something, and which call it was."""

import errno
import select
from types import ModuleType

import pytest

from prefork import errors
from prefork.errors import explained

CALLS = """
import os, select, socket
from functools import partial

def plain():
    os.memfd_create("x" * 300, 0)

def over_lines():
    with socket.socket(
        -5,
        socket.SOCK_STREAM,
    ) as sock:
        pass

def an_argument_that_calls():
    return os.path.exists("/"), os.listdir(str("/no/such/" + str(os.getpid())))

def of_another_name(poll):
    poll.register(10**6, select.EPOLLIN)

def a_variable():
    rename = partial(os.rename, "/no/such")
    rename("/no/such/either")

def _by_ctypes():
    raise OSError(1, "as a call by ctypes has failed")
"""


def raised(name: str, module: str = "prefork.of_a_test") -> OSError:
    """What that function raises, when it stands in this module."""
    found = ModuleType(module)
    exec(compile(CALLS, "of_a_test.py", "exec"), vars(found))
    with select.epoll() as poll, pytest.raises(OSError) as caught:  # noqa: PT011
        vars(found)[name](*([poll] if name == "of_another_name" else []))
    return caught.value


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("plain", "memfd_create"),
        ("over_lines", "socket"),
        ("an_argument_that_calls", "listdir"),
        ("of_another_name", "epoll_ctl"),
        ("a_variable", "rename"),
        ("_by_ctypes", "by_ctypes"),
    ],
)
def test_the_call_is_the_one_that_prefork_has_made(name: str, call: str) -> None:
    assert errors.call_of(raised(name)) == call


def test_of_an_error_that_was_not_raised_or_by_others_no_call_is_known() -> None:
    assert errors.call_of(OSError(errno.EPERM, "never raised")) is None
    assert errors.call_of(raised("plain", module="mine")) is None


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (OSError(errno.EMFILE, "Too many"), "Too many: see RLIMIT_NOFILE (ulimit -n)"),
        (OSError(errno.EPERM, "No"), "No: a sandbox forbids it: allow it (SystemCallFilter= in a unit, seccomp in a container)"),
        (OSError(errno.EACCES, "No", "/a"), "No"),
        (OSError(errno.ENOENT, "None", "/a"), "None"),
        (OSError("by words alone"), "by words alone"),
    ],
)
def test_a_reason_has_the_remedy_of_its_errno(error: OSError, text: str) -> None:
    assert explained(error) == text


@pytest.mark.parametrize(("number", "remedy"), [(errno.EACCES, "name another"), (errno.EMFILE, errors.REMEDIES[errno.EMFILE])])
def test_what_the_place_says_is_for_what_the_table_does_not_know(number: int, remedy: str) -> None:
    assert explained(OSError(number, "No", "/a"), "name another") == f"No: {remedy}"
