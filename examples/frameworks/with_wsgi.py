"""Any WSGI application: python with_wsgi.py"""

from pathlib import Path
from wsgiref.simple_server import make_server

from knell import Verifier
from knell.integrations.wsgi import KnellMiddleware

verifier = Verifier(
    Path("public.pem").read_text(), algorithms=["EdDSA"], issuer="https://auth.example", audience="shop"
)


def me(environ, start_response):
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [environ["knell.claims"]["sub"].encode()]


app = KnellMiddleware(me, verifier, exempt=["/health"])

if __name__ == "__main__":
    make_server("127.0.0.1", 8000, app).serve_forever()
