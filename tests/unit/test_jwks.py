"""Keys by URL, from a real HTTP server: fetched once, kept when it fails, and never replaced by an attacker's."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from structlog.testing import capture_logs

from knell import InvalidSettings, JwksUrl, KeysUnavailable, TokenInvalid, Verifier
from knell.jwks_client import MAX_BYTES
from knell.keys import SigningKey
from tests.jwks_server import JwksServer, Tls, drip, send
from tests.unit.memory_feed import MemoryFeed, eventually
from tests.unit.tokens_for_tests import claims, verifier

OLD, NEW, STRANGER = (SigningKey.generate() for _ in range(3))
EC, RSA = SigningKey.generate("ES256"), SigningKey.generate("RS256")


def token(key: SigningKey = OLD, **header: Any) -> str:
    """A good token by that key; a header that is `...` is left out."""
    headers = {name: value for name, value in ({"kid": key.kid} | header).items() if value is not ...}
    return jwt.encode(claims(), key.key, key.algorithm, headers=headers)


@pytest.fixture
def server() -> Iterator[JwksServer]:
    with JwksServer({"keys": [OLD.public_jwk()]}) as server:
        yield server


@pytest.fixture
def follow(server: JwksServer) -> Iterator[Callable[..., Verifier]]:
    """Makes verifiers by that server's URL, and closes them."""
    made: list[Verifier] = []

    def _make(*, algorithms: Any = ("EdDSA",), feed: MemoryFeed | None = None, **options: Any) -> Verifier:
        source = JwksUrl(options.pop("url", server.url), **options)
        made.append(verifier(feed, keys=source, algorithms=list(algorithms)))
        return made[-1]

    yield _make
    for one in made:
        one.close()


def accepts(one: Verifier, presented: str) -> bool:
    """Whether a token is accepted; KeysUnavailable comes out."""
    try:
        one.verify(presented)
    except TokenInvalid:
        return False
    return True


# ---- the ordinary course


def test_a_token_is_checked_with_the_published_key(server: JwksServer, follow: Callable[..., Verifier]) -> None:
    """One fetch serves every token; the token's ref has the kid of the key that verified it, header or not."""
    one = follow()
    for presented in (token(), token(), token(kid=...)):
        assert one._decoder.decode(presented)[1].kid == OLD.kid
        assert one.verify(presented) == claims()
    assert server.requests == ["/jwks.json"]


def test_several_keys_and_no_kid(server: JwksServer, follow: Callable[..., Verifier]) -> None:
    """With several keys a token has to name its own."""
    server.publishes(OLD.public_jwk(), NEW.public_jwk())
    one = follow()
    assert accepts(one, token(OLD))
    assert accepts(one, token(NEW))
    assert not accepts(one, token(OLD, kid=...))


def test_a_key_without_a_kid_is_called_by_its_thumbprint(server: JwksServer, follow: Callable[..., Verifier]) -> None:
    """RFC 7638 names what nobody has named."""
    server.publishes({name: value for name, value in OLD.public_jwk().items() if name != "kid"})
    one = follow()
    assert one._decoder.decode(token(kid=...))[1].kid == OLD.kid


def test_wait_ready_waits_for_the_keys(server: JwksServer, follow: Callable[..., Verifier]) -> None:
    """A verifier is ready when its keys are there as well as its denylist."""
    server.gate.clear()
    one = follow(timeout_seconds=20.0)
    assert not one.wait_ready(0.2)
    server.gate.set()
    assert one.wait_ready(20)
    assert accepts(one, token())


def test_https_with_an_authority(tmp_path: Path, follow: Callable[..., Verifier]) -> None:
    """A server whose certificate the given authority has signed is believed; by the system's authorities it is not."""
    tls = Tls(tmp_path)
    with JwksServer({"keys": [OLD.public_jwk()]}, tls=tls) as server:
        assert accepts(follow(url=server.url, ssl_context=tls.client), token())
        with pytest.raises(KeysUnavailable, match="certificate"):
            follow(url=server.url).verify(token())
        assert server.requests == ["/jwks.json"]


