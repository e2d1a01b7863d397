"""The console's HTTP server: loopback by default, GET only, three paths.

/             the page, refreshed by the browser
/status.json  the gateway's GetStatus, for scripts
/replay       report.html of the replay report
"""

from __future__ import annotations

import asyncio
import json
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from double11.v1 import admin_pb2 as pb
from google.protobuf.json_format import MessageToJson

from recsys.console.page import render
from recsys.core import BadInput, Double11Error, Unavailable, logging
from recsys.serving.client import AdminClient
from recsys.serving.config import ClientConfig

_ADMIN_S_MAX = 2.0
_REQUEST_S_MAX = 10.0
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
_log = logging.get_logger(__name__)


class Console:
    """A server over one gateway's AdminService and one replay report. Use `serve_forever` and `close`."""

    def __init__(self, listen: str, target: str, report: Path | None, client: ClientConfig | None = None) -> None:
        """Bind. target: HOST:PORT of the AdminService. report: folder that `double11 replay --out` wrote.
        client: how to reach the gateway.

        Raises: BadInput for an address that is not HOST:PORT; Unavailable when it is taken.
        """
        host, colon, port = listen.rpartition(":")
        if not (host and colon and port.isdigit() and int(port) < 65_536):
            raise BadInput("--listen", came=listen, expected="HOST:PORT", fix="Write e.g. 127.0.0.1:8011.")
        self.target, self.report, self._client = target, report, client
        handler = type("Handler", (_Handler,), {"console": self})
        try:
            self._http = ThreadingHTTPServer((host, int(port)), handler)
        except OSError as error:
            raise Unavailable(
                f"--listen {listen}", came=str(error), expected="a free address", fix="Choose another."
            ) from error
        self._http.daemon_threads = True
        self.address = f"{host}:{self._http.server_address[1]}"

    def serve_forever(self) -> None:
        """Answer until `close`."""
        self._http.serve_forever()

    def close(self) -> None:
        """Stop answering and give the port back."""
        self._http.shutdown()
        self._http.server_close()

    def status(self) -> pb.GetStatusResponse:
        """Ask the gateway. Raises: Unavailable, DeadlineExceeded."""

        async def asked() -> pb.GetStatusResponse:
            async with AdminClient(self.target, self._client, timeout_s=_ADMIN_S_MAX) as client:
                return await client.status()

        return asyncio.run(asked())

    def page(self) -> str:
        """The page as it is now."""
        try:
            status: pb.GetStatusResponse | str = self.status()
        except Double11Error as error:
            status = str(error)
        return render(self.target, status, self._replay())

    def _replay(self) -> dict[str, Any] | str:
        if self.report is None:
            return "none given: double11 console --report DIR"
        try:
            document = json.loads((self.report / "report.json").read_text("utf-8"))
        except (OSError, ValueError) as error:
            return f"{self.report / 'report.json'}: {error}"
        return document if isinstance(document, dict) else f"{self.report / 'report.json'}: not a report"


class _Handler(BaseHTTPRequestHandler):
    """One request."""

    console: Console
    timeout = _REQUEST_S_MAX
    server_version, sys_version = "double11", ""

    def do_GET(self) -> None:
        match self.path:
            case "/":
                self._answer(HTTPStatus.OK, "text/html; charset=utf-8", self.console.page())
            case "/status.json":
                self._status()
            case "/replay" if self.console.report and (self.console.report / "report.html").is_file():
                page = (self.console.report / "report.html").read_text("utf-8")
                self._answer(HTTPStatus.OK, "text/html; charset=utf-8", page)
            case _:
                self._answer(
                    HTTPStatus.NOT_FOUND, "text/plain; charset=utf-8", "There is /, /status.json and /replay.\n"
                )

    def _status(self) -> None:
        try:
            body = MessageToJson(self.console.status(), preserving_proto_field_name=True, indent=None)
        except Double11Error as error:
            self._answer(HTTPStatus.SERVICE_UNAVAILABLE, "application/json", json.dumps(error.as_json()))
            return
        self._answer(HTTPStatus.OK, "application/json", body)

    def _answer(self, status: HTTPStatus, content_type: str, text: str) -> None:
        body = text.encode("utf-8")
        self.send_response(status)
        for name, value in {"Content-Type": content_type, "Content-Length": str(len(body)), **_HEADERS}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 (http.server's name)
        _log.debug("console_request", line=format % args)
