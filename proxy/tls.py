"""A non-blocking TLS client with the few methods of a socket that the relay uses.

It drives an `ssl.SSLObject` over memory buffers. `ssl.SSLSocket` was rejected: it can't send close_notify without
reading from the kernel in the same call, which loses data that is on its way, so it has no half close; and it waits for
writability in a read, or the other way round, where this has one place for bytes that the kernel has not taken.
"""

from __future__ import annotations

import contextlib
import socket
import ssl

#: The most that one TLS record holds (RFC 8446 section 5.1).
RECORD = 16 * 1024
#: How much is read from or encrypted for the kernel at a time. OpenSSL keeps buffers of this size for each session.
CHUNK = 2 * RECORD
#: The least room that `recv_into` needs: whatever has arrived is decrypted at once.
ROOM = CHUNK + RECORD

_cipher = memoryview(bytearray(CHUNK))


class TlsSocket:
    """TLS on a connected, non-blocking socket, which it owns from now on. For one thread (they share a buffer).

    Where a socket would raise BlockingIOError, so do these methods; then readability is what to wait for, and
    writability as well while `unsent`.
    """

    __slots__ = ("_ended", "_from_peer", "_sock", "_tls", "_to_peer", "_unsent")

    def __init__(self, sock: socket.socket, context: ssl.SSLContext, name: str) -> None:
        self._sock = sock
        self._from_peer, self._to_peer = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._from_peer, self._to_peer, server_hostname=name)
        self._unsent = b""
        self._ended = False

    @property
    def unsent(self) -> bool:
        """Whether encrypted bytes wait for the kernel; `flush` when it is writable."""
        return bool(self._unsent)

    @property
    def ended(self) -> bool:
        """Whether the peer has ended its direction; the next `recv_into` says so too."""
        return self._ended

    def fileno(self) -> int:
        """The file number of the socket below."""
        return self._sock.fileno()

    def setsockopt(self, level: int, option: int, value: bytes) -> None:
        """Like socket.setsockopt."""
        self._sock.setsockopt(level, option, value)

    def close(self) -> None:
        """Close the socket below at once."""
        self._sock.close()

    def do_handshake(self) -> None:
        """Go on with the handshake; it is done when this returns.

        Raises:
            BlockingIOError: not yet.
            OSError: the certificate is not what it should be (ssl.SSLError), or the connection failed.
        """
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                self.flush()
                self._fill()
                if self._ended:
                    raise ConnectionResetError("closed during the TLS handshake") from None
            except ssl.SSLError:
                with contextlib.suppress(OSError):
                    self.flush()  # the alert tells the peer why
                raise
            else:
                self.flush()  # our last message
                return

    def recv_into(self, buffer: memoryview) -> int:
        """Decrypt what has arrived, as much as fits; 0 at the end. The buffer must have ROOM bytes.

        A connection that ends without close_notify just ends: WebSocket frames have lengths of their own.
        """
        count = 0
        while not self._ended and len(buffer) - count >= ROOM:
            try:
                filled = self._fill()
            except BlockingIOError:
                break
            count = self._decrypt(buffer, count)
            if filled < CHUNK:
                break
        if self._to_peer.pending:  # an answer to a key update (RFC 8446 section 4.6.3)
            with contextlib.suppress(BlockingIOError):
                self.flush()
        if not count and not self._ended:
            raise BlockingIOError
        return count

    def send(self, data: bytes | memoryview) -> int:
        """Encrypt and send; return how many bytes were taken. Up to CHUNK of them may still be `unsent`."""
        if self._unsent:
            self.flush()
        taken = 0
        while taken < len(data) and not self._unsent:
            taken += self._tls.write(data[taken : taken + CHUNK])
            with contextlib.suppress(BlockingIOError):
                self.flush()
        return taken

    def flush(self) -> None:
        """Hand encrypted bytes to the kernel.

        Raises:
            BlockingIOError: it did not take all of them.
        """
        self._unsent += self._to_peer.read()
        if self._unsent:
            self._unsent = self._unsent[self._sock.send(self._unsent) :]
            if self._unsent:
                raise BlockingIOError

    def end_writing(self) -> None:
        """Half close: tell the peer that nothing more comes (close_notify), and read on."""
        # OpenSSL sends it and then looks for the peer's, which is not here: nothing undecrypted is ever left.
        with contextlib.suppress(ssl.SSLWantReadError):
            self._tls.unwrap()
        with contextlib.suppress(BlockingIOError):
            self.flush()

    def _fill(self) -> int:
        count = self._sock.recv_into(_cipher)
        self._ended = not count
        self._from_peer.write(_cipher[:count])
        return count

    def _decrypt(self, buffer: memoryview, count: int) -> int:
        try:
            # With a buffer it returns a count, which its type does not know. The peer's close_notify is a count of 0,
            # or, when ours has been sent before, an SSLZeroReturnError.
            while got := int(self._tls.read(len(buffer) - count, buffer[count:])):
                count += got
                # Asking once more would say the same by an exception, which costs more than all the rest.
                if not self._from_peer.pending and not self._tls.pending():
                    return count
        except ssl.SSLWantReadError:
            return count
        except ssl.SSLZeroReturnError:
            pass
        self._ended = True
        return count
