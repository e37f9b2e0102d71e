"""Django REST framework: python with_drf.py runserver"""

import sys
from pathlib import Path

import django
from django.conf import settings
from django.core.management import execute_from_command_line
from django.urls import path

from knell import Verifier

key = Path("public.pem").read_text()
verifier = Verifier(key, algorithms=["EdDSA"], issuer="https://auth.example", audience="shop")
settings.configure(
    ALLOWED_HOSTS=["127.0.0.1"],
    INSTALLED_APPS=["django.contrib.auth", "django.contrib.contenttypes", "rest_framework"],
    ROOT_URLCONF=__name__,
    SECRET_KEY="a secret from a vault",
    REST_FRAMEWORK={
        "DEFAULT_AUTHENTICATION_CLASSES": ["knell.integrations.drf.KnellAuthentication"],
        "DEFAULT_PERMISSION_CLASSES": ["rest_framework.permissions.IsAuthenticated"],
    },
    KNELL={"VERIFIER": verifier},
)
django.setup()

from rest_framework.response import Response  # noqa: E402
from rest_framework.views import APIView  # noqa: E402

from knell.integrations.drf import has_scopes  # noqa: E402


class Me(APIView):
    def get(self, request):
        return Response(request.auth["sub"])  # request.auth: the claims


class Orders(APIView):
    permission_classes = (has_scopes("orders:read"),)

    def get(self, request):
        return Response([])


urlpatterns = [path("me", Me.as_view()), path("orders", Orders.as_view())]

if __name__ == "__main__":
    execute_from_command_line(sys.argv)
