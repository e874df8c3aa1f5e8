"""What the user who runs the handler has to be able to read: Python and what is installed for it.

An import takes a folder that it can't read for an empty one, and says that there is no such module. Workers are forked, so all that
prefork itself needs is there; what the handler imports, now or when it serves, is not.
"""

import os
import sys

import prefork


def refusal(user: str) -> str | None:
    """What ``user``, who we are by now, can't read, where the way to it ends, and what helps; None when all can be read."""
    needed = [
        ("the interpreter", sys.executable, os.X_OK),
        ("the standard library", os.path.dirname(os.__file__), os.R_OK | os.X_OK),
    ]
    needed += [("site-packages", folder, os.R_OK | os.X_OK) for folder in _installed()]
    found = [(what, path, closed) for what, path, mode in needed if path and (closed := closed_at(path, mode)) is not None]
    if not found:
        return None
    whats = ", ".join(f"{what} {path}" for what, path, _ in found)
    if (hidden := next(filter(None, (hidden_by(path) for _, path, _ in found)), None)) is not None:
        return f"user {user} can't read {whats}: {hidden}"
    doors = " ".join(dict.fromkeys(closed for _, _, closed in found))
    return f"user {user} can't read {whats}: have Python where every user can, as in /opt, or let them in (chmod a+rx {doors})"


def hidden_by(path: str) -> str | None:
    """What helps where a unit hides what is at ``path`` from this service; None where it does not, or /proc does not say so."""
    try:
        with open("/proc/self/mountinfo") as file:
            hidden = _hidden_at(os.path.abspath(path), file.read())
    except OSError:
        return None
    if hidden is None:
        return None
    return (
        f"its unit hides {hidden} from this service (ProtectHome=, PrivateTmp=, InaccessiblePaths=): have it elsewhere, as in /opt"
    )


def _hidden_at(path: str, mounts: str) -> str | None:
    """The mount point by which systemd hides ``path``, of those in proc_pid_mountinfo(5)."""
    point, root, options, kind = "", "", [""], ""
    for line in mounts.splitlines():
        fields, _, rest = line.partition(" - ")
        _, _, _, source, target, given, *_ = fields.split()
        if f"{path}/".startswith(f"{target.rstrip('/')}/") and len(target) >= len(point):
            point, root, options, kind = target, source, given.split(","), rest.split()[0]
    is_empty = kind == "tmpfs" and "ro" in options and point in ("/home", "/root", "/run/user")  # ProtectHome=tmpfs
    return point if root.endswith("/systemd/inaccessible/dir") or "/systemd-private-" in root or is_empty else None


def _installed() -> list[str]:
    """Where prefork is, and what is installed beside the interpreter: not what is root's alone (~/.local)."""
    ours = os.path.dirname(os.path.dirname(prefork.__file__))
    roots = tuple(os.path.join(prefix, "") for prefix in {sys.prefix, sys.base_prefix})
    names = ("site-packages", "dist-packages")
    return list(dict.fromkeys([ours, *(path for path in sys.path if path.startswith(roots) and path.endswith(names))]))


def closed_at(path: str, mode: int) -> str | None:
    """Where the way to ``path`` ends for this process for want of permission: a folder on it, or itself.

    None when it can be used so, and when it is not there at all.
    """
    try:
        os.stat(path)
        if os.access(path, mode):
            return None
    except PermissionError:
        pass
    except OSError:  # not there
        return None
    way = real = os.path.realpath(path)
    while not os.access(os.path.dirname(way), os.X_OK) and way != os.sep:
        way = os.path.dirname(way)
    return way if way != real else path
