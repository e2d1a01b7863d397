"""The console over HTTP, against a real AdminService and without one."""

import json
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path

import grpc
import pytest
from double11.v1 import admin_pb2 as pb
from double11.v1 import admin_pb2_grpc as pb_grpc

from recsys.console import Console, render
from recsys.core import BadInput, Unavailable

EVIL = "<script>alert('x')</script>"


class Admin(pb_grpc.AdminServiceServicer):
    def GetStatus(self, request: pb.GetStatusRequest, context: grpc.ServicerContext) -> pb.GetStatusResponse:  # noqa: N802
        return pb.GetStatusResponse(
            state="serving",
            uptime_s=61,
            in_flight_requests=3,
            in_flight_limit=16,
            versions={"run": EVIL},
            responses_by_tier={"full": 90, "rank": 10},
            parts=[pb.PartStatus(name="reranker", state="down", detail=EVIL)],
        )


@pytest.fixture(scope="module")
def admin() -> Iterator[str]:
    server = grpc.server(futures.ThreadPoolExecutor(2))
    pb_grpc.add_AdminServiceServicer_to_server(Admin(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None)


def serve(console: Console) -> threading.Thread:
    thread = threading.Thread(target=console.serve_forever)
    thread.start()
    return thread


def get(console: Console, path: str) -> tuple[int, str, dict[str, str]]:
    try:
        with urllib.request.urlopen(f"http://{console.address}{path}", timeout=10) as answer:
            return answer.status, answer.read().decode(), dict(answer.headers)
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode(), dict(error.headers)


@pytest.fixture
def report(tmp_path: Path) -> Path:
    arms = {"full": {"ndcg@10": 0.4, "recall@10": 0.2, "fallbacks": 0}, EVIL: {"ndcg@10": 0.1}}
    (tmp_path / "report.json").write_text(json.dumps({"task": "all", "queries": 766, "arms": arms}))
    (tmp_path / "report.html").write_text("<!doctype html><title>Replay</title>")
    return tmp_path


@pytest.fixture
def console(admin: str, report: Path) -> Iterator[Console]:
    console = Console("127.0.0.1:0", admin, report)
    thread = serve(console)
    yield console
    console.close()
    thread.join(10)


def test_page_shows_gateway_tiers_parts_and_replay_escaped(console: Console) -> None:
    status, page, headers = get(console, "/")
    assert status == 200
    for text in ("serving, up 61 s", "3 of 16", "reranker", "<td>90</td>", "0.4000", "766"):
        assert text in page
    assert EVIL not in page
    assert page.count("&lt;script&gt;") == 3
    assert "default-src 'none'" in headers["Content-Security-Policy"]


def test_status_json_and_report_page(console: Console) -> None:
    status, body, _ = get(console, "/status.json")
    assert (status, json.loads(body)["state"]) == (200, "serving")
    assert get(console, "/replay")[:2] == (200, "<!doctype html><title>Replay</title>")


@pytest.mark.parametrize("path", ["/etc/passwd", "/../report.json", "/replay/../../x", "/?x"])
def test_nothing_else_is_served(console: Console, path: str) -> None:
    assert get(console, path)[0] == 404


def test_only_get(console: Console) -> None:
    request = urllib.request.Request(f"http://{console.address}/", data=b"x", method="POST")
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=10)
    assert refused.value.code == 501


def test_page_says_what_is_missing() -> None:
    console = Console("127.0.0.1:0", "127.0.0.1:1", None)
    thread = serve(console)
    try:
        status, page, _ = get(console, "/")
        assert status == 200
        assert "127.0.0.1:1" in page
        assert "double11 console --report DIR" in page
        assert get(console, "/status.json")[0] == 503
        assert get(console, "/replay")[0] == 404
    finally:
        console.close()
        thread.join(10)


def test_broken_report_is_said(tmp_path: Path, admin: str) -> None:
    (tmp_path / "report.json").write_text("{")
    console = Console("127.0.0.1:0", admin, tmp_path)
    assert "report.json" in str(console._replay())
    (tmp_path / "report.json").write_text("[]")
    assert "not a report" in str(console._replay())
    console._http.server_close()


def test_a_gateway_without_answers_yet() -> None:
    assert "none yet" in render("t", pb.GetStatusResponse(state="starting"), "none")


@pytest.mark.parametrize("listen", ["nonsense", ":80", "127.0.0.1:", "127.0.0.1:99999"])
def test_bad_addresses_are_refused(listen: str) -> None:
    with pytest.raises(BadInput, match="HOST:PORT"):
        Console(listen, "t", None)


def test_taken_address_is_said() -> None:
    first = Console("127.0.0.1:0", "t", None)
    with pytest.raises(Unavailable, match="free address"):
        Console(first.address, "t", None)
    first._http.server_close()
