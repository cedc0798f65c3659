"""The listener's certificate, followed when its files change: handshakes after that show the new one, streams go on."""

from __future__ import annotations

import logging
from pathlib import Path

from proxy.settings import TlsSettings
from proxy.tls import expiry_unix_s, said, server_context

log = logging.getLogger(__name__)


class Certificate:
    """`context` is for the next handshake. Raises OSError if the files can't be used at the beginning."""

    def __init__(self, tls: TlsSettings) -> None:
        self._tls = tls
        self._files = (Path(tls.certificate), Path(tls.key))
        self._seen = self._look()
        self.context = server_context(tls)
        self.expires_unix_s = self._expiry()

    def poll(self) -> None:
        """Look whether the files were replaced; if they can't be used, the former certificate stays."""
        seen = self._look()
        if seen == self._seen:
            return
        self._seen = seen
        try:
            self.context = server_context(self._tls)
        except OSError as error:
            log.error("the new certificate can't be used; the former one stays", extra={"error": said(error)})
            return
        self.expires_unix_s = self._expiry()
        log.info("new certificate", extra={"expires_unix_s": self.expires_unix_s})

    def _look(self) -> list[tuple[int, int, int] | None]:
        return [_identity(file) for file in self._files]

    def _expiry(self) -> int:
        """0 if it can't be told."""
        try:
            return expiry_unix_s(self._files[0])
        except (OSError, ValueError, IndexError) as error:
            log.warning("when the certificate expires can't be told", extra={"error": str(error)})
            return 0


def _identity(file: Path) -> tuple[int, int, int] | None:
    try:
        stat = file.stat()
    except OSError:
        return None  # in the moment of being replaced, or for good: what is in use stays in use
    return stat.st_ino, stat.st_mtime_ns, stat.st_size