def test_headers_are_sent(follow: Callable[..., Verifier]) -> None:
    """What the server asks for can be sent along."""
    seen: list[str | None] = []
    with JwksServer({"keys": [OLD.public_jwk()]}) as server:
        good = server._answer

        def look(request: Any) -> None:
            seen.append(request.headers["X-Key"])
            good(request)

        server.does(look)
        assert accepts(follow(url=server.url, headers={"X-Key": "k"}), token())
    assert seen == ["k"]


# ---- unknown kids


def test_a_new_key_is_found_with_one_fetch(server: JwksServer, follow: Callable[..., Verifier]) -> None:
    """A token of a key that was published a moment ago is accepted, after a fetch, once the cooldown is over."""
    now = [1000.0]
    one = follow(cooldown_seconds=30.0, monotonic=lambda: now[0])
    assert accepts(one, token(OLD))
    server.publishes(OLD.public_jwk(), NEW.public_jwk())
    now[0] += 29.9
    assert not accepts(one, token(NEW))
    assert len(server.requests) == 1
    now[0] += 0.2
    assert accepts(one, token(NEW))
    assert len(server.requests) == 2


def test_unknown_kids_cause_one_fetch_in_each_cooldown(server: JwksServer, follow: Callable[..., Verifier]) -> None:
    """Whatever kids attackers make up, at once or one after the other, and whether or not the server answers."""
    now = [1000.0]
    one = follow(cooldown_seconds=30.0, monotonic=lambda: now[0])
    assert accepts(one, token(OLD))
    forged = [token(STRANGER, kid=f"made up {n}") for n in range(40)]
    for fetches, answer in ((2, send(b"no", 500)), (3, None)):
        if answer is not None:
            server.does(answer)
        now[0] += 31.0
        with ThreadPoolExecutor(8) as threads:
            assert not any(threads.map(lambda presented: accepts(one, presented), forged))
        assert len(server.requests) == fetches
    assert accepts(one, token(OLD))


def test_those_who_wait_share_a_fetch_and_the_others_do_not_wait(
    server: JwksServer, follow: Callable[..., Verifier]
) -> None:
    """While a new key is looked up, tokens of known keys pass, and all that name the new key get its one answer."""
    now = [1000.0]
    one = follow(timeout_seconds=20.0, cooldown_seconds=1.0, monotonic=lambda: now[0])
    assert accepts(one, token(OLD))
    now[0] += 2.0
    server.gate.clear()
    server.publishes(OLD.public_jwk(), NEW.public_jwk())
    with ThreadPoolExecutor(6) as threads:
        waiting = [threads.submit(accepts, one, token(NEW)) for _ in range(6)]
        eventually(lambda: server.waiting == 1)
        assert accepts(one, token(OLD))
        assert not any(each.done() for each in waiting)
        server.gate.set()
        assert all(each.result(20) for each in waiting)
    assert len(server.requests) == 2


def test_an_event_loop_is_not_held_up(server: JwksServer, follow: Callable[..., Verifier]) -> None:
    """On an event loop the look-up is begun, and the caller told to try again; then the key is there."""
    now = [1000.0]
    one = follow(cooldown_seconds=1.0, monotonic=lambda: now[0])
    assert accepts(one, token(OLD))
    now[0] += 2.0
    server.gate.clear()
    server.publishes(OLD.public_jwk(), NEW.public_jwk())

    async def request() -> bool:
        return accepts(one, token(NEW))

    with pytest.raises(KeysUnavailable, match="try again"):
        asyncio.run(request())
    server.gate.set()
    assert eventually(lambda: len(server.requests) == 2 and _quietly(one, token(NEW)))


def _quietly(one: Verifier, presented: str) -> bool:
    try:
        return accepts(one, presented)
    except KeysUnavailable:
        return False


# ---- what goes wrong with the server


