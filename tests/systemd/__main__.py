"""``python -m tests.systemd [--reloads N] [--upgrades N] [--restarts N] [--clients N]``, as root: a socket-activated service under
load is reloaded, upgraded and restarted. Prints the unit's exposure and what clients saw.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
from pathlib import Path

from tests import watch
from tests.systemd import campaign
from tests.systemd.machine import Service, booted, missing


def main() -> int:
    """Boot a systemd, run the campaign, say what was seen."""
    parser = argparse.ArgumentParser(prog="python -m tests.systemd")
    parser.add_argument("--reloads", type=int, default=50, help="so many `systemctl reload`")
    parser.add_argument("--upgrades", type=int, default=20, help="so many `prefork upgrade`")
    parser.add_argument("--restarts", type=int, default=20, help="so many `systemctl restart`")
    parser.add_argument("--clients", type=int, default=4, help="connections at once, in a closed loop")
    given = parser.parse_args()
    if (reason := missing()) is not None:
        print(f"not here: {reason}")
        return 2
    with tempfile.TemporaryDirectory() as scratch, booted(Path(scratch)) as machine:
        service = Service(machine, "campaign", watch.free_port())
        service.configure(workers=8)
        service.with_socket()
        print(machine.said("systemctl --version").splitlines()[0])
        figures = campaign.run(service, given.reloads, given.upgrades, given.restarts, given.clients)
        print(machine.said(f"systemctl status --no-pager -n0 {service.unit}"))
        print(machine.said(f"systemd-analyze security {service.unit}").splitlines()[-1])
        print(json.dumps(dataclasses.asdict(figures)))
        service.remove()
    failed = bool(figures.failures) or figures.refused > 0
    print(f"{figures.connections} connections, {'FAILED' if failed else '0 errors'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
