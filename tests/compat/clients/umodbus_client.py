"""umodbus_client.py HOST PORT N: N connections with three requests each."""

import socket
import sys

from umodbus.client import tcp

host, port, connections = sys.argv[1:]
for number in range(int(connections)):
    with socket.create_connection((host, int(port)), timeout=10) as sock:
        for register in range(number, number + 3):
            request = tcp.read_holding_registers(slave_id=1, starting_address=register, quantity=2)
            assert tcp.send_message(request, sock) == [2 * register, 2 * register + 2]
