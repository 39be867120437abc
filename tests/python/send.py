"""Sends to an address (`HOST:PORT`) in small pieces, from a few calls deep, until it is told to stop."""

import signal
import socket
import sys

RUNNING = True


def send_piece(connection):
    connection.sendall(b"x" * 1000)


def send_all(connection):
    while RUNNING:
        send_piece(connection)


def stop(_signal, _frame):
    global RUNNING
    RUNNING = False


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, stop)
    host, port = sys.argv[1].rsplit(":", 1)
    with socket.create_connection((host, int(port))) as connection:
        print("ready", flush=True)
        send_all(connection)
