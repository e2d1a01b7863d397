"""TLS of a gateway's listeners: certificate, key and client CA from files, read again when they change."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Any

import grpc

from recsys.core import BadInput, logging, metrics
from recsys.serving.config import ServingConfig, TlsConfig
from recsys.serving.server import on_loopback

_log = logging.get_logger(__name__)
_Stamps = tuple[tuple[int, int, int], ...]


def credentials_for(listen: str, serving: ServingConfig, tls: TlsConfig) -> grpc.ServerCredentials | None:
    """What a listener at HOST:PORT proves itself with; None = plain text.

    Raises: BadInput for an address beyond loopback that has neither TLS nor the word that it may be without, and for
    files that cannot be read, do not parse or do not belong together.
    """
    if tls.cert_file is not None:
        return Files(tls).credentials()
    if on_loopback(listen) or serving.plain_text_beyond_loopback:
        return None
    raise BadInput(
        f"--listen {listen}",
        came="an address that other hosts reach, without TLS",
        expected="[serving.tls] cert_file and key_file, or a word that plain text is meant",
        fix="Set both files, listen on 127.0.0.1, or, where the network is trusted (a mesh, a network policy), set "
        "[serving] plain_text_beyond_loopback = true or pass --plain-text.",
    )


class Files:
    """The files of [serving.tls]. gRPC asks before each handshake; what has changed by then serves from then on."""

    def __init__(self, config: TlsConfig) -> None:
        """config: with a certificate. Raises: BadInput."""
        assert config.cert_file is not None, "only then is there TLS"
        assert config.key_file is not None, "the section checks that they come together"
        self._cert, self._key, self._ca = config.cert_file, config.key_file, config.client_ca_file
        self._stamps = self._stamped()
        self._loaded = self._load()

    def credentials(self) -> grpc.ServerCredentials:
        """For `add_secure_port`; with a client CA, callers must show a certificate that it signed."""
        has_ca = self._ca is not None
        changed: Any = self._changed  # None for "as it is" is gRPC's word, which its types have forgotten
        found: grpc.ServerCredentials = grpc.dynamic_ssl_server_credentials(self._loaded, changed, has_ca)
        return found

    def _changed(self) -> grpc.ServerCertificateConfiguration | None:
        """New files, if they are whole: in the middle of a rotation the old ones serve on."""
        try:
            if (stamps := self._stamped()) == self._stamps:
                return None
            loaded = self._load()
            if self._stamped() != stamps:  # replaced while we read: the next handshake finds them whole
                return None
        except BadInput as error:
            _log.warning("tls_reload_failed", cause=str(error))
            metrics.TLS_RELOADS.labels("failed").inc()
            return None
        self._stamps = stamps
        _log.info("tls_reloaded", certificate=str(self._cert))
        metrics.TLS_RELOADS.labels("done").inc()
        return loaded

    def _load(self) -> grpc.ServerCertificateConfiguration:
        """Checked by the TLS library of Python: gRPC would only say that the port cannot be bound."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        cert, key = _read(self._cert, "cert_file"), _read(self._key, "key_file")
        try:
            context.load_cert_chain(self._cert, self._key, password=b"")  # else OpenSSL asks on the terminal
        except (ssl.SSLError, ValueError) as error:
            raise _unfit(f"{self._cert} and {self._key}", error, "a certificate chain and its key, in PEM") from error
        ca = None
        if self._ca is not None:
            ca = _read(self._ca, "client_ca_file")
            try:
                context.load_verify_locations(self._ca)
            except ssl.SSLError as error:
                raise _unfit(str(self._ca), error, "certificates of authorities, in PEM") from error
        return grpc.ssl_server_certificate_configuration([(key, cert)], ca)

    def _stamped(self) -> _Stamps:
        paths = [p for p in (self._cert, self._key, self._ca) if p is not None]
        try:
            found = [p.stat() for p in paths]
        except OSError as error:
            raise _unreadable(str(error.filename), error) from error
        return tuple((s.st_ino, s.st_mtime_ns, s.st_size) for s in found)


def _read(path: Path, key: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _unreadable(f"{path} ({key})", error) from error


def _unreadable(what: str, error: OSError) -> BadInput:
    return BadInput(
        f"[serving.tls] {what}",
        came=error.strerror or type(error).__name__,
        expected="a file that this process may read",
        fix="Correct the path or the file's mode.",
    )


def _unfit(what: str, error: Exception, expected: str) -> BadInput:
    return BadInput(
        f"[serving.tls] {what}",
        came=str(error) or type(error).__name__,
        expected=f"{expected}, the key without a passphrase",
        fix="Write the files anew from one issue of the certificate; openssl x509 -in FILE -text shows what is in one.",
    )
