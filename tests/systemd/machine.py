"""A real systemd as pid 1 of its own namespaces, on the machine's own network, with prefork installed at /opt/prefork/venv.

What it changes is gone with it: /run, /tmp, /var/tmp and /dev are its own (a boot empties /tmp and makes links in /dev), /etc, /opt
and /var are layers over the machine's, /proc/sys can't be written, and its control groups are below one of the test's.
"""

import json
import os
import shlex
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import psutil

from prefork.testing import connect
from tests import public, watch

SYSTEMD = "/lib/systemd/systemd"
VENV = "/opt/prefork/venv"
UNITS = Path(__file__).parents[2] / "systemd"
# What a boot does to a machine, and ours must not do to this one.
MASKED = """
    systemd-sysctl.service systemd-modules-load.service systemd-binfmt.service proc-sys-fs-binfmt_misc.automount
    systemd-remount-fs.service systemd-sysusers.service systemd-update-utmp.service systemd-tmpfiles-setup-dev.service
    systemd-udevd.service systemd-udev-trigger.service systemd-networkd.service systemd-resolved.service
    systemd-timesyncd.service systemd-journal-flush.service systemd-machine-id-commit.service systemd-firstboot.service
    systemd-random-seed.service sys-kernel-config.mount sys-kernel-debug.mount sys-kernel-tracing.mount
    sys-fs-fuse-connections.mount dev-hugepages.mount dev-mqueue.mount swap.target local-fs.target cryptsetup.target
    integritysetup.target veritysetup.target systemd-ask-password-console.path
"""
TARGET = """\
[Unit]
Requires=systemd-journald.service dbus.socket
After=systemd-journald.service dbus.socket
"""
BOOT = r"""
set -e
layer() { mkdir -p /run/layers$1/upper /run/layers$1/work
          mount -t overlay overlay -o lowerdir=$1,upperdir=/run/layers$1/upper,workdir=/run/layers$1/work $1; }
mount -t tmpfs tmpfs /run
for place in /etc /opt /root /srv /usr/local /var; do layer $place; done
# The machine's devices, in a folder of their own: a boot makes links there.
mount -t tmpfs -o mode=755 tmpfs /mnt
for node in null zero full random urandom tty kmsg; do touch /mnt/$node; mount --bind /dev/$node /mnt/$node; done
mkdir /mnt/pts /mnt/shm
mount -t devpts -o newinstance,ptmxmode=0666 devpts /mnt/pts
mount -t tmpfs tmpfs /mnt/shm
ln -s pts/ptmx /mnt/ptmx; ln -s /proc/self/fd /mnt/fd; ln -s fd/0 /mnt/stdin; ln -s fd/1 /mnt/stdout; ln -s fd/2 /mnt/stderr
mount --move /mnt /dev
# A boot sets what is the whole machine's, too.
mount --bind /proc/sys /proc/sys; mount -o remount,bind,ro /proc/sys
mount -t tmpfs tmpfs /tmp
mount -t tmpfs tmpfs /var/tmp
# Anew, so that what is seen of the control groups begins with ours.
printf '%s' "$HIERARCHIES" | while read -r kind options place; do
    umount "$place"; mount -t "$kind" -o "$options" "$kind" "$place"
done
mkdir -p /run/systemd/system /run/lock
printf '%s' "$TARGET" > /run/systemd/system/tests.target
for unit in $MASKED; do ln -s /dev/null /run/systemd/system/$unit; done
exec env -i container=docker PATH=/usr/sbin:/usr/bin:/sbin:/bin "$SYSTEMD" --system --unit=tests.target
"""


