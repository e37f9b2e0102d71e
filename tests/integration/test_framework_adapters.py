"""The adapters for JWT libraries that people run already, and Django's sessions, by their examples on real servers."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import httpx
import jwt
import pytest

from knell import TokenRef
from knell.store import open_store
from tests.deployment import until
from tests.frameworks import EXAMPLES, Home, accepted, get, run_django, send, serve_asgi, serve_wsgi


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    """One issuer, and one store, for all of them."""
    made = Home(tmp_path_factory.mktemp("adapters"))
    yield made
    made.issuer.close()


def _claims(token: str) -> dict[str, object]:
    found: dict[str, object] = jwt.decode(token, options={"verify_signature": False})
    return found


def _tracked(home: Home, token: str) -> TokenRef | None:
    """What the store keeps of a token, which is asked for by taking it out."""
    settings = home.issuer._settings
    store = open_store(settings.store_url, namespace=settings.namespace, rules=settings.rules)
    try:
        claims = _claims(token)
        found = store.detach(str(claims["iss"]), str(claims["jti"]), revocation_id="asked").ref
        store.attach(str(claims["iss"]), str(claims["jti"]), revocation_id="asked")
        return found
    finally:
        store.close()


# ---- flask-jwt-extended


def test_flask_jwt_extended(home: Home) -> None:
    """A login is tracked, a logout refuses every token of that session and of no other, with 401 invalid_token."""
    with home.loaded("with_flask_jwt_extended") as names, serve_wsgi(names["app"]) as url:
        alice, other = (send("POST", f"{url}/login/alice").text for _ in range(2))
        tracked = _tracked(home, alice)
        assert tracked is not None
        assert (tracked.sub, tracked.sid) == ("alice", _claims(alice)["sid"])
        assert accepted(f"{url}/me", alice).text == "alice"
        assert send("POST", f"{url}/logout", alice).text == "bye"
        refused = until(lambda: found if (found := get(f"{url}/me", alice)).status_code == 401 else None)
        assert 'error="invalid_token"' in refused.headers["www-authenticate"]
        assert (refused.json()["msg"], alice in refused.text) == ("Token revoked", False)
        assert get(f"{url}/me", other).status_code == 200
        home.issuer.revoke("subject", {"sub": "alice"})
        until(lambda: get(f"{url}/me", other).status_code == 401)


def test_flask_jwt_extended_with_a_stale_denylist(home: Home) -> None:
    """When nobody can tell whether a token was revoked, it is 503 with Retry-After, by the verifier's policy."""
    with home.loaded("with_flask_jwt_extended") as names:
        token = names["app"].test_client().post("/login/alice").text
    away = {"KNELL_STORE_URL": "redis://127.0.0.1:1/0"}
    with home.loaded("with_flask_jwt_extended", **away) as names, serve_wsgi(names["app"]) as url:
        stale = get(f"{url}/me", token)
        assert (stale.status_code, stale.headers["retry-after"]) == (503, "5")


# ---- fastapi-users


def test_fastapi_users(home: Home) -> None:
    """A login is tracked, a logout ends that session and no other, and whoever logs in again is let in."""
    with home.loaded("with_fastapi_users") as names, serve_asgi(names["app"]) as url:

        def login(name: str) -> str:
            form = {"username": f"{name}@shop.example", "password": f"{name}'s password"}
            return str(send("POST", f"{url}/login", data=form).raise_for_status().json()["access_token"])

        alice, other = login("alice"), login("alice")
        tracked = _tracked(home, alice)
        assert tracked is not None
        assert (tracked.sub, tracked.sid) == (_claims(alice)["sub"], _claims(alice)["sid"])
        assert accepted(f"{url}/me", alice).json() == "alice@shop.example"
        assert send("POST", f"{url}/logout", alice).status_code == 204
        until(lambda: get(f"{url}/me", alice).status_code == 401)
        assert get(f"{url}/me", other).status_code == 200
        assert get(f"{url}/me", login("alice")).status_code == 200
        home.issuer.revoke("subject", {"sub": str(tracked.sub)}, iss="https://auth.example")
        until(lambda: get(f"{url}/me", other).status_code == 401)
        assert get(f"{url}/me", login("bob")).json() == "bob@shop.example"


def test_fastapi_users_with_store_and_broker_away(home: Home) -> None:
    """A login that nobody would be told the end of is 503 with Retry-After."""
    away = {"KNELL_STORE_URL": "redis://127.0.0.1:1/0", "KNELL_BROKER_URL": "amqp://127.0.0.1:1/"}
    with home.loaded("with_fastapi_users", **away) as names, serve_asgi(names["app"]) as url:
        form = {"username": "alice@shop.example", "password": "alice's password"}
        answer = send("POST", f"{url}/login", data=form)
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")


# ---- Django's sessions


