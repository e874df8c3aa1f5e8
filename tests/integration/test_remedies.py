"""What a machine or a sandbox refuses at the start is told with the address or the call, and with what helps against that."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import line, watch
from tests.conftest import HANDLERS
from tests.sandbox import refusing

SERVE = [sys.executable, "-P", "-m", "prefork", "serve", "--module=tiny:who", "--workers=1"]
LINK = "fe80::1%lo"
# In a network namespace of its own, whose loopback interface has that address: what a daemon there is told, and what it answers.
INSIDE = f"""
import subprocess, sys
subprocess.run("ip link set lo up && ip addr add fe80::1/64 dev lo nodad", shell=True, check=True)
from prefork.testing import serve
with serve("spoiling:loop", folder=sys.argv[1], workers=1, bind="[{LINK}]:0") as server:
    for order in (b"nothing", b"shut down", b"hear nobody", b"nothing"):
        with server.connect() as sock:
            sock.sendall(order)
            assert sock.recv(64) == order
        assert server.command("reload")["ok"], server.log()
    print(server.status()["listeners"][0]["address"])
    assert "opened anew" not in server.log()
"""


def refused(*options: str, before: list[str] | None = None, command: str = "serve") -> tuple[int, str]:
    """Exit status and last line of a daemon that does not start."""
    serve = [*(before or []), *SERVE[:4], command, *SERVE[5:], *options]
    done = subprocess.run(serve, cwd=HANDLERS, capture_output=True, text=True, timeout=watch.DEADLINE, check=False)
    return done.returncode, done.stderr.splitlines()[-1]


def test_a_link_local_address_is_bound_at_its_interface_and_again_when_a_handler_has_shut_it_down() -> None:
    watch.needs("ip")
    if subprocess.run([*line.OWN, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("a network namespace can't be had here")
    done = subprocess.run(
        [*line.OWN, sys.executable, "-c", INSIDE, HANDLERS], capture_output=True, text=True, timeout=watch.DEADLINE, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"[{LINK}]:")


@pytest.mark.parametrize(
    ("address", "status", "message"),
    [
        ("[fe80::1%nosuch]:7000", 69, "[fe80::1%nosuch]:7000: this machine has no interface nosuch: `ip link` lists those it has"),
        ("[fe80::1%9999]:7000", 69, "[fe80::1%9999]:7000: this machine has no interface 9999: `ip link` lists those it has"),
        ("[fe80::dead%lo]:7000", 69, "interface lo has no such address: `ip addr show dev lo` lists those it has"),
        ("[fe80::1]:7000", 78, "a link-local address needs its interface: [fe80::1%eth0]"),
    ],
)
def test_an_interface_that_is_not_there_is_told_with_where_to_look(address: str, status: int, message: str) -> None:
    found, said = refused(f"--bind={address}")
    assert (found, message in said) == (status, True), said


@pytest.mark.parametrize(("address", "instead"), [(":7000", "0.0.0.0:7000"), ("[::1]:7001", "127.0.0.1:7001")])
def test_where_there_is_no_ipv6_an_address_is_told_with_the_one_of_ipv4(address: str, instead: str) -> None:
    # All sockets are refused, as the kernel refuses those of a family that it does not have.
    found, said = refused(f"--bind={address}", "--control=off", before=refusing(errno.EAFNOSUPPORT, "socket"))
    assert found == 69
    assert said.startswith(f"prefork: {address}: there is no IPv6 here: take {instead}, or allow it (ipv6.disable of the kernel, ")


def test_a_high_port_that_a_sandbox_forbids_is_not_told_as_a_low_one() -> None:
    found, said = refused("--bind=127.0.0.1:7000", "--control=off", before=refusing(errno.EPERM, "bind"))
    assert (found, "Operation not permitted: a sandbox forbids bind: see SocketBindDeny= and " in said) == (77, True), said
    assert "below 1024" not in said


# By the call: exit status, and what is said.
CALLS = {
    "memfd_create": (
        1,
        "can't start a fork server: {reason}: a sandbox forbids memfd_create: allow it (SystemCallFilter= in a unit, ",
    ),
    "prctl": (1, "{reason}: a sandbox forbids prctl: allow it"),
}


def test_check_names_it_too() -> None:
    found, said = refused(before=refusing(errno.EPERM, "memfd_create"), command="check")
    assert (found, "Operation not permitted: a sandbox forbids memfd_create: allow it" in said) == (1, True), said


def test_a_fork_server_that_a_sandbox_refuses_its_beginning_is_no_bug() -> None:
    found, said = refused("--bind=127.0.0.1:0", "--control=off", before=refusing(errno.EPERM, "setpgid", "setsid"))
    assert found == 78
    assert "the fork server can't begin: Operation not permitted: a sandbox forbids setpgid or setsid: allow it" in said


def test_a_user_that_a_user_namespace_does_not_have_is_told() -> None:
    # util-linux forbids setgroups(2) there; without that the user is not mapped, which is EINVAL.
    before = ["unshare", "--user", "--map-root-user"]
    if subprocess.run([*before, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("a user namespace can't be had here")
    found, said = refused("--bind=127.0.0.1:0", "--user=12345", "--control=off", before=before)
    assert found == 78
    assert said.startswith("prefork: user = '12345': can't become user 12345, group 12345: Operation not permitted: ")
    assert "a sandbox forbids setgroups: allow it" in said
    if os.geteuid() == 0:
        found, said = refused("--bind=127.0.0.1:0", "--user=12345", "--control=off", before=refusing(errno.EINVAL, "setresuid"))
        assert "this user namespace does not have them (/proc/self/uid_map, gid_map): name others" in said


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOSYS])
@pytest.mark.parametrize("call", CALLS)
def test_a_system_call_that_a_sandbox_refuses_is_named(call: str, number: int) -> None:
    status, message = CALLS[call]
    found, said = refused("--bind=127.0.0.1:0", "--control=off", before=refusing(number, call))
    assert (found, message.format(reason=os.strerror(number)) in said) == (status, True), said


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.EMFILE, "see RLIMIT_NOFILE (ulimit -n)"),
        (errno.ENFILE, "see fs.file-max"),
        (errno.ENOMEM, "see the memory that is left, memory.max and vm.overcommit_memory"),
        (errno.EAGAIN, "see RLIMIT_NPROC (ulimit -u), pids.max and kernel.threads-max"),
        (errno.EFBIG, "see RLIMIT_FSIZE (ulimit -f)"),
    ],
)
def test_the_remedy_of_a_failed_start_is_that_of_its_errno(number: int, remedy: str) -> None:
    found, said = refused("--bind=127.0.0.1:0", "--control=off", before=refusing(number, "memfd_create"))
    assert (found, said) == (1, f"prefork: can't start a fork server: {os.strerror(number)}: {remedy}")


@pytest.mark.parametrize(
    ("nice", "message"),
    [(3, "Operation not permitted: a sandbox forbids setpriority: allow it (SystemCallFilter= in a unit"), (-3, "only root may")],
)
def test_a_niceness_that_a_sandbox_refuses_is_not_told_as_one_that_takes_root(nice: int, message: str) -> None:
    found, said = refused("--bind=127.0.0.1:0", f"--nice={nice}", "--control=off", before=refusing(errno.EPERM, "setpriority"))
    assert (found, f"nice = {nice}: {message}" in said) == (78, True), said


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")
@pytest.mark.parametrize("privileges", [[], ["setpriv", "--bounding-set=-all", "--inh-caps=-all"]], ids=["root", "no capability"])
@pytest.mark.parametrize("option", ["--chdir={}/me", "--config={}/me/prefork.toml", "--log-file={}/me/log"])
def test_what_a_unit_hides_is_told_as_that(option: str, privileges: list[str], tmp_path: Path) -> None:
    watch.needs("setpriv")
    home, empty = tmp_path / "home", tmp_path / "systemd" / "inaccessible" / "dir"
    for folder in (home / "me", empty):
        folder.mkdir(parents=True)
    empty.chmod(0)
    hide = ["unshare", "--mount", "sh", "-c", 'mount --bind "$0" "$1" && shift && exec "$@"', str(empty), str(home)]
    found, said = refused("--bind=127.0.0.1:0", "--control=off", option.format(home), before=[*hide, *privileges])
    assert found == 78, said
    assert f"its unit hides {home} from this service (ProtectHome=, " in said
    assert said.endswith("have it elsewhere, as in /opt") or "or name another one (chdir)" in said