class Machine:
    """A running systemd. ``pid`` is that of its pid 1 outside."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.root = Path(f"/proc/{pid}/root")

    def inside(self, *command: str) -> list[str]:
        """A command line that runs there as root."""
        return [
            "nsenter",
            "-t",
            str(self.pid),
            "-m",
            "-p",
            "-u",
            "-i",
            "-C",
            "--wd=/",
            "--",
            "env",
            "-i",
            "PATH=/usr/sbin:/usr/bin",
            *command,
        ]

    def run(self, command: str, *, check: bool = True) -> "subprocess.CompletedProcess[str]":
        """Run a command line of the shell there."""
        done = subprocess.run(self.inside("sh", "-c", command), capture_output=True, text=True, check=False)
        if check and done.returncode != 0:
            raise AssertionError(f"{command}: {done.returncode}\n{done.stdout}{done.stderr}\n{self.journal(40)}")
        return done

    def said(self, command: str) -> str:
        """What it prints."""
        return self.run(command).stdout.strip()

    def journal(self, lines: int) -> str:
        """The last lines."""
        return subprocess.run(
            self.inside("journalctl", "--no-pager", f"-n{lines}"), capture_output=True, text=True, check=False
        ).stdout

    def write(self, path: str, text: str, mode: int = 0o644) -> None:
        """Write a file there."""
        file = self.root / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        file.chmod(mode)

    def show(self, unit: str, *properties: str) -> dict[str, str]:
        """Properties of a unit."""
        lines = self.said(f"systemctl show {unit} -p {','.join(properties)}").splitlines()
        return dict(line.partition("=")[::2] for line in lines)

    def outside(self, pid: int) -> int:
        """Our number of a process that has this one there."""
        assert pid > 0
        for process in watch.family(self.pid):
            with suppress(FileNotFoundError, ProcessLookupError):
                status = Path(f"/proc/{process.pid}/status").read_text()
                numbers = next(line for line in status.splitlines() if line.startswith("NSpid:")).split()
                if int(numbers[-1]) == pid:
                    return process.pid
        raise AssertionError(f"no process {pid} there")


@dataclass(frozen=True, slots=True)
class Service:
    """An instance of the units, which listens at ``port`` of 127.0.0.1."""

    machine: Machine
    name: str
    port: int

    @property
    def unit(self) -> str:
        return f"prefork@{self.name}.service"

    def systemctl(self, verb: str, *, check: bool = True) -> "subprocess.CompletedProcess[str]":
        """Do that with the unit."""
        return self.machine.run(f"systemctl {verb} {self.unit}", check=check)

    def prefork(self, command: str, *, check: bool = True) -> "subprocess.CompletedProcess[str]":
        """Run one of prefork's commands there, as root."""
        return self.machine.run(f"{VENV}/bin/prefork {command} {self.name}", check=check)

    def configure(self, **options: object) -> None:
        """Write /etc/prefork/NAME.toml."""
        given = {"module": "echo:loop", "workers": 2, **options}
        lines = (f"{key} = {json.dumps(value)}\n" for key, value in given.items())
        self.machine.write(f"/etc/prefork/{self.name}.toml", "".join(lines))

    def drop_in(self, kind: str, text: str) -> None:
        """Add to the service or the socket of this instance."""
        self.machine.write(f"/etc/systemd/system/prefork@{self.name}.{kind}.d/tests.conf", text)
        self.machine.run("systemctl daemon-reload")

    def with_socket(self, more: str = "") -> None:
        """Have systemd open the port."""
        self.drop_in("socket", f"[Socket]\nListenStream=\nListenStream=127.0.0.1:{self.port}\n{more}")
        self.machine.run(f"systemctl start prefork@{self.name}.socket")

    def show(self, *properties: str) -> list[str]:
        """Properties of the service."""
        found = self.machine.show(self.unit, *properties)
        return [found[name] for name in properties]

    def becomes(self, state: str) -> None:
        """Wait until the service's ActiveState is this one."""
        watch.until(f"{self.unit} is {state}", lambda: self.show("ActiveState") == [state])

    @property
    def master(self) -> int:
        """The main pid, as we see it."""
        return self.machine.outside(int(self.show("MainPID")[0]))

    @property
    def status_text(self) -> str:
        return self.show("StatusText")[0]

    def status(self) -> dict[str, Any]:
        """What `prefork status --json` says."""
        found: dict[str, Any] = json.loads(self.prefork("status --json").stdout)
        return found

    def connect(self) -> socket.socket:
        """A connection to it."""
        return connect(("127.0.0.1", self.port))

    def says(self, word: bytes = b"hello") -> bytes:
        """What it answers."""
        with self.connect() as sock:
            sock.sendall(word)
            return sock.recv(4096)

    def remove(self) -> None:
        """Take it away."""
        names = f"{self.unit} prefork@{self.name}.socket"
        self.machine.run(f"systemctl stop {names}; systemctl reset-failed {names}", check=False)
        for kind in ("service", "socket"):
            shutil.rmtree(self.machine.root / f"etc/systemd/system/prefork@{self.name}.{kind}.d", ignore_errors=True)
        self.machine.run("systemctl daemon-reload")