def test_a_warm_verifier_waits_for_no_fetch(server: JwksServer, follow: Callable[..., Verifier]) -> None:
    """Keys are fetched anew before their lifespan is over; a server that hangs then holds no request up."""
    one = follow(lifespan_seconds=0.2, timeout_seconds=20.0, max_age_seconds=1e6)
    assert accepts(one, token())
    eventually(lambda: len(server.requests) >= 4)
    server.gate.clear()
    eventually(lambda: server.waiting == 1)
    assert accepts(one, token())
    assert server.waiting == 1


def test_old_keys_are_kept_on_failure_up_to_their_age(server: JwksServer, follow: Callable[..., Verifier]) -> None:
    """While the server fails the last keys count, until they are too old; the trouble is logged once, and its end."""
    now = [1000.0]
    with capture_logs() as logs:
        one = follow(lifespan_seconds=0.05, cooldown_seconds=0.05, max_age_seconds=3600.0, monotonic=lambda: now[0])
        assert accepts(one, token())
        server.does(send(b"down", 503))
        eventually(lambda: [each for each in logs if each["event"] == "jwks_not_fetched"])
        before = len(server.requests)
        eventually(lambda: len(server.requests) >= before + 3)
        now[0] += 3599.0
        assert accepts(one, token())
        now[0] += 2.0
        with pytest.raises(KeysUnavailable, match=r"3601 s old.*status 503"):
            one.verify(token())
        server.publishes(OLD.public_jwk())
        assert eventually(lambda: _quietly(one, token()))
        eventually(lambda: [each for each in logs if each["event"] == "jwks_answers_again"])
    assert len([each for each in logs if each["event"] == "jwks_not_fetched"]) == 1


