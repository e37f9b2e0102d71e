"""flask-jwt-extended: flask --app with_flask_jwt_extended run"""

from uuid import uuid4

from flask import Flask
from flask_jwt_extended import JWTManager, create_access_token, get_jwt, jwt_required

from knell import Issuer, Verifier
from knell.integrations.flask_jwt_extended import Blocklist, track

ISSUER, SECRET = "https://auth.example", "a secret of at least 32 bytes, from a vault"

app = Flask(__name__)
app.config.update(JWT_SECRET_KEY=SECRET, JWT_ENCODE_ISSUER=ISSUER, JWT_DECODE_ISSUER=ISSUER)
jwt = JWTManager(app)
issuer = Issuer(ISSUER)
verifier = Verifier(SECRET, algorithms=["HS256"], issuer=ISSUER, audience=None)
Blocklist(app, jwt, verifier)


@app.post("/login/<name>")
def login(name: str) -> str:  # a real one asks for a password
    return track(issuer, create_access_token(name, additional_claims={"sid": uuid4().hex}))


@app.get("/me")
@jwt_required()
def me() -> str:
    return get_jwt()["sub"]


@app.post("/logout")
@jwt_required()
def logout() -> str:
    issuer.revoke("session", {"sid": get_jwt()["sid"]}, reason="logout", initiating_entity="user")
    return "bye"
