"""Who may call: the key, and the headers by which a browser says which site asks."""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import hmac
from collections.abc import Mapping

from fastsd.server.settings import ServerSettings, is_loopback

LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
Headers = Mapping[str, str]  # by their names in lower case


def refusal_of_site(settings: ServerSettings, headers: Headers) -> str | None:
    """Why a request that another web site caused is refused, or None.

    A page of another site can make a browser call this server. Such a call carries an Origin that is not our Host, or
    Sec-Fetch-Site: cross-site. With DNS rebinding the two agree, but then Host is that site's name: a server that
    listens on loopback knows its own names. Browsers always send a Host, which HTTP/1.0 can leave out.
    """
    stated = headers.get("host")
    host = stated or ""
    name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
    known = {*LOOPBACK, *settings.hosts, settings.host.lower(), f"[{settings.host}]"}
    if is_loopback(settings.host) and stated is not None and name.lower() not in known:
        return f"Host is {host!r}, which is not a name of this server; --allow-host adds one"
    origin = headers.get("origin")
    if origin is not None and origin.rstrip("/") in settings.cors:
        return None
    if origin is not None and origin.split("://", 1)[-1].lower() != host.lower():
        return f"a page of {origin!r} may not call this server; --cors adds an origin"
    if headers.get("sec-fetch-site") == "cross-site":
        return "a page of another site may not call this server; --cors adds an origin"
    return None


def is_known(settings: ServerSettings, headers: Headers) -> bool:
    """Whether a request carries the key or the password; both are compared in constant time.

    The key may be `Authorization: Bearer`, `X-API-Key`, or the password of HTTP basic with any name: browsers ask for
    that by themselves.
    """
    if not settings.locked:
        return True
    scheme, _, given = headers.get("authorization", "").partition(" ")
    keys, pairs = [headers.get("x-api-key", "").encode("latin-1")], []
    if scheme.lower() == "bearer":
        keys.append(given.strip().encode("latin-1"))
    elif scheme.lower() == "basic":
        try:
            pair = base64.b64decode(given.strip(), validate=True)
        except (binascii.Error, ValueError):
            pair = b""
        keys.append(pair.partition(b":")[2])
        pairs.append(pair)
    known = False
    if settings.api_key is not None:
        for key in keys:
            known |= _same(key, settings.api_key)
    if settings.password is not None:
        for pair in pairs:
            known |= _same(pair, f"{settings.user}:{settings.password}")
    return known


def _same(given: bytes, wanted: str) -> bool:
    """In a time that depends on neither: digests have one length. Clients send letters as UTF-8 or, as requests for
    Python does, as Latin-1."""
    spellings = [wanted.encode("utf-8", "surrogateescape")]
    with contextlib.suppress(UnicodeEncodeError):
        spellings.append(wanted.encode("latin-1"))
    found, same = hashlib.sha256(given).digest(), False
    for own in spellings:
        same |= hmac.compare_digest(found, hashlib.sha256(own).digest())
    return same