def test_a_server_that_was_never_there(follow: Callable[..., Verifier]) -> None:
    """Without any key no token is judged: the error says that it is not the token's fault, and waits only at first."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        one = follow(url=f"http://127.0.0.1:{probe.getsockname()[1]}/", timeout_seconds=0.3)
        for _ in range(20):
            with pytest.raises(KeysUnavailable, match="no keys were fetched"):
                one.verify(token())


PAUSE = threading.Event()
HEADER = {"Location": "/elsewhere.json"}
ODD: dict[str, tuple[Any, str]] = {
    "moved permanently": (send(b"", 301, **HEADER), "redirects"),
    "found": (send(b"", 302, **HEADER), "redirects"),
    "see other": (send(b"", 303, **HEADER), "redirects"),
    "temporary redirect": (send(b"", 307, **HEADER), "redirects"),
    "permanent redirect": (send(b"", 308, **HEADER), "redirects"),
    "ten megabytes": (send(b'{"keys": [' + b" " * 10_000_000 + b"]}"), f"longer than {MAX_BYTES} bytes"),
    "endless": (drip(b'{"keys": [' + b" " * 65_536, PAUSE, seconds=0.0), f"longer than {MAX_BYTES} bytes"),
    "a byte at a time": (drip(b" ", PAUSE), "timed out"),
    "a byte of the header at a time": (drip(b"X", PAUSE, in_header=True), "timed out"),
    "garbage": (send(b"\x00\xff garbage"), "no JSON"),
    "deep": (send(b"[" * 100_000), "no JSON"),
    "a list": (send(b"[]"), "JSON object"),
    "no keys": (send(b"{}"), "no JWK Set"),
    "keys is text": (send(b'{"keys": "x"}'), "no JWK Set"),
    "empty": (send(b'{"keys": []}'), "no public key"),
    "nothing": (send(b""), "no JSON"),
    "no content": (send(b"", 204), "status 204"),
    "not found": (send(b"{}", 404), "status 404"),
    "no HTTP": (lambda request: request.wfile.write(b"SSH-2.0-OpenSSH\r\n"), "no answer"),
    "hangs up": (lambda request: request.connection.close(), "no answer"),
}


@pytest.mark.parametrize("name", ODD)
def test_a_server_that_misbehaves_changes_nothing(
    server: JwksServer, follow: Callable[..., Verifier], name: str
) -> None:
    """No redirect is followed, no answer is read beyond its bounds, and the old keys stay."""
    answer, said = ODD[name]
    one = follow(lifespan_seconds=0.05, timeout_seconds=0.5, max_age_seconds=600.0)
    assert eventually(lambda: _quietly(one, token()))
    with capture_logs() as logs:
        server.does(answer)
        (told,) = eventually(lambda: [each for each in logs if each["event"] == "jwks_not_fetched"])[:1]
    assert said in told["error"]
    assert accepts(one, token())
    assert set(server.requests) == {"/jwks.json"}


def test_a_server_that_does_not_answer_is_given_up(server: JwksServer, follow: Callable[..., Verifier]) -> None:
    """One that takes the connection and says nothing is a failure as well, and the next fetch succeeds."""
    server.gate.clear()
    one = follow(timeout_seconds=0.3, cooldown_seconds=0.1)
    with pytest.raises(KeysUnavailable):
        one.verify(token())
    server.gate.set()
    assert eventually(lambda: _quietly(one, token()))


# ---- attackers


def _raw(key: SigningKey) -> bytes:
    public: bytes = key.verifying_key.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return public


def _hmac(header: dict[str, Any], secret: bytes) -> str:
    """HS256 by hand: PyJWT refuses a PEM as a secret, which an attacker does not."""
    import hashlib
    import hmac

    parts = [jwt.utils.base64url_encode(json.dumps(each).encode()) for each in (header, claims())]
    signed = b".".join(parts)
    return (signed + b"." + jwt.utils.base64url_encode(hmac.new(secret, signed, hashlib.sha256).digest())).decode()


def _forged(url: str) -> dict[str, str]:
    mine = STRANGER.public_jwk()
    return {
        "alg none": jwt.encode(claims(), "", algorithm="none", headers={"kid": OLD.kid}),
        "HS256 with the public key": _hmac({"alg": "HS256", "kid": OLD.kid}, _raw(OLD)),
        "HS256 with the JWK's x": _hmac({"alg": "HS256", "kid": OLD.kid}, OLD.public_jwk()["x"].encode()),
        "a stranger under a known kid": token(STRANGER, kid=OLD.kid),
        "a stranger without kid": token(STRANGER, kid=...),
        "its own key in jwk": token(STRANGER, kid=..., jwk=mine),
        "its own key in jwk, with a known kid": token(STRANGER, kid=OLD.kid, jwk=mine),
        "its own URL in jku": token(STRANGER, jku=url),
        "its own URL in x5u": token(STRANGER, x5u=url),
        "its own certificate in x5c": token(STRANGER, x5c=["AAAA"]),
        "crit": jwt.encode(claims(), OLD.key, "EdDSA", headers={"kid": OLD.kid, "crit": ["exp"], "exp": 1}),
        "another algorithm's key": token(EC),
        "kid is a path": token(STRANGER, kid="../../dev/null"),
    }


@pytest.mark.parametrize("name", _forged(""))
def test_forgeries_are_refused(server: JwksServer, follow: Callable[..., Verifier], name: str) -> None:
    """What a token says of keys and algorithms is not believed, and nobody connects to where it points."""
    with JwksServer({"keys": [STRANGER.public_jwk()]}) as theirs:
        one = follow()
        with pytest.raises(TokenInvalid):
            one.verify(_forged(theirs.url)[name])
        assert accepts(one, token(OLD, jku=theirs.url))
        assert theirs.requests == []


def _without_alg(key: SigningKey, **changes: Any) -> dict[str, Any]:
    return {name: value for name, value in key.public_jwk().items() if name != "alg"} | changes


SECRET = b"a secret that somebody has published by mistake"
OCT = {"kty": "oct", "kid": "oct", "k": jwt.utils.base64url_encode(SECRET).decode()}


@pytest.mark.parametrize(
    ("published", "presented"),
    [
        (OCT, _hmac({"alg": "HS256", "kid": "oct"}, SECRET)),
        (OCT | {"alg": "HS256"}, _hmac({"alg": "HS256", "kid": "oct"}, SECRET)),
        (NEW.public_jwk() | {"use": "enc"}, token(NEW)),
        (_without_alg(NEW, use=None, key_ops=["sign", "encrypt"]), token(NEW)),
        (NEW.public_jwk() | {"key_ops": "verify"}, token(NEW)),
        (NEW.private_jwk(), token(NEW)),
        (NEW.public_jwk() | {"alg": "ES256"}, token(NEW)),
        (NEW.public_jwk() | {"alg": ["EdDSA"]}, token(NEW)),
        (NEW.public_jwk() | {"kid": 5}, token(NEW, kid=...)),
        (NEW.public_jwk() | {"kid": ""}, token(NEW, kid=...)),
        (NEW.public_jwk() | {"x": "AA"}, token(NEW)),
        (EC.public_jwk(), token(EC)),
        (_without_alg(EC), token(EC)),
        (_without_alg(RSA), token(RSA)),
    ],
)
def test_a_key_that_is_not_for_this_is_never_used(
    server: JwksServer, follow: Callable[..., Verifier], published: dict[str, Any], presented: str
) -> None:
    """Secrets, private keys, keys for something else or for another algorithm are left out, and the others count."""
    server.publishes(published, OLD.public_jwk())
    one = follow()
    assert accepts(one, token(OLD))
    with pytest.raises(TokenInvalid):
        one.verify(presented)


def test_a_published_secret_is_an_error_in_the_log(server: JwksServer, follow: Callable[..., Verifier]) -> None:
    """Once, with the kid, and without the secret."""
    server.publishes(NEW.private_jwk(), OLD.public_jwk())
    with capture_logs() as logs:
        one = follow(lifespan_seconds=0.05, max_age_seconds=60.0)
        assert accepts(one, token(OLD))
        eventually(lambda: len(server.requests) >= 4)
    (told,) = [each for each in logs if each["event"] == "jwks_key_ignored"]
    assert told["kid"] == NEW.kid
    assert NEW.private_jwk()["d"] not in json.dumps(logs)


def test_a_kid_of_two_keys_names_none(server: JwksServer, follow: Callable[..., Verifier]) -> None:
    """Which of them was meant nobody knows. The same key twice is one key."""
    server.publishes(OLD.public_jwk(), NEW.public_jwk() | {"kid": OLD.kid}, EC.public_jwk(), EC.public_jwk())
    one = follow(algorithms=["EdDSA", "ES256"])
    assert accepts(one, token(EC))
    assert not accepts(one, token(OLD))
    assert not accepts(one, token(NEW, kid=OLD.kid))


def test_another_key_under_the_same_kid(server: JwksServer, follow: Callable[..., Verifier]) -> None:
    """The set is believed as it is now: the new key counts from the next fetch on, and the old one no longer."""
    one = follow(lifespan_seconds=0.1, max_age_seconds=60.0)
    assert accepts(one, token(OLD))
    assert not accepts(one, token(NEW, kid=OLD.kid))
    server.publishes(NEW.public_jwk() | {"kid": OLD.kid})
    assert eventually(lambda: accepts(one, token(NEW, kid=OLD.kid)))
    assert not accepts(one, token(OLD))


def test_a_key_without_alg_fits_by_its_kind_and_curve(server: JwksServer, follow: Callable[..., Verifier]) -> None:
    """The verifier's algorithms decide, among those that the key can be used with."""
    server.publishes(_without_alg(RSA), _without_alg(EC), _without_alg(OLD))
    one = follow(algorithms=["PS256", "RS256", "ES384", "ES256", "EdDSA"])
    assert all(accepts(one, token(key)) for key in (RSA, EC, OLD))
    assert accepts(one, jwt.encode(claims(), RSA.key, "PS256", headers={"kid": RSA.kid}))


