"""djangorestframework-simplejwt: python with_simplejwt.py migrate, then runserver"""

import sys

import django
from django.conf import settings
from django.core.management import execute_from_command_line
from django.urls import path

from knell import Issuer

settings.configure(
    ALLOWED_HOSTS=["127.0.0.1"],
    DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": "users.sqlite3"}},
    DEFAULT_AUTO_FIELD="django.db.models.BigAutoField",
    INSTALLED_APPS=["django.contrib.auth", "django.contrib.contenttypes", "rest_framework"],
    ROOT_URLCONF=__name__,
    SECRET_KEY="a secret of at least 32 bytes, from a vault",
    USE_TZ=True,
    REST_FRAMEWORK={
        "DEFAULT_AUTHENTICATION_CLASSES": ["knell.integrations.simplejwt.JWTAuthentication"],
        "DEFAULT_PERMISSION_CLASSES": ["rest_framework.permissions.IsAuthenticated"],
    },
    SIMPLE_JWT={
        "ISSUER": "https://auth.example",
        "ROTATE_REFRESH_TOKENS": True,
        "BLACKLIST_AFTER_ROTATION": True,
        "TOKEN_OBTAIN_SERIALIZER": "knell.integrations.simplejwt.TokenObtainPairSerializer",
        "TOKEN_REFRESH_SERIALIZER": "knell.integrations.simplejwt.TokenRefreshSerializer",
        "TOKEN_VERIFY_SERIALIZER": "knell.integrations.simplejwt.TokenVerifySerializer",
        "TOKEN_BLACKLIST_SERIALIZER": "knell.integrations.simplejwt.TokenBlacklistSerializer",
        "AUTH_TOKEN_CLASSES": ["knell.integrations.simplejwt.AccessToken"],
    },
    KNELL={"ISSUER": Issuer("https://auth.example")},
)
django.setup()

from rest_framework.response import Response  # noqa: E402
from rest_framework.views import APIView  # noqa: E402
from rest_framework_simplejwt import views  # noqa: E402


class Me(APIView):
    def get(self, request):
        return Response(request.user.username)


urlpatterns = [
    path("me", Me.as_view()),
    path("login", views.TokenObtainPairView.as_view()),
    path("refresh", views.TokenRefreshView.as_view()),
    path("verify", views.TokenVerifyView.as_view()),
    path("logout", views.TokenBlacklistView.as_view()),
]

if __name__ == "__main__":
    execute_from_command_line(sys.argv)
