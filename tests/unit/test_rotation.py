"""Keys that rotate: files of private keys, what an issuer signs with, and the commands that change the files."""

from __future__ import annotations

import json
import os
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jwt
import pytest
from structlog.testing import capture_logs

from knell import InvalidClaims, Issuer, JwksUrl, KeyFile, KeyRevoked, Settings, TokenInvalid, TokenRef, Verifier
from knell.errors import InvalidInput, InvalidSettings, MessageRefused
from knell.keyfiles import new_key, trust_key
from knell.keys import ANY_ISSUER, NOTICE_TYPE, SigningKey, TrustList, notice_key, trust_entry
from knell.keyset import SigningKeys
from knell.notices import Cause
from knell.rotation import Rotation, retire, revoke, rotate
from knell.settings import Rules
from knell.tokens import Claims
from tests.commandline import Knell
from tests.jwks_server import JwksServer
from tests.unit.memory_feed import MemoryFeed, eventually

ISS = "https://auth.example"
RULES = Rules()
NOW = 1_700_000_000.0
DAY = 86_400.0


class Place:
    """A folder with a private key and a trust list that has it, and a clock."""

    def __init__(self, directory: Path, private: str = "keys.json") -> None:
        self.private, self.trust = directory / private, directory / "trust.json"
        self.now = NOW
        self.key, _ = new_key(self.private, self.trust, issuers=[ISS], causes=[Cause.REVOKED], now=self.now)
        self.file = KeyFile(self.private, clock=lambda: self.now)

    def rotate(self, after_seconds: float = 3600.0) -> Rotation:
        return rotate(self.private, self.trust, rules=RULES, now=self.now, after_seconds=after_seconds)

    def believes(self, key: SigningKey) -> bool:
        """Whether the trust list takes a message that this key has signed."""
        jws = key.sign({"aud": "knell:t", "iat": 0}, typ=NOTICE_TYPE)
        try:
            TrustList.load(self.trust, clock=lambda: self.now).verify(jws, typ=NOTICE_TYPE, audience="knell:t")
        except MessageRefused:
            return False
        return True


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


# ---- the file


@pytest.mark.parametrize("name", ["keys.json", "key.pem"])
def test_a_rotation_in_time(tmp_path: Path, name: str) -> None:
    """The new key is published and trusted at once, signs from its time on; the old one counts as long as it must."""
    place = Place(tmp_path, name)
    old, made = place.key, place.rotate()
    new = made.new
    assert (place.file.active.kid, set(place.file.keys())) == (old.kid, {old.kid, new.kid})
    assert place.believes(old)
    assert place.believes(new)
    place.now = NOW + 3599.9
    assert place.file.active.kid == old.kid
    place.now = NOW + 3600
    assert place.file.active.kid == new.kid
    place.now = made.published_until - 0.1
    assert place.now == NOW + 3600 + RULES.max_token_seconds + RULES.leeway_seconds - 0.1
    assert set(place.file.keys()) == {old.kid, new.kid}
    place.now = made.published_until
    assert set(place.file.keys()) == {new.kid}
    assert set(place.file.history.keys()) == {old.kid, new.kid}
    assert place.believes(old)
    place.now = NOW + 3600 + RULES.retention_seconds
    assert not place.believes(old)
    assert place.believes(new)


def test_what_is_served_has_no_secret(place: Place) -> None:
    """The public JWK Set has the published keys, and nothing of their private halves."""
    new = place.rotate().new
    served = place.file.jwks()
    assert served == {"keys": [place.key.public_jwk(), new.public_jwk()]}
    assert not any("d" in each or "nbf" in each for each in served["keys"])


@pytest.mark.parametrize("algorithm", ["EdDSA", "ES256", "RS256"])
def test_a_successor_is_of_the_same_kind(tmp_path: Path, algorithm: str) -> None:
    """A key of each algorithm is written, read again, rotated, and signs."""
    private = tmp_path / "keys.json"
    new_key(private, None, issuers=[], causes=[], algorithm=algorithm, now=NOW)
    rotate(private, None, rules=RULES, now=NOW, after_seconds=0)
    file = KeyFile(private, clock=lambda: NOW)
    assert {key.algorithm for key in file.keys().values()} == {algorithm}
    assert file.active.sign({}, typ="JWT")
    assert len(file.jwks()["keys"]) == 2


