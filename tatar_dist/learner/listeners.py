"""Sockets that gloo leaves listening when its connections stand: nobody else may connect to them.

gloo accepts any connection and cannot ask who it is. Once all ranks are connected nothing more is expected, but the
sockets stay open for as long as the process group lives. Closing them would send gloo's event loop spinning; a filter
in the kernel that drops every packet (Linux, no privilege needed) leaves them silent. Established connections do not
notice.
"""

from __future__ import annotations

import ctypes
import os
import socket
import struct

import psutil

SO_ATTACH_FILTER = 26
RETURN_NOTHING = struct.pack("HBBI", 0x06, 0, 0, 0)  # struct sock_filter: BPF_RET | BPF_K, k = 0 bytes kept


def listening() -> set[int]:
    """File descriptors of this process's listening TCP sockets."""
    return {c.fd for c in psutil.Process().net_connections("tcp") if c.status == psutil.CONN_LISTEN}


def silence(descriptors: set[int]) -> None:
    """Let the kernel drop whatever arrives at these listening sockets from now on."""
    program = ctypes.create_string_buffer(RETURN_NOTHING)
    for fd in descriptors:
        with socket.socket(fileno=os.dup(fd)) as s:
            s.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("HP", 1, ctypes.addressof(program)))