def test_a_key_that_was_taken_out_is_refused_from_the_next_fetch_on(
    server: JwksServer, follow: Callable[..., Verifier]
) -> None:
    """What the issuer does not publish any more does not count."""
    server.publishes(OLD.public_jwk(), NEW.public_jwk())
    one = follow(lifespan_seconds=0.1, max_age_seconds=60.0)
    assert accepts(one, token(OLD))
    server.publishes(NEW.public_jwk())
    assert eventually(lambda: not accepts(one, token(OLD)))
    assert accepts(one, token(NEW))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"url": "http://auth.example/jwks.json"}, "allow_http"),
        ({"url": "http://127.0.0.1.evil.example/"}, "allow_http"),
        ({"url": "http://localhost.evil.example/"}, "allow_http"),
        ({"url": "file:///etc/passwd"}, "scheme 'file'"),
        ({"url": "ftp://127.0.0.1/x"}, "scheme 'ftp'"),
        ({"url": "data:application/json,{}"}, "scheme 'data'"),
        ({"url": "https:///jwks.json"}, "https://HOST/PATH"),
        ({"url": "https://user:password@auth.example/"}, "headers="),
        ({"url": "https://auth.example:port/"}, "cannot be read"),
        ({"url": None}, "NoneType"),
        ({"timeout_seconds": 0.0}, "timeout_seconds is 0.0"),
        ({"cooldown_seconds": -1.0}, "cooldown_seconds is -1.0"),
        ({"lifespan_seconds": float("nan")}, "lifespan_seconds is nan"),
        ({"max_age_seconds": 1.0}, "less than lifespan_seconds"),
    ],
)
def test_where_keys_are_not_taken_from(given: dict[str, Any], said: str) -> None:
    """A URL or a time that is not safe is refused when it is given, and no password is shown."""
    with pytest.raises(InvalidSettings) as refused:
        JwksUrl(**{"url": "https://auth.example/jwks.json"} | given)
    assert said in str(refused.value)
    assert "password@" not in str(refused.value)


