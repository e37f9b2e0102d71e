"""The Redis store over TLS, with real certificates: who is believed, and what is said of who is not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import redis

from knell.errors import InvalidSettings, StoreUnavailable
from knell.settings import Rules
from knell.stores.redis import RedisStore
from tests.certificates import Authority
from tests.servers import RedisServer, free_port, start_redis

pytestmark = pytest.mark.redis


@dataclass
class Secured:
    """A server that asks for certificates, at `port`, and the certificates."""

    server: RedisServer
    port: int
    authority: Authority
    other: Authority
    client: Path

    def open(self, *options: str, host: str = "127.0.0.1", scheme: str = "rediss") -> RedisStore:
        url = f"{scheme}://{host}:{self.port}/0?{'&'.join(options)}"
        return RedisStore(url, namespace="knell", rules=Rules())

    @property
    def ca(self) -> str:
        return f"ssl_ca_certs={self.authority.path}"

    @property
    def own(self) -> tuple[str, str]:
        return f"ssl_certfile={self.client}", f"ssl_keyfile={self.client.with_suffix('.key')}"

    def present(self, certificate: Path) -> None:
        """Let the server have another certificate."""
        with redis.Redis(port=self.server.port) as client:
            client.execute_command(
                "CONFIG", "SET", "tls-cert-file", str(certificate), "tls-key-file", str(certificate.with_suffix(".key"))
            )


@pytest.fixture(scope="module")
def module_secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    directory = tmp_path_factory.mktemp("tls")
    authority, other = Authority(directory, "authority"), Authority(directory, "other-authority")
    certificate, port = authority.sign("server", hosts=("127.0.0.1", "redis.example")), free_port()
    server = start_redis(
        directory / "redis",
        extra=["--tls-port", str(port), "--tls-cert-file", str(certificate), "--tls-key-file",
               str(certificate.with_suffix(".key")), "--tls-ca-cert-file", str(authority.path)],
    )  # fmt: skip
    yield Secured(server, port, authority, other, authority.sign("client"))
    server.kill()


@pytest.fixture
def secured(module_secured: Secured) -> Iterator[Secured]:
    """The server as it was at first, whatever a test has made of it."""
    yield module_secured
    module_secured.present(module_secured.authority.path.with_name("server.pem"))


@pytest.fixture
def refused(secured: Secured) -> Callable[..., str]:
    """Opens a store with options, and returns what is said when it is used."""

    def text(*options: str, **more: str) -> str:
        store = secured.open(*options, **more)
        with pytest.raises(StoreUnavailable) as caught:
            store.head()
        store.close()
        return str(caught.value)

    return text


def test_a_server_with_a_certificate_is_believed(secured: Secured) -> None:
    """The right authority and the right name, and a certificate of one's own, are all it takes."""
    store = secured.open(secured.ca, *secured.own)
    assert store.head().position == 0
    assert store.warnings() == []
    store.close()


def test_an_authority_that_is_not_known_is_refused(secured: Secured, refused: Callable[..., str]) -> None:
    """By default a certificate has to be signed by an authority that the system, or the URL, names."""
    assert "CERTIFICATE_VERIFY_FAILED" in refused(*secured.own)
    assert "CERTIFICATE_VERIFY_FAILED" in refused(f"ssl_ca_certs={secured.other.path}", *secured.own)


def test_another_host_name_is_refused(secured: Secured, refused: Callable[..., str]) -> None:
    """A certificate for another name is another's; asked for by name, names are not looked at."""
    assert "Hostname mismatch" in refused(secured.ca, *secured.own, host="localhost")
    store = secured.open(secured.ca, *secured.own, "ssl_check_hostname=no", host="localhost")
    assert store.head().position == 0
    assert "check of certificates" in store.warnings()[0]
    store.close()


def test_an_expired_certificate_is_refused(secured: Secured, refused: Callable[..., str]) -> None:
    """A server whose certificate has run out is not believed any more."""
    secured.present(secured.authority.sign("expired", hosts=("127.0.0.1",), days=-1))
    assert "certificate has expired" in refused(secured.ca, *secured.own)


def test_a_client_without_a_certificate_is_refused(secured: Secured, refused: Callable[..., str]) -> None:
    """The server wants to know who comes (tls-auth-clients): none, and another authority's, are refused by it."""
    stranger = secured.other.sign("stranger")
    for own in ((), (f"ssl_certfile={stranger}", f"ssl_keyfile={stranger.with_suffix('.key')}")):
        assert f"127.0.0.1:{secured.port}" in refused(secured.ca, *own)


def test_a_check_is_switched_off_by_name_alone(secured: Secured) -> None:
    """ssl_cert_reqs=none believes anybody, and an operator is told so."""
    store = secured.open(*secured.own, "ssl_cert_reqs=none", host="localhost")
    assert store.head().position == 0
    assert "check of certificates" in store.warnings()[0]
    store.close()


@pytest.mark.parametrize("option", ["ssl_ca_certs", "ssl_ca_path", "ssl_certfile", "ssl_keyfile"])
def test_a_file_that_is_not_there_is_named(secured: Secured, option: str) -> None:
    """A wrong path is a setting to change, and the text says which."""
    with pytest.raises(InvalidSettings, match=f"{option} is '/no/such/file'"):
        secured.open(f"{option}=/no/such/file")


def test_a_plain_connection_to_it_is_an_error(secured: Secured, refused: Callable[..., str]) -> None:
    """redis:// where rediss:// belongs fails in time."""
    assert "did not answer or refused" in refused(scheme="redis")
