"""Which TCP sockets processes listen on, as the system tells it."""

import os
from pathlib import Path

# 127.0.0.1, the same within IPv6, and ::1, as /proc/net writes them.
LOOPBACK = {
    "0100007F",
    "0000000000000000FFFF00000100007F",
    "00000000000000000000000001000000",
}


def listeners(*pids: int) -> list[str]:
    """The local addresses, in hexadecimal, of TCP sockets on which these processes listen."""
    sockets = set()
    for pid in pids or (os.getpid(),):
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            try:
                sockets.add(os.readlink(descriptor))
            except FileNotFoundError:
                continue
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in sockets:
                found.append(fields[1])
    return sorted(found)


def are_on_the_loopback(addresses: list[str]) -> bool:
    return {address.rpartition(":")[0] for address in addresses} <= LOOPBACK