def test_http_from_elsewhere_has_to_be_asked_for() -> None:
    """Plain http to another host only by name; this host needs no word."""
    JwksUrl("http://auth.example/jwks.json", allow_http=True)
    for host in ("127.0.0.1", "localhost", "[::1]", "127.8.9.10"):
        JwksUrl(f"http://{host}:8000/jwks.json")


def test_no_hmac_with_published_keys(server: JwksServer) -> None:
    """A verifier of HMAC tokens does not take keys that everybody knows."""
    with pytest.raises(InvalidSettings, match="HS256"):
        verifier(keys=JwksUrl(server.url), algorithms=["HS256"])


def test_a_proxy_is_not_asked_for_this_host(server: JwksServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the environment says of proxies is for other hosts."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.delenv("no_proxy", raising=False)
    with verifier(keys=JwksUrl(server.url)) as one:
        assert accepts(one, token())


# ---- processes and threads


def test_a_fork_keeps_the_keys_and_follows_them_by_itself(server: JwksServer, follow: Callable[..., Verifier]) -> None:
    """A child checks with the parent's keys at once, and learns of new ones with a thread of its own."""
    one = follow(lifespan_seconds=0.2, max_age_seconds=60.0)
    assert accepts(one, token(OLD))
    server.publishes(OLD.public_jwk(), NEW.public_jwk())
    pid = os.fork()
    if pid == 0:  # pragma: no cover
        deadline = time.monotonic() + 20
        good = accepts(one, token(OLD))
        while good and not _quietly(one, token(NEW)) and time.monotonic() < deadline:
            time.sleep(0.01)
        os._exit(0 if good and _quietly(one, token(NEW)) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert eventually(lambda: _quietly(one, token(NEW)))


def test_a_verifier_that_was_closed_does_not_end_the_keys_of_another(
    server: JwksServer, follow: Callable[..., Verifier]
) -> None:
    """A source may serve several verifiers; it goes on for those that are left."""
    source = JwksUrl(server.url, lifespan_seconds=0.1, max_age_seconds=60.0)
    with verifier(keys=source) as one, verifier(keys=source) as other:
        assert accepts(one, token(OLD))
        assert accepts(other, token(OLD))
        other.close()
        server.publishes(NEW.public_jwk())
        assert eventually(lambda: accepts(one, token(NEW)))
    eventually(lambda: not [each for each in threading.enumerate() if each.name == "knell-jwks"])


def test_a_verifier_that_is_never_used_asks_for_nothing(server: JwksServer) -> None:
    """Made at import, it opens nothing."""
    with verifier(keys=JwksUrl(server.url)):
        pass
    assert server.requests == []
