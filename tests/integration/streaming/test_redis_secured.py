"""A Redis behind TLS that knows its users: rediss:// with an ACL user, a password file and an authority of its own.

A redis-server built with TLS listens itself; before another one stands a forwarder that ends TLS, as stunnel would.
"""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from certificates import Authority
from redis_world import Forwarder, Server

from recsys.bench.servers import free_ports
from recsys.cli.main import run
from recsys.data import Dataset, simulate

SECRET = "correct-horse-battery"


@pytest.fixture(scope="module")
def authority(tmp_path_factory) -> Authority:
    return Authority(tmp_path_factory.mktemp("papers"))


@pytest.fixture(scope="module")
def server(tmp_path_factory, used_server) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("redis"))
    client = server.client
    used_server("redis", f"Redis {client.info('server')['redis_version']}, behind TLS")
    client.execute_command("ACL SETUSER", "shop", "on", f">{SECRET}", "~*", "&*", "+@all")
    client.execute_command("ACL SETUSER", "default", "off")
    yield server
    server.stop()


@pytest.fixture
def double11(monkeypatch, capfd, tmp_path, authority):
    """Run a command as user shop; gives its exit code, its document, and all that it wrote."""
    password = tmp_path / "password"
    password.write_text(f"{SECRET}\n")

    def call(*args: object, **settings: object) -> tuple[int, dict, str]:
        files = {"ca_file": authority.ca_file, "password_file": password, "timeout_s": 5} | settings
        for name, value in files.items():
            monkeypatch.setenv(f"DOUBLE11__FEATURE_STORE__REDIS__{name.upper()}", str(value))
        code, written = run([*map(str, args), "--json"]), capfd.readouterr()
        return code, json.loads(written.out.splitlines()[-1]), written.out + written.err

    return call


@contextlib.contextmanager
def listening(server: Server, cert_file: Path, key_file: Path) -> Iterator[int]:
    """A port that speaks TLS with these papers."""
    shop = redis.Redis(port=server.port, username="shop", password=SECRET)
    if not shop.config_get("tls-port"):
        with Forwarder(server.port, cert_file, key_file) as forwarder:
            yield forwarder.port
        return
    (port,) = free_ports(1)
    files = {"tls-cert-file": cert_file, "tls-key-file": key_file, "tls-ca-cert-file": cert_file}
    settings = files | {"tls-auth-clients": "no", "tls-port": port}
    shop.execute_command("CONFIG SET", *(str(word) for setting in settings.items() for word in setting))
    yield port
    shop.config_set("tls-port", 0)


def test_features_are_written_and_read_over_tls_as_a_user_of_the_servers(server, authority, double11, tmp_path):
    simulate("tiny", 3, tmp_path / "tiny")
    user, log = Dataset.open(tmp_path / "tiny").events()["user_id"][-1], f"embedded:{tmp_path / 'log'}"
    with listening(server, *authority.issue("server")) as port:
        store = f"rediss://shop@127.0.0.1:{port}"
        commands = (
            ("streaming", "init", "--log", log),
            ("produce", tmp_path / "tiny", "--sink", log),
            ("ingest", "--source", log, "--store", store, "--until-caught-up"),
            ("features", "get", "--store", store, "--user", user),
        )
        answers = [double11(*command) for command in commands]
    assert [code for code, _, _ in answers] == [0] * 4, answers
    assert answers[-1][1]["entities"][0]["features"]["view_count_all"]["status"] == "PRESENT"
    assert SECRET not in "".join(written for _, _, written in answers)


@pytest.mark.parametrize("wrong", ["password", "user", "authority", "expired"])
def test_who_is_not_let_in_is_told_why_and_the_secret_is_not(server, authority, double11, tmp_path, wrong):
    settings = {}
    if wrong == "password":
        settings["password_file"] = tmp_path / "wrong"
        settings["password_file"].write_text(f"{SECRET}-not")
    elif wrong == "authority":
        settings["ca_file"] = Authority(tmp_path, "stranger").ca_file
    login = "nobody" if wrong == "user" else "shop"
    with listening(server, *authority.issue(f"server-{wrong}", expired=wrong == "expired")) as port:
        store = f"rediss://{login}@127.0.0.1:{port}"
        code, answer, written = double11("features", "get", "--store", store, "--user", "u", **settings)
    assert code == 2, written
    assert {"authority": "issuer", "expired": "expired"}.get(wrong, "invalid username-password") in written
    assert "ca_file" in answer["error"]["fix"] or "password_file" in answer["error"]["fix"]
    assert SECRET not in written