@pytest.mark.parametrize("asgi", [False, True])
def test_django_sessions(home: Home, asgi: bool) -> None:
    """A session that was opened with a token is anonymous once the token's session is revoked; another one is not."""
    with (
        run_django(home, "with_django_sessions", asgi=asgi) as url,
        httpx.Client(base_url=url, trust_env=False) as alice,
        httpx.Client(base_url=url, trust_env=False) as bob,
    ):
        for client, name in ((alice, "alice"), (bob, "bob")):
            assert client.post("/login").status_code == 401
            token = home.token(sub=name, sid=f"session-of-{name}-{asgi}")
            accepted(f"{url}/login", token)
            assert client.post("/login", headers={"Authorization": f"Bearer {token}"}).text == "welcome"
            assert client.get("/me").text == name
        before = alice.cookies["sessionid"]
        home.issuer.revoke("session", {"sid": f"session-of-alice-{asgi}"})
        until(lambda: alice.get("/me").text == "nobody")
        assert bob.get("/me").text == "bob"
        # The old cookie opens nothing any more.
        assert httpx.get(f"{url}/me", cookies={"sessionid": before}, trust_env=False).text == "nobody"


# In a process of its own: Django's settings are there once in a process.
BIND = """
import time
from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from django.http import HttpRequest
from django.test import override_settings
from knell import Settings, Verifier
from knell.errors import StoreUnavailable
from knell.keys import SigningKey

class Index:
    added, away = [], False

    def add(self, session_key, token):
        if self.away:
            raise StoreUnavailable("the index is away")
        self.added.append((session_key, token))

index = Index()
verifier = Verifier(SigningKey.generate(), algorithms=["EdDSA"], issuer="i", audience=None, settings=Settings())
settings.configure(SESSION_ENGINE="django.contrib.sessions.backends.cache",
                   KNELL={"VERIFIER": verifier, "SESSIONS": index})
from django.contrib.sessions.backends.cache import SessionStore
from knell.integrations.django import BearerMiddleware, EndedSessionMiddleware, bind_session

claims = {"iss": "i", "jti": "j", "exp": 2e9, "sub": "alice", "sid": "s", "email": "alice@shop.example"}
request = HttpRequest()
request.session = SessionStore()
token = bind_session(request, claims)
key = request.session.session_key
assert index.added == [(key, token)] and (token.sid, token.sub) == ("s", "alice")
assert SessionStore(key)["knell.token"] == {name: claims[name] for name in ("iss", "jti", "exp", "sub", "sid")}

index.away = True
try:
    bind_session(request, claims)
except StoreUnavailable:
    assert request.session.session_key is None and not SessionStore(key).exists(key)
else:
    raise AssertionError("bound to nothing")

key = SigningKey.generate()
away = Settings(store_url="redis://127.0.0.1:1/0")
stale = Verifier(key, algorithms=["EdDSA"], issuer="i", audience=None, settings=away, start_wait_seconds=0)
with override_settings(KNELL={"VERIFIER": stale}):
    for made in (BearerMiddleware, EndedSessionMiddleware):
        request = HttpRequest()
        request.META["HTTP_AUTHORIZATION"] = "Bearer " + key.sign(claims | {"exp": int(time.time()) + 60}, typ="JWT")
        request.session = {"knell.token": claims}
        answer = made(lambda request: None)(request)
        assert (answer.status_code, answer["Retry-After"]) == (503, "5"), answer.content
stale.close()

for wrong, said in (({"VERIFYER": verifier}, "VERIFYER"), ({}, "must be a knell.Verifier"),
                    ({"VERIFIER": verifier, "EXEMPT": "/health"}, "not one string")):
    with override_settings(KNELL=wrong):
        try:
            BearerMiddleware(lambda request: None)
        except ImproperlyConfigured as error:
            assert said in str(error), error
        else:
            raise AssertionError(said)
print("all is well")
"""


def test_bind_session_tells_the_index(home: Home) -> None:
    """The index gets the session's key and token; without it the session is no more. A stale denylist is 503 in both
    kinds of middleware, and wrong settings are told."""
    command = [sys.executable, "-W", "error", "-c", BIND]
    done = subprocess.run(command, env=home.environ(), cwd=home.directory, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.strip()) == (0, "all is well"), done.stderr


# ---- djangorestframework-simplejwt


@pytest.fixture(scope="module")
def simplejwt(home: Home) -> Iterator[str]:
    """The URL of its example, with a user alice."""
    made = (
        "from django.core.management import call_command; call_command('migrate', verbosity=0); "
        "from django.contrib.auth.models import User; "
        "[User.objects.create_user(name, password='secret') for name in ('alice', 'bob')]"
    )
    subprocess.run(
        [sys.executable, str(EXAMPLES / "with_simplejwt.py"), "shell", "-c", made],
        cwd=home.directory,
        env=home.environ(),
        check=True,
        timeout=60,
    )
    with run_django(home, "with_simplejwt") as url:
        yield url


def _login(url: str, name: str = "alice") -> dict[str, str]:
    given = {"username": name, "password": "secret"}
    found: dict[str, str] = send("POST", f"{url}/login", json=given).raise_for_status().json()
    accepted(f"{url}/me", found["access"])
    return found


