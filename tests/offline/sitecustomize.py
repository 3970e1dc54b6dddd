"""No test and no notebook reaches the network: a connection or a name look-up that leaves this machine is an error.

conftest.py runs this in its own process and puts this folder on PYTHONPATH, so that Python runs it in every process
that is started from there: torchrun's, Jupyter's kernels, reward workers. Local sockets stay: kernels and torchrun talk
over them.
"""

import ipaddress
import socket
import sys

OWN = {None, "", "localhost", socket.gethostname()}


def is_local(host) -> bool:
    host = host.decode() if isinstance(host, bytes) else host
    try:
        address = ipaddress.ip_address(host.split("%")[0])
    except (AttributeError, ValueError):
        return host in OWN
    return address.is_loopback or address.is_unspecified


def refuse_network(event: str, args: tuple) -> None:
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        internet, address = args[0].family in (socket.AF_INET, socket.AF_INET6), args[1]
        host = address[0] if internet and address else None
    elif event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"):
        address = host = args[0]
    else:
        return
    if not is_local(host):
        raise RuntimeError(f"tests run without network, but {event} was asked for {address!r}")


sys.addaudithook(refuse_network)