def test_no_key_is_lost_and_one_that_ended_long_ago_goes(place: Place) -> None:
    """Through many rotations each key stays until no session that it began can be alive."""
    kids = [place.key.kid]
    for _ in range(40):
        kids.append(place.rotate(after_seconds=0).new.kid)
        place.now += DAY
    kept = [each.key.kid for each in place.file.current.keys]
    assert kept == kids[-len(kept) :]
    life = (RULES.max_session_seconds + RULES.max_token_seconds) / DAY
    assert life < len(kept) <= life + 2


def test_a_rotation_that_is_under_way_is_only_brought_forward(place: Place) -> None:
    """A second call makes no third key: it is refused, or lets the waiting key begin earlier."""
    first = place.rotate(after_seconds=3600)
    place.now += 10
    with pytest.raises(InvalidInput, match=r"under way.*3590 s"):
        place.rotate(after_seconds=3600)
    second = place.rotate(after_seconds=0)
    assert second.new.kid == first.new.kid
    assert place.file.active.kid == first.new.kid
    place.now = second.published_until
    assert set(place.file.keys()) == {first.new.kid}
    assert place.believes(place.key)
    place.now = second.trusted_until
    assert not place.believes(place.key)


def test_files_keep_their_mode_and_owner(tmp_path: Path) -> None:
    """A private key is its owner's alone at every moment, whoever runs the command."""
    place = Place(tmp_path, "key.pem")
    assert stat.S_IMODE(place.private.stat().st_mode) == 0o600
    place.private.chmod(0o640)
    if os.geteuid() == 0:
        os.chown(place.private, 12345, 54321)
    before = place.private.stat()
    place.rotate()
    after = place.private.stat()
    assert (after.st_mode, after.st_uid, after.st_gid) == (before.st_mode, before.st_uid, before.st_gid)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["key.pem", "trust.json"]


