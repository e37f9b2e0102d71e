"""Django's own sessions, opened with a token and ended with it: python with_django_sessions.py runserver"""

import sys
from pathlib import Path

import django
from django.conf import settings
from django.core.management import execute_from_command_line
from django.http import HttpRequest, HttpResponse
from django.urls import path
from django.views.decorators.csrf import csrf_exempt

from knell import Verifier

key = Path("public.pem").read_text()
verifier = Verifier(key, algorithms=["EdDSA"], issuer="https://auth.example", audience="shop")
settings.configure(
    ALLOWED_HOSTS=["127.0.0.1"],
    CACHES={"default": {"BACKEND": "django.core.cache.backends.filebased.FileBasedCache", "LOCATION": "cache"}},
    ROOT_URLCONF=__name__,
    SECRET_KEY="a secret from a vault",
    SESSION_ENGINE="django.contrib.sessions.backends.cache",
    MIDDLEWARE=[
        "django.contrib.sessions.middleware.SessionMiddleware",
        "knell.integrations.django.EndedSessionMiddleware",
        "knell.integrations.django.BearerMiddleware",
    ],
    KNELL={
        "VERIFIER": verifier,
        "EXEMPT": ["/me"],  # a session is enough
        # "SESSIONS": a knell.handlers.django.DjangoSessions, whose handlers delete the session from the store as well
    },
)
django.setup()

from knell.integrations.django import bind_session  # noqa: E402


@csrf_exempt
def login(request: HttpRequest) -> HttpResponse:
    request.session["name"] = request.knell_claims["sub"]
    bind_session(request, request.knell_claims)
    return HttpResponse("welcome")


def me(request: HttpRequest) -> HttpResponse:
    return HttpResponse(request.session.get("name", "nobody"))


urlpatterns = [path("login", login), path("me", me)]

if __name__ == "__main__":
    execute_from_command_line(sys.argv)
