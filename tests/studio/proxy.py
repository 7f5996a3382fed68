"""A reverse proxy that shows a server below a path, which it takes off: byte by byte, so sockets work too."""

from __future__ import annotations

import re
import socket
import threading


class Proxy:
    """Listens on a port of its own until closed."""

    def __init__(self, path: str, behind: int) -> None:
        self._path, self._behind = path.encode(), behind
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                caller, _ = self._listening.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(caller,), daemon=True).start()

    def _serve(self, caller: socket.socket) -> None:
        head = b""
        while b"\r\n\r\n" not in head:
            data = caller.recv(65536)
            if not data:
                return caller.close()
            head += data
        line = re.match(rb"(\w+) " + re.escape(self._path) + rb"(/\S*) ", head)
        if line is None:
            caller.sendall(b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
            return caller.close()
        head = line[1] + b" " + line[2] + b" " + head[line.end() :]
        if b"upgrade: websocket" not in head.lower():
            # One request a connection: what follows would carry the path again.
            head = re.sub(rb"(?i)\r\nconnection: [^\r]*", b"", head).replace(b"\r\n", b"\r\nConnection: close\r\n", 1)
        server = socket.create_connection(("127.0.0.1", self._behind))
        server.sendall(head)
        threading.Thread(target=_pour, args=(caller, server), daemon=True).start()
        return _pour(server, caller)

    def close(self) -> None:
        self._listening.close()


def _pour(source: socket.socket, sink: socket.socket) -> None:
    try:
        while data := source.recv(65536):
            sink.sendall(data)
    except OSError:
        pass
    finally:
        for end in (source, sink):
            end.close()
