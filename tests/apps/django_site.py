"""A Django project in one file: a database of its own, a cache, and sessions. `set_up` once for each process."""

from __future__ import annotations

import tempfile
from pathlib import Path

import django
from django.conf import settings
from django.core.management import call_command


def set_up() -> None:
    """Configure Django, unless somebody has, and make the tables of its sessions."""
    if not settings.configured:
        database = Path(tempfile.mkdtemp(prefix="knell-django-")) / "django.db"
        settings.configure(
            SECRET_KEY="a key for tests",
            USE_TZ=True,
            INSTALLED_APPS=["django.contrib.contenttypes", "django.contrib.auth", "django.contrib.sessions"],
            DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": str(database)}},
            CACHES={"default": {"BACKEND": "django.core.cache.backends.locmem.LocMemCache"}},
            DEFAULT_AUTO_FIELD="django.db.models.BigAutoField",
        )
        django.setup()
    call_command("migrate", "sessions", verbosity=0)