def test_simplejwt_tracks_what_it_issues(simplejwt: str, home: Home) -> None:
    """A login is one session, by sid, sub and auth_time, in both tokens; both are tracked. A refresh carries it on, and
    its rotation ends the old refresh token alone."""
    pair = _login(simplejwt)
    access, refresh = _claims(pair["access"]), _claims(pair["refresh"])
    for name in ("iss", "sid", "sub", "auth_time", "user_id"):
        assert access[name] == refresh[name]
    for token in pair.values():
        tracked = _tracked(home, token)
        assert tracked is not None
        assert (tracked.sid, tracked.sub, tracked.exp) == (access["sid"], access["user_id"], _claims(token)["exp"])
    assert accepted(f"{simplejwt}/me", pair["access"]).json() == "alice"
    again = send("POST", f"{simplejwt}/refresh", json={"refresh": pair["refresh"]}).raise_for_status().json()
    for token in again.values():
        assert _tracked(home, token) is not None
        assert (_claims(token)["sid"], _claims(token)["auth_time"]) == (access["sid"], access["auth_time"])
    until(lambda: send("POST", f"{simplejwt}/refresh", json={"refresh": pair["refresh"]}).status_code == 401)
    for token in (pair["access"], again["access"]):
        assert get(f"{simplejwt}/me", token).status_code == 200
    assert send("POST", f"{simplejwt}/refresh", json={"refresh": again["refresh"]}).status_code == 200


def test_simplejwt_logout_ends_the_session(simplejwt: str) -> None:
    """`blacklist` refuses every token of the session at once, with 401 invalid_token, and of no other session."""
    pair, other = _login(simplejwt), _login(simplejwt)
    assert get(f"{simplejwt}/me").headers["www-authenticate"] == 'Bearer realm="api"'
    assert get(f"{simplejwt}/me", pair["refresh"]).status_code == 401  # no access token
    assert send("POST", f"{simplejwt}/verify", json={"token": pair["access"]}).status_code == 200
    assert send("POST", f"{simplejwt}/logout", json={"refresh": pair["refresh"]}).status_code == 200
    refused = until(lambda: found if (found := get(f"{simplejwt}/me", pair["access"])).status_code == 401 else None)
    assert refused.headers["www-authenticate"].startswith('Bearer realm="api", error="invalid_token"')
    assert refused.json()["code"] == "token_not_valid"
    assert pair["access"] not in refused.text
    for path, body in (("refresh", {"refresh": pair["refresh"]}), ("verify", {"token": pair["access"]})):
        assert send("POST", f"{simplejwt}/{path}", json=body).status_code == 401
    assert get(f"{simplejwt}/me", other["access"]).status_code == 200


def test_simplejwt_and_a_revoked_user(simplejwt: str, home: Home) -> None:
    """A subject's revocation refuses its sessions so far, refreshed or not; a new login is let in."""
    pair = _login(simplejwt, "bob")
    home.issuer.revoke("subject", {"sub": str(_claims(pair["access"])["sub"])}, reason="lost phone")
    until(lambda: get(f"{simplejwt}/me", pair["access"]).status_code == 401)
    assert send("POST", f"{simplejwt}/refresh", json={"refresh": pair["refresh"]}).status_code == 401
    assert get(f"{simplejwt}/me", _login(simplejwt, "bob")["access"]).status_code == 200


def test_simplejwt_and_a_revoked_key(simplejwt: str, home: Home) -> None:
    """Its tokens name no key, and there is only one: once that is revoked they are refused, and no new one is made."""
    pair = _login(simplejwt)
    tracked = _tracked(home, pair["access"])
    assert tracked is not None
    assert tracked.kid is not None
    revoked = home.issuer.revoke("key", {"kid": tracked.kid})
    assert revoked.sessions
    until(lambda: get(f"{simplejwt}/me", pair["access"]).status_code == 401)
    assert send("POST", f"{simplejwt}/login", json={"username": "bob", "password": "secret"}).status_code == 401
    home.issuer.undo(revoked.id)
    until(lambda: get(f"{simplejwt}/me", pair["access"]).status_code == 200)


FORGOTTEN = """
from django.core.exceptions import ImproperlyConfigured
from rest_framework_simplejwt.settings import api_settings
from rest_framework_simplejwt.tokens import AccessToken
from knell.integrations.simplejwt import JWTAuthentication

api_settings.AUTH_TOKEN_CLASSES = (AccessToken,)  # simplejwt's default
try:
    JWTAuthentication().get_validated_token(str(AccessToken()).encode())
except ImproperlyConfigured as error:
    print(error)
"""


def test_simplejwt_with_token_classes_that_ask_no_denylist(home: Home) -> None:
    """Without AUTH_TOKEN_CLASSES every revoked token would be accepted, and nobody would see it: that is an error."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "with_simplejwt.py"), "shell", "-c", FORGOTTEN],
        cwd=home.directory,
        env=home.environ(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "AUTH_TOKEN_CLASSES'] has AccessToken, which accepts revoked tokens" in done.stdout, done.stderr
