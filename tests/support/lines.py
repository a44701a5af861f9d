"""A line between a browser and a server, which goes down where a test wants it to."""

import contextlib
import re
import socket
import threading
from collections.abc import Iterator


class Line:
    """Relays connections to a server on this machine. left: bytes that the server may still say; None for no limit.

    Once they are said every connection is cut, and so is each new one until `left` is None again; at once, if it is
    `short`. unlucky: matches requests, of which the first gets an answer that is cut in its last header.
    """

    def __init__(
        self, server_port: int, left: int | None = None, short: bool = False, unlucky: str | None = None
    ) -> None:
        self.left, self._short = left, short
        self._unlucky, self._doomed = unlucky, None
        self._server_port = server_port
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                browser, _ = self._listener.accept()
                if self.left == 0:
                    browser.close()
                else:
                    self._connect(browser)

    def _connect(self, browser: socket.socket) -> None:
        server = socket.create_connection(("127.0.0.1", self._server_port))
        self._open |= {browser, server}
        for source, target, limited in ((browser, server, False), (server, browser, True)):
            threading.Thread(target=self._relay, args=(source, target, limited), daemon=True).start()

    def _relay(self, source: socket.socket, target: socket.socket, limited: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65_536):
                if not limited and self._unlucky and re.match(self._unlucky, data.decode("latin-1")):
                    self._unlucky, self._doomed = None, target
                if source is self._doomed:
                    target.sendall(data.partition(b"\r\n\r\n")[0])
                    break
                target.sendall(self._allowed(data) if limited else data)
                if limited and self.left == 0:
                    self.cut()
                    if self._short:
                        self.left = None
        for each in (source, target):
            self._end(each)

    def _allowed(self, data: bytes) -> bytes:
        with self._lock:
            if self.left is None:
                return data
            data = data[: self.left]
            self.left -= len(data)
            return data

    def cut(self) -> None:
        for each in list(self._open):
            self._end(each)

    def _end(self, each: socket.socket) -> None:
        with contextlib.suppress(OSError):
            each.shutdown(socket.SHUT_RDWR)
        each.close()
        self._open.discard(each)

    def close(self) -> None:
        self._listener.close()
        self.cut()


@contextlib.contextmanager
def line_to(
    address: str, left: int | None = None, short: bool = False, unlucky: str | None = None
) -> Iterator[tuple[Line, str]]:
    """A line to the server at an address, and its own address."""
    line = Line(int(address.rstrip("/").rpartition(":")[2]), left, short, unlucky)
    try:
        yield line, f"http://127.0.0.1:{line.port}/"
    finally:
        line.close()
