"""rpyc_client.py HOST PORT N: N connections with a call each."""

import sys

import rpyc

host, port, connections = sys.argv[1:]
for number in range(int(connections)):
    connection = rpyc.connect(host, int(port))
    assert connection.root.upper(f"call {number}") == f"CALL {number}"
    connection.close()
