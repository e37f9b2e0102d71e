"""Django: python with_django.py runserver"""

import sys
from pathlib import Path

from django.conf import settings
from django.core.management import execute_from_command_line
from django.http import HttpRequest, HttpResponse
from django.urls import path

from knell import Verifier

key = Path("public.pem").read_text()
verifier = Verifier(key, algorithms=["EdDSA"], issuer="https://auth.example", audience="shop")
settings.configure(
    ALLOWED_HOSTS=["127.0.0.1"],
    ROOT_URLCONF=__name__,
    SECRET_KEY="a secret from a vault",
    MIDDLEWARE=["knell.integrations.django.BearerMiddleware"],
    KNELL={
        "VERIFIER": verifier,
        "EXEMPT": ["/health", "/admin/*"],
    },
)


def me(request: HttpRequest) -> HttpResponse:
    return HttpResponse(request.knell_claims["sub"])


urlpatterns = [path("me", me), path("health", lambda request: HttpResponse("well"))]

if __name__ == "__main__":
    execute_from_command_line(sys.argv)
