"""Listeners with certificates: who may talk, what is said of files that do not fit, and rotation under load."""

import os
import shutil

import grpc
import pytest
from certificates import Authority
from grpc_health.v1 import health_pb2, health_pb2_grpc

from recsys.core import BadInput
from recsys.serving.config import ServingConfig, TlsConfig
from recsys.serving.server import Server
from recsys.serving.tls import credentials_for

ANYWHERE = "0.0.0.0:0"


@pytest.fixture
def authority(tmp_path) -> Authority:
    return Authority(tmp_path / "ca")


async def asked(port: int, ca_file=None, shown=None) -> int:
    """Health as a client sees it that trusts `ca_file` and shows a certificate; opens a connection of its own."""
    if ca_file is None:
        channel = grpc.aio.insecure_channel(f"localhost:{port}", options=(("grpc.use_local_subchannel_pool", 1),))
    else:
        cert, key = (p.read_bytes() for p in shown) if shown else (None, None)
        trusted = grpc.ssl_channel_credentials(ca_file.read_bytes(), key, cert)
        channel = grpc.aio.secure_channel(
            f"localhost:{port}", trusted, options=(("grpc.use_local_subchannel_pool", 1),)
        )
    async with channel:
        stub = health_pb2_grpc.HealthStub(channel)
        return (await stub.Check(health_pb2.HealthCheckRequest(), timeout=20)).status


async def refused(port: int, *args) -> str:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await asked(port, *args)
    return caught.value.code().name


@pytest.fixture
async def listen():
    servers = []

    async def started(config: TlsConfig) -> int:
        server = Server(1.0)
        servers.append(server)
        port = await server.start(ANYWHERE, [], credentials_for(ANYWHERE, ServingConfig(), config))
        await server.set_serving(True)
        return port

    yield started
    for server in servers:
        await server.drain()


async def test_only_who_trusts_the_authority_and_speaks_tls_is_answered(listen, authority, tmp_path):
    cert_file, key_file = authority.issue("gateway")
    port = await listen(TlsConfig(cert_file=cert_file, key_file=key_file))
    assert await asked(port, authority.ca_file) == health_pb2.HealthCheckResponse.SERVING
    assert await refused(port) == "UNAVAILABLE"
    assert await refused(port, Authority(tmp_path / "other").ca_file) == "UNAVAILABLE"


async def test_with_a_client_ca_callers_show_who_they_are(listen, authority, tmp_path):
    cert_file, key_file = authority.issue("gateway")
    port = await listen(TlsConfig(cert_file=cert_file, key_file=key_file, client_ca_file=authority.ca_file))
    assert await asked(port, authority.ca_file, authority.issue("storefront"))
    assert await refused(port, authority.ca_file) == "UNAVAILABLE"
    assert await refused(port, authority.ca_file, Authority(tmp_path / "other").issue("stranger")) == "UNAVAILABLE"


async def test_rotated_files_serve_from_the_next_connection_on(listen, authority, tmp_path):
    cert_file, key_file = tmp_path / "tls.crt", tmp_path / "tls.key"

    def place(issued, *targets) -> None:
        for source, target in zip(issued, targets, strict=True):
            shutil.copy(source, target.with_suffix(".new"))
            os.replace(target.with_suffix(".new"), target)

    place(authority.issue("first"), cert_file, key_file)
    port = await listen(TlsConfig(cert_file=cert_file, key_file=key_file))
    assert await asked(port, authority.ca_file)
    newer = Authority(tmp_path / "newer")
    issued = newer.issue("second")
    place(issued[:1], cert_file)  # half of a rotation: certificate and key do not fit
    assert await asked(port, authority.ca_file)
    place(issued, cert_file, key_file)
    assert await asked(port, newer.ca_file)
    assert await refused(port, authority.ca_file) == "UNAVAILABLE"
    cert_file.unlink()
    assert await asked(port, newer.ca_file)


def test_plain_text_beyond_loopback_needs_a_word():
    none = TlsConfig()
    assert credentials_for("127.0.0.1:1", ServingConfig(), none) is None
    assert credentials_for(ANYWHERE, ServingConfig(plain_text_beyond_loopback=True), none) is None
    with pytest.raises(BadInput, match="plain_text_beyond_loopback"):
        credentials_for(ANYWHERE, ServingConfig(), none)


def test_files_that_do_not_fit_are_named_with_the_reason(authority, tmp_path):
    cert_file, key_file = authority.issue("gateway")
    _, other_key = authority.issue("other")
    garbage = tmp_path / "garbage.pem"
    garbage.write_text("no certificate")
    for cert, key, ca, said in (
        (cert_file, other_key, None, "(?i)mismatch"),
        (tmp_path / "absent.pem", key_file, None, "absent.pem.*No such file"),
        (tmp_path, key_file, None, "Is a directory"),
        (garbage, key_file, None, "garbage.pem"),
        (cert_file, key_file, garbage, "garbage.pem"),
    ):
        with pytest.raises(BadInput, match=said):
            credentials_for("127.0.0.1:0", ServingConfig(), TlsConfig(cert_file=cert, key_file=key, client_ca_file=ca))
    for wrong in ({"cert_file": cert_file}, {"key_file": key_file}, {"client_ca_file": authority.ca_file}):
        with pytest.raises(BadInput, match=r"serving\.tls"):
            TlsConfig(**wrong)
