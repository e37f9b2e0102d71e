"""Flask: flask --app with_flask run"""

from pathlib import Path

from flask import Flask, g

from knell import Verifier
from knell.integrations.flask import Knell

verifier = Verifier(
    Path("public.pem").read_text(), algorithms=["EdDSA"], issuer="https://auth.example", audience="shop"
)
app = Flask(__name__)
knell = Knell(app, verifier)


@app.get("/me")
@knell.require()
def me() -> str:
    return g.knell_claims["sub"]


@app.get("/orders")
@knell.require("orders:read")  # a scope of the token
def orders() -> list[str]:
    return []