def test_a_rotation_that_cannot_be_done_changes_nothing(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trust list without the old key, a broken one, a disk that fails in between: both files stay as they were."""
    good = (place.private.read_text(), place.trust.read_text())
    for text in ('{"keys": []}', "nonsense"):
        place.trust.write_text(text)
        with pytest.raises(InvalidInput):
            place.rotate()
        assert (place.private.read_text(), place.trust.read_text()) == (good[0], text)
    place.trust.write_text(good[1])

    real = Path.replace

    def fails(self: Path, target: Path) -> Path:
        if target == place.private:
            raise OSError(28, "No space left on device")
        return real(self, target)

    monkeypatch.setattr(Path, "replace", fails)
    with pytest.raises(InvalidInput, match="No space left"):
        place.rotate()
    assert (place.private.read_text(), place.trust.read_text()) == good
    assert len(list(place.private.parent.iterdir())) == 2


def test_two_rotations_at_the_same_time(place: Place) -> None:
    """One of them is made, the other is told that it is under way."""
    answers: list[object] = []

    def once() -> None:
        try:
            answers.append(place.rotate())
        except InvalidInput as error:
            answers.append(error)

    threads = [threading.Thread(target=once) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len([each for each in answers if isinstance(each, Rotation)]) == 1
    assert len(place.file.keys()) == 2


def test_a_broken_file_keeps_the_keys(place: Place) -> None:
    """Whatever is done to the file while a process runs, the process goes on with the keys that it has, and says so."""
    assert place.file.active.kid == place.key.kid
    for broken in ("{", '{"keys": 5}', '{"keys": ["x"]}', '{"keys": [{"kid": "k", "alg": "EdDSA", "d": "AA"}]}', "PEM"):
        place.private.write_text(broken)
        with capture_logs() as logs:
            assert place.file.active.kid == place.key.kid
            assert place.file.active.kid == place.key.kid
        assert [each["event"] for each in logs] == ["key_file_not_read"]
    place.private.unlink()
    assert place.file.active.kid == place.key.kid


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"alg": "HS256"}, "alg 'HS256'"),
        ({"alg": None}, "alg None"),
        ({"alg": "ES256"}, "no private JWK for ES256"),
        ({"d": ...}, "public key"),
        ({"x": "AA"}, "no private JWK"),
        ({"kid": ...}, "kid"),
        ({"kid": 5}, "kid"),
        ({"nbf": "now"}, "nbf"),
        ({"exp": -1}, "exp"),
    ],
)
def test_files_of_private_keys_that_cannot_be_used(change: dict[str, Any], said: str) -> None:
    """What is wrong is said, with the file's name, and no key is shown."""
    jwk = SigningKey.generate().private_jwk()
    changed = {name: value for name, value in (jwk | change).items() if value is not ...}
    with pytest.raises(InvalidSettings) as refused:
        SigningKeys.parse(json.dumps({"keys": [changed]}), algorithm="EdDSA", name="the file")
    assert said in str(refused.value)
    assert "the file" in str(refused.value)
    assert jwk["d"] not in str(refused.value)


def test_a_kid_twice_or_no_key_at_all() -> None:
    """Which key a kid means has to be clear, and there has to be one that signs."""
    jwk = SigningKey.generate().private_jwk()
    with pytest.raises(InvalidSettings, match="twice"):
        SigningKeys.parse(json.dumps({"keys": [jwk, jwk]}), algorithm="EdDSA", name="f")
    for text in ('{"keys": []}', json.dumps({"keys": [jwk | {"revoked": True}]})):
        with pytest.raises(InvalidSettings, match="no key of f may sign"):
            SigningKeys.parse(text, algorithm="EdDSA", name="f").active(NOW)


def test_before_the_time_of_every_key_the_first_one_signs() -> None:
    """A host whose clock is a little behind does not stop to log people in."""
    keys = [SigningKey.generate().private_jwk() | {"nbf": NOW + n} for n in (5, 9)]
    found = SigningKeys.parse(json.dumps({"keys": keys}), algorithm="EdDSA", name="f")
    assert found.active(NOW).kid == keys[0]["kid"]


# ---- who signs, and who checks


def deployed(settings: Callable[..., Settings], place: Place) -> Settings:
    return settings(notice_key=place.private, trust=place.trust)


@pytest.fixture
def own(tmp_path: Path) -> Place:
    """Keys of now, by the real clock: the store goes by its own."""
    made = Place.__new__(Place)
    made.private, made.trust = tmp_path / "signing.json", tmp_path / "trust.json"
    made.key, _ = new_key(made.private, made.trust, issuers=[ANY_ISSUER], causes=list(Cause))
    made.file = KeyFile(made.private)
    return made


def take_over(place: Place) -> SigningKey:
    """Let a new key sign from now on."""
    return rotate(place.private, place.trust, rules=RULES, now=time.time(), after_seconds=0).new


def test_an_issuer_signs_with_the_key_of_the_moment(settings: Callable[..., Settings], own: Place) -> None:
    """While it runs: new tokens by the new key, and a token of the old one is refreshed; each ref has its key's kid."""
    shared = deployed(settings, own)
    with (
        Issuer(ISS, own.file, settings=shared) as issuer,
        Verifier(own.file, algorithms=["EdDSA"], issuer=ISS, audience="a", settings=shared) as verifier,
    ):
        before = issuer.issue({"sid": "s", "aud": "a"}, ttl_seconds=600)
        new = take_over(own)
        after = issuer.issue({"sid": "s2", "aud": "a"}, ttl_seconds=600)
        again = issuer.refresh(before.token, ttl_seconds=600)
        assert [each.ref.kid for each in (before, after, again)] == [own.key.kid, new.kid, new.kid]
        for each in (before, after, again):
            assert TokenRef.from_claims(verifier.verify(each.token)).kid == each.ref.kid
        assert issuer.track(before.token).ref.kid == own.key.kid


def test_a_key_past_its_time_still_refreshes_and_a_revoked_one_does_not(
    settings: Callable[..., Settings], own: Place
) -> None:
    """A session may go on from a token that ended long ago; nothing goes on from a stolen key."""
    with Issuer(ISS, own.file, settings=deployed(settings, own)) as issuer:
        before = issuer.issue({"sid": "s", "aud": "a"}, ttl_seconds=600)
        take_over(own)
        entries = json.loads(own.private.read_text())["keys"]
        own.private.write_text(json.dumps({"keys": [entries[0] | {"exp": 5}, entries[1]]}))
        assert own.file.keys().keys() == {entries[1]["kid"]}
        assert issuer.refresh(before.token, ttl_seconds=600)
        revoke(None, own.private, own.key.kid, reason=None, now=NOW)
        with pytest.raises(InvalidClaims, match="does not verify"):
            issuer.refresh(before.token, ttl_seconds=600)


@pytest.mark.parametrize("given", ["the token", "what a verifier said of it", "claims with a kid"])
def test_nothing_goes_on_from_a_key_that_verifiers_refuse(
    settings: Callable[..., Settings], own: Place, given: str
) -> None:
    """A revocation by kid alone, with the key still in its file, keeps the new key from signing for the thief."""
    shared = settings()
    with (
        Issuer(ISS, own.file, settings=shared) as issuer,
        Verifier(own.file, algorithms=["EdDSA"], issuer=ISS, audience="a", settings=shared) as verifier,
    ):
        stolen = issuer.issue({"sid": "s", "aud": "a"}, ttl_seconds=600).token
        claims = verifier.verify(stolen)
        take_over(own)
        issuer.revoke("key", {"kid": own.key.kid}, confirm=own.key.kid)
        forms = {"the token": stolen, "what a verifier said of it": claims}
        with pytest.raises(KeyRevoked):
            issuer.refresh(forms.get(given, {**claims, "kid": own.key.kid}), ttl_seconds=600)


def test_the_notice_key_changes_under_an_issuer(settings: Callable[..., Settings], own: Place) -> None:
    """A revocation is signed with the notice key of the moment, whether it is a key of its own or the token key."""
    shared = deployed(settings, own)
    with (
        Issuer(ISS, SigningKey.generate(), settings=shared) as apart,
        Issuer(ISS, own.file, settings=settings(broker_url="amqp://127.0.0.1:1//")) as same,
    ):
        assert (apart._revoker.signing_key.kid, same._revoker.signing_key.kid) == (own.key.kid, own.key.kid)
        new = take_over(own)
        assert (apart._revoker.signing_key.kid, same._revoker.signing_key.kid) == (new.kid, new.kid)
        assert notice_key(shared).kid == new.kid  # type: ignore[union-attr]


def test_foreign_tokens_by_url(settings: Callable[..., Settings]) -> None:
    """An issuer tracks another one's tokens with the keys that the other publishes, through their rotation."""
    old, new = SigningKey.generate(), SigningKey.generate()
    claims = {"iss": "https://other", "sid": "s", "iat": time.time(), "exp": time.time() + 600}
    with JwksServer({"keys": [old.public_jwk()]}) as server:
        keys = JwksUrl(server.url, cooldown_seconds=0.01)
        with Issuer(ISS, settings=settings(), foreign_keys={"https://other": (keys, "EdDSA")}) as issuer:
            assert issuer.track(old.sign(claims | {"jti": "1"}, typ="JWT")).ref.kid == old.kid
            with pytest.raises(InvalidClaims, match="does not verify"):
                issuer.track(new.sign(claims | {"jti": "2"}, typ="JWT"))
            server.publishes(old.public_jwk(), new.public_jwk())
            ref = eventually(lambda: _tracked(issuer, new.sign(claims | {"jti": "2"}, typ="JWT")))
            assert ref.kid == new.kid
        keys.close()


def _tracked(issuer: Issuer, token: str) -> TokenRef | None:
    try:
        return issuer.track(token).ref
    except InvalidClaims:
        return None


def test_the_kid_of_a_token_is_that_of_its_key(settings: Callable[..., Settings]) -> None:
    """However a key was named, whatever the header and the claims say: a revocation by kid finds the token."""
    key, feed = SigningKey.generate(), MemoryFeed(clock=lambda: NOW)
    payload = {"iss": ISS, "aud": "a", "jti": "j", "iat": NOW, "exp": NOW + 60, "kid": "forged"}

    def kid_of(keys: object, **header: str) -> str | None:
        token = jwt.encode(payload, key.key, "EdDSA", headers=header)
        given: dict[str, Any] = {"algorithms": ["EdDSA"], "issuer": ISS, "audience": "a", "clock": lambda: NOW}
        with Verifier(keys, **given, settings=settings(), store=feed) as one:
            claims = one.verify(token)
            assert isinstance(claims, Claims)
            assert one._decoder.reference(claims) == TokenRef.from_claims(claims)
            return TokenRef.from_claims(claims).kid

    jwk = jwt.PyJWK(key.public_jwk() | {"kid": "mine"})
    for keys, named in (({"k1": key.verifying_key}, "k1"), (key, key.kid), (jwk, "mine")):
        assert kid_of(keys) == kid_of(keys, kid=named) == named
        with pytest.raises(TokenInvalid):
            kid_of(keys, kid="another")
    assert kid_of(key.verifying_key) == key.kid
    assert kid_of(key.verifying_key, kid="said") == "said"


# ---- the commands


@pytest.fixture
def knell(settings: Callable[..., Settings]) -> Knell:
    return Knell(settings())


def test_rotate_says_what_happens_when(knell: Knell, tmp_path: Path) -> None:
    """The command makes what `rotate` makes, with the lifetimes of the settings, and shows the times."""
    private, trust = str(tmp_path / "key.pem"), str(tmp_path / "trust.json")
    old = knell("keys", "new", "--private", private, "--trust", trust)["kid"]
    short = {"KNELL_MAX_TOKEN_SECONDS": "60", "KNELL_RETENTION_SECONDS": "600"}
    made = knell("keys", "rotate", "--private", private, "--trust", trust, "--after", "100", **short)
    assert made["old_kid"] == old
    assert round(made["published_until"] - made["signs_from"]) == 70
    assert round(made["trusted_until"] - made["signs_from"]) == 600
    listed = knell("keys", "list", "--private", private, "--trust", trust)
    assert {each["kid"]: each["active"] for each in listed["private"]} == {old: True, made["kid"]: False}
    assert {each["kid"]: each["exp"] is None for each in listed["trusted"]} == {old: False, made["kid"]: True}
    assert [each["causes"] for each in listed["trusted"]] == [["expired", "missed", "revoked", "undone"]] * 2
    assert knell.run("keys", "rotate", "--private", private).exit_code == 2
    shown = knell.run("keys", "list", "--private", private, "--trust", trust).stdout
    assert "published, waits to sign" in shown
    assert "until 20" in shown
    secret = json.loads(Path(private).read_text())["keys"][0]["d"]
    assert secret not in shown + json.dumps(listed)


def test_list_without_files_takes_those_of_the_settings(knell: Knell) -> None:
    """KNELL_TRUST and KNELL_NOTICE_KEY are what is asked about most."""
    knell("revoke", "session", "s", "--iss", ISS)  # the embedded default makes its keys with the first use
    listed = knell("keys", "list")
    assert [each["kid"] for each in listed["private"]] == [each["kid"] for each in listed["trusted"]]


def test_doctor_finds_a_key_that_nobody_would_believe(
    settings: Callable[..., Settings], tmp_path: Path, own: Place
) -> None:
    """A new key that is to sign soon, and is not on the trust list, is found while there is time."""
    knell = Knell(deployed(settings, own))
    listed = own.trust.read_text()
    knell("keys", "rotate", "--private", str(own.private), "--trust", str(own.trust))
    knell("services", "add", "shop")

    def wrong() -> list[str]:
        found = json.loads(knell.run("doctor", "--json").stdout)["checks"]
        return [each["what"] for each in found if not each["ok"] and each["what"].startswith("trust list")]

    assert wrong() == []
    own.trust.write_text(listed)
    (said,) = wrong()
    assert "which signs in" in said


def test_a_key_file_that_is_not_there(settings: Callable[..., Settings], tmp_path: Path) -> None:
    """Whoever is given it says so at once, and not with the first request."""
    missing = KeyFile(tmp_path / "none.json")
    with pytest.raises(InvalidSettings, match=r"none\.json"):
        Issuer(ISS, missing, settings=settings())
    with pytest.raises(InvalidSettings, match=r"none\.json"):
        Verifier(missing, algorithms=["EdDSA"], issuer=ISS, audience="a", settings=settings())


def test_retire_and_revoke(knell: Knell, tmp_path: Path) -> None:
    """A retired key counts for the retention, a revoked one for nothing and for ever; neither is asked for in vain."""
    trust = tmp_path / "trust.json"
    key = SigningKey.generate()
    public = tmp_path / "public.json"
    public.write_text(json.dumps(key.public_jwk()))
    added = ("keys", "trust", "--public", str(public), "--trust", str(trust), "--iss", ISS)
    knell(*added)
    knell("keys", "retire", key.kid, "--trust", str(trust))
    (entry,) = knell("keys", "list", "--trust", str(trust))["trusted"]
    assert entry["exp"] > NOW
    knell(*added)
    assert knell("keys", "list", "--trust", str(trust))["trusted"][0]["exp"] is None
    revoked = ("keys", "revoke", key.kid, "--trust", str(trust), "--reason", "stolen")
    assert knell.run(*revoked).exit_code == 2  # nobody can be asked
    knell(*revoked, "--yes")
    assert knell("keys", "list", "--trust", str(trust))["trusted"][0]["revoked"] is True
    assert json.loads(trust.read_text())["keys"][0]["revoked"]["reason"] == "stolen"
    knell(*added, exit_code=2)
    knell("keys", "revoke", "nobody", "--trust", str(trust), "--yes", exit_code=2)
    knell("keys", "retire", "nobody", "--trust", str(trust), exit_code=2)
    knell("keys", "revoke", key.kid, "--yes", exit_code=2)


def test_the_key_that_signs_is_not_revoked(knell: Knell, tmp_path: Path) -> None:
    """Neither in its own file, nor where the notifier's key is: first another one has to sign."""
    private, trust = str(tmp_path / "keys.json"), str(tmp_path / "trust.json")
    kid = knell("keys", "new", "--private", private, "--trust", trust)["kid"]
    for files in (("--private", private), ("--private", private, "--trust", trust)):
        knell("keys", "revoke", kid, *files, "--yes", exit_code=2)
    knell("keys", "revoke", kid, "--trust", trust, "--yes", exit_code=2, KNELL_NOTICE_KEY=private)
    knell("keys", "rotate", "--private", private, "--trust", trust, "--after", "0")
    knell("keys", "revoke", kid, "--private", private, "--trust", trust, "--yes", KNELL_NOTICE_KEY=private)
    listed = knell("keys", "list", "--private", private, "--trust", trust)
    assert [each["revoked"] for part in ("private", "trusted") for each in listed[part]] == [True, False] * 2


def test_a_setup_that_runs_again_changes_no_rotated_key(knell: Knell, tmp_path: Path) -> None:
    """`keys new --if-missing` at every start finds the keys, adds what is missing, and lets none count again."""
    private, trust = tmp_path / "keys.json", tmp_path / "trust.json"
    again = ("keys", "new", "--private", str(private), "--trust", str(trust), "--if-missing")
    old = knell(*again)["kid"]
    new = knell("keys", "rotate", "--private", str(private), "--trust", str(trust), "--after", "0")["kid"]
    knell("keys", "revoke", old, "--private", str(private), "--trust", str(trust), "--yes")
    before = json.loads(trust.read_text())
    assert knell(*again) == {"kid": new, "private": str(private), "trust": str(trust), "made": False}
    assert sorted(json.loads(trust.read_text())["keys"], key=str) == sorted(before["keys"], key=str)


def test_a_key_for_tokens_only_needs_no_trust_list(knell: Knell, tmp_path: Path) -> None:
    """An issuer's key set is made alone; what a trust list would say has no place then."""
    private = tmp_path / "signing.json"
    made = knell("keys", "new", "--private", str(private), "--algorithm", "ES256")
    assert (made["trust"], stat.S_IMODE(private.stat().st_mode)) == (None, 0o600)
    assert KeyFile(private).active.algorithm == "ES256"
    knell("keys", "new", "--private", str(tmp_path / "x.json"), "--iss", ISS, exit_code=2)
    knell("keys", "new", "--private", str(tmp_path / "x.json"), "--algorithm", "HS256", exit_code=2)
    assert not (tmp_path / "x.json").exists()


def test_a_key_of_somebody_else_is_for_a_named_issuer(knell: Knell, tmp_path: Path) -> None:
    """Without --iss nothing is trusted; any issuer has to be asked for by name."""
    public, trust = tmp_path / "public.json", tmp_path / "trust.json"
    public.write_text(json.dumps(SigningKey.generate().public_jwk()))
    given = ("keys", "trust", "--public", str(public), "--trust", str(trust))
    assert knell.run(*given).exit_code == 2
    assert not trust.exists()
    assert knell(*given, "--iss", "*")["iss"] == ["*"]


def test_a_trusted_key_that_is_renewed_stays_in_the_list_once(tmp_path: Path) -> None:
    """An entry that is written again takes the place of the one before it."""
    trust, key = tmp_path / "trust.json", SigningKey.generate()
    for issuers in ([ISS], [ANY_ISSUER]):
        trust_key(trust, trust_entry(key, issuers=issuers, causes=[Cause.REVOKED]))
    retire(trust, key.kid, until=5.0)
    (entry,) = json.loads(trust.read_text())["keys"]
    assert (entry["iss"], entry["exp"]) == ([ANY_ISSUER], 5.0)
