"""The guard of tests/offline: breaks if a test, or a process that a test starts, could reach the network unseen."""

import os
import socket
import subprocess
import sys

import pytest

AWAY = "192.0.2.1"  # kept for documentation by RFC 5737: nobody has it


def test_what_leaves_this_machine_is_refused_by_name():
    with socket.socket() as tcp, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        for call in (
            lambda: tcp.connect((AWAY, 80)),
            lambda: tcp.connect_ex((AWAY, 80)),
            lambda: udp.sendto(b"x", (AWAY, 53)),
            lambda: socket.create_connection((AWAY, 80)),
            lambda: socket.gethostbyaddr(AWAY),
        ):
            with pytest.raises(RuntimeError, match=f"tests run without network.*{AWAY}"):
                call()
    for look_up in (lambda: socket.getaddrinfo("huggingface.co", 443), lambda: socket.gethostbyname("huggingface.co")):
        with pytest.raises(RuntimeError, match="tests run without network.*huggingface.co"):
            look_up()
    with socket.socket(socket.AF_INET6) as six, pytest.raises(RuntimeError, match="2001:db8::1"):
        six.connect(("2001:db8::1", 80))


def test_local_sockets_work(tmp_path):
    """Breaks if kernels and torchrun could not talk to their children."""
    places = [(socket.AF_INET, ("127.0.0.1", 0)), (socket.AF_UNIX, str(tmp_path / "s"))]
    for family, place in places:
        with socket.socket(family) as server, socket.socket(family) as client:
            server.bind(place)
            server.listen()
            client.connect(server.getsockname())
            client.sendall(b"x")
            assert server.accept()[0].recv(1) == b"x"
    assert socket.getaddrinfo("localhost", 80)


def test_other_processes_are_guarded_too():
    code = f"import socket; socket.create_connection(('{AWAY}', 80), timeout=1)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 1
    assert f"tests run without network, but socket.getaddrinfo was asked for '{AWAY}'" in done.stderr
