"""What a service can't see by its unit, of mount points as proc_pid_mountinfo(5) has them."""

import pytest

from prefork.system import readable

# As ProtectHome=yes, ProtectHome=tmpfs, PrivateTmp=yes and InaccessiblePaths= make them, and others that hide nothing.
MOUNTS = """\
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
30 22 0:25 /systemd/inaccessible/dir /home ro,nosuid,nodev,noexec master:5 - tmpfs tmpfs rw,mode=755
31 22 0:40 / /root ro,nosuid,nodev,relatime - tmpfs tmpfs ro,mode=755
32 22 8:1 /tmp/systemd-private-0a1b-prefork@echo.service-xYz/tmp /tmp rw,relatime shared:7 - ext4 /dev/sda1 rw
33 22 8:2 / /srv rw,relatime shared:8 - ext4 /dev/sda2 rw
34 22 0:41 / /var/scratch ro - tmpfs tmpfs ro
35 30 8:3 / /home/shared rw - ext4 /dev/sda3 rw
36 33 0:25 /systemd/inaccessible/dir /srv/closed ro,nosuid,nodev,noexec master:5 - tmpfs tmpfs rw,mode=755
"""


@pytest.mark.parametrize(
    ("path", "where"),
    [
        ("/home", "/home"),
        ("/home/me/app", "/home"),
        ("/homes/me", None),
        ("/root/app/mine.toml", "/root"),
        ("/tmp/app", "/tmp"),
        ("/srv/app", None),
        ("/srv/closed/app", "/srv/closed"),
        ("/opt/app", None),
        ("/var/scratch/app", None),
        ("/home/shared/app", None),
    ],
)
def test_what_a_unit_hides_is_told_by_where_it_does(path: str, where: str | None) -> None:
    assert readable._hidden_at(path, MOUNTS) == where
