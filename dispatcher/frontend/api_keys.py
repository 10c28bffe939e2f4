"""Who may ask, and as which tenant: keys from a file, one a line, `key` or `key:tenant`."""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import sha256
from hmac import compare_digest
from pathlib import Path

from dispatcher.errors import SettingsError
from dispatcher.frontend.problem import refused

MAX_TENANTS = 64
"""Each tenant has consumers of its own, see `app`."""
MAX_TENANT_CHARS = 256


class ApiKeys:
    """The keys of one frontend. Only their hashes are kept."""

    def __init__(self, keys: Iterable[tuple[str, str]]) -> None:
        self._tenants = [(_digest(key), tenant) for key, tenant in keys]
        self.tenants = tuple(sorted({tenant for _, tenant in self._tenants}))

    def tenant_of(self, authorization: str) -> str:
        """The tenant of an `Authorization` header; every key is compared, whichever matches.

        Raises:
            Refused: 401.
        """
        scheme, _, key = authorization.strip().partition(" ")
        if scheme.lower() != "bearer":
            raise refused(
                401, "expected the header 'Authorization: Bearer <key>', seen none", code="invalid_api_key"
            )
        digest = _digest(key.strip())
        found = None
        for known, tenant in self._tenants:
            if compare_digest(known, digest):
                found = tenant
        if found is None:
            raise refused(401, "expected a key that this service knows, seen another", code="invalid_api_key")
        return found


def _digest(key: str) -> bytes:
    return sha256(key.encode(errors="replace")).digest()


def read_api_keys(named: str) -> ApiKeys:
    """Read a file of keys. Empty lines and lines that begin with '#' mean nothing.

    Raises:
        SettingsError: it can't be read or holds no key, or a line is wrong; never shows a key.
    """
    try:
        lines = Path(named).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(
            f"--api-keys-file: expected a text file that can be read, seen {named!r}: {error}"
        ) from None
    keys: dict[str, str] = {}
    for number, line in enumerate(map(str.strip, lines), 1):
        if not line or line.startswith("#"):
            continue
        key, _, tenant = (part.strip() for part in line.partition(":"))
        if not key or len(tenant) > MAX_TENANT_CHARS:
            raise SettingsError(
                f"{named}, line {number}: expected key or key:tenant, the tenant at most "
                f"{MAX_TENANT_CHARS} characters"
            )
        if key in keys:
            raise SettingsError(f"{named}, line {number}: expected a new key, seen one for the second time")
        keys[key] = tenant
    if not keys:
        raise SettingsError(
            f"{named}: expected at least one key, seen none; leave the setting out to be open"
        )
    found = ApiKeys(keys.items())
    if len(found.tenants) > MAX_TENANTS:
        raise SettingsError(
            f"{named}: expected at most {MAX_TENANTS} tenants, seen {len(found.tenants)}; run more frontends"
        )
    return found