def missing() -> str | None:
    """Why there can be no such machine."""
    for program in (SYSTEMD, "/usr/bin/dbus-daemon", "/usr/bin/unshare", "/usr/bin/nsenter"):
        if not os.access(program, os.X_OK):
            return f"{program} is not installed"
    return public.missing()


@contextmanager
def booted(scratch: Path, *, install: bool = True) -> Iterator[Machine]:
    """Boot, install prefork and its units, and take everything away again."""
    with _control_groups() as (procs, seen):
        settings = {**os.environ, "HIERARCHIES": seen, "TARGET": TARGET, "MASKED": MASKED, "SYSTEMD": SYSTEMD}
        join = "".join(f"echo $$ > {shlex.quote(path)}; " for path in procs)
        new = "setpriv --pdeathsig KILL unshare --pid --mount --fork --mount-proc --cgroup --uts --ipc --kill-child"
        with (scratch / "boot.log").open("wb") as log:
            command = ["sh", "-c", f'{join} exec {new} sh -c "$BOOT"']
            process = subprocess.Popen(command, env={**settings, "BOOT": BOOT}, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        watch.RESIDENTS.add(process.pid)
        try:
            machine = _wait(process, scratch / "boot.log")
            if install:
                _install(machine)
            yield machine
        finally:
            process.kill()
            process.wait()
            watch.until("systemd has gone", lambda: not watch.family(process.pid))
            watch.RESIDENTS.discard(process.pid)


def _wait(process: "subprocess.Popen[bytes]", log: Path) -> Machine:
    def look() -> Machine | None:
        assert process.poll() is None, log.read_text()
        for child in watch.family(process.pid):
            with suppress(psutil.NoSuchProcess):
                if child.name() == "systemd" and child.ppid() == process.pid:
                    return Machine(child.pid)
        return None

    machine = watch.until("pid 1 is systemd", look)
    done = watch.until("it has booted", lambda: _state(machine))
    assert done in ("running", "degraded"), f"{done}: {log.read_text()}"
    return machine


def _state(machine: Machine) -> str | None:
    said = machine.run("systemctl is-system-running", check=False).stdout.strip()
    return said if said in ("running", "degraded", "maintenance") else None


def _install(machine: Machine) -> None:
    """A venv of the system's Python with what this process has imported, and the units as they are."""
    venv = machine.root / VENV.lstrip("/")
    machine.run(f"{public.PYTHON} -m venv --without-pip {VENV}")
    packages = next((venv / "lib").glob("python*/site-packages"))
    for name in ("prefork", "click", "psutil", "setproctitle"):
        source = Path(str(import_module(name).__file__)).parent
        shutil.copytree(source, packages / name, ignore=shutil.ignore_patterns("__pycache__"))
    machine.write(f"{VENV}/bin/prefork", f"#!{VENV}/bin/python\nfrom prefork.entry import entry\nentry()\n", 0o755)
    for unit in UNITS.iterdir():
        shutil.copy(unit, machine.root / "etc/systemd/system")
    machine.run("systemctl daemon-reload")


@contextmanager
def _control_groups() -> Iterator[tuple[list[str], str]]:
    """A group of ours in each hierarchy. Gives the files to write a pid into, and the hierarchies as mount(8) wants them."""
    procs, mounts, made = [], [], []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, _, right = line.partition(" - ")
        kind, _, options = right.split(" ", 2)
        place = left.split()[4]
        if kind not in ("cgroup", "cgroup2") or "cpuset" in options:  # a new group of that would have no CPU
            continue
        group = Path(place, f"prefork-tests-{os.getpid()}-{time.monotonic_ns()}")
        group.mkdir()
        made.append(group)
        procs.append(str(group / "cgroup.procs"))
        named = ",".join(word for word in options.split(",") if word not in ("rw", "ro")) if kind == "cgroup" else "defaults"
        mounts.append(f"{kind} {named} {place}\n")
    try:
        yield procs, "".join(mounts)
    finally:
        for group in made:
            watch.until(f"{group} is empty", partial(_remove, group))


def _remove(group: Path) -> bool:
    for folder, _, _ in os.walk(group, topdown=False):
        try:
            os.rmdir(folder)
        except OSError:  # the kernel has not done with its processes
            return False
    return True
