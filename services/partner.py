"""The partner: a service that is not Python, and not ours, told by a signed HTTP POST.

    celery -A services.partner worker

PARTNER_WEBHOOK_URL is where to post; PARTNER_WEBHOOK_SECRET is `whsec_` and 24 to 64 random bytes in base64, or several
of these separated by spaces, the newest first. The receiving end, in plain Node: examples/partner-receiver.mjs.
"""

from __future__ import annotations

import os

import structlog

from knell import GiveUp, InvalidSettings, Notice, Service
from knell.handlers.webhook import Webhook

log = structlog.get_logger("services.partner")


def _required(variable: str) -> str:
    value = os.environ.get(variable)
    if not value:
        raise InvalidSettings(f"{variable} is not set; services/partner.py says what it is")
    return value


partner = Service("partner")
webhook = Webhook(_required("PARTNER_WEBHOOK_URL"), _required("PARTNER_WEBHOOK_SECRET").split())


@partner.on_session_end
async def tell_session_end(notice: Notice) -> None:
    """Post the end of a session."""
    await _post(notice)


@partner.on_token_end
async def tell_token_end(notice: Notice) -> None:
    """Post the end of a token, unless it ends its session too: that is told above, and once is enough."""
    if "session" not in notice.ends:
        await _post(notice)


@partner.on_missed
def tell_an_operator(since: float) -> None:
    """Notices since then were dropped, and only the partner can look its sessions up: park it, for somebody to ask."""
    raise GiveUp(f"notices since {since:.0f} (Unix seconds) were dropped: ask the partner to check all of its sessions")


async def _post(notice: Notice) -> None:
    await webhook(notice)  # raises what makes Knell try again, or give up
    log.info("partner_told", cause=notice.cause.value, notice=notice.id)


app = partner.celery_app()
