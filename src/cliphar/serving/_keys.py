"""API keys, kept as digests, and how often each caller may come."""

from __future__ import annotations

import hashlib
import hmac
import re
import time
from collections import OrderedDict
from pathlib import Path

import structlog

from cliphar.errors import UsageError
from cliphar.serving._problems import ProblemError
from cliphar.serving._state import stamp

__all__ = ["Keys"]

_CALLERS = 10_000
_log = structlog.get_logger()


class Keys:
    """Checks callers.

    Args:
        file: ``NAME SHA256`` a line, the digest of a key's UTF-8 bytes; a name may have several keys, as while one
            is replaced; None lets everyone in. What is changed in it holds from the next request on.
        rate_per_minute: requests of one key, or of one address where no keys are asked for; None sets no bound.

    Raises:
        UsageError: the file cannot be read or holds no key.
    """

    def __init__(self, file: Path | None, rate_per_minute: int | None) -> None:
        self._file, self._seen = file, file and stamp(file)
        self._digests = _read(file) if file else {}
        self._rate = rate_per_minute
        self._tokens: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def check(self, authorization: str | None, api_key: str | None, client: str) -> None:
        """ProblemError 401 for a key that is missing or unknown, 429 for one that comes too often."""
        caller = client
        self._refresh()
        if self._digests:
            scheme, _, token = (authorization or "").partition(" ")
            key = token if scheme.lower() == "bearer" else api_key or ""
            digest = hashlib.sha256(key.strip().encode("latin-1")).hexdigest()  # its bytes, as headers are decoded
            # every digest is compared, so that the time taken tells nothing
            matches = [name for known, name in self._digests.items() if hmac.compare_digest(known, digest)]
            if not matches:
                raise ProblemError(401, "give a key: Authorization: Bearer KEY, or X-API-Key: KEY")
            caller = f"key {matches[0]}"
        if self._rate is not None:
            self._take(caller, self._rate)

    def _refresh(self) -> None:
        if self._file is None or (found := stamp(self._file)) == self._seen:
            return
        self._seen = found  # before it is read, for it may be written to meanwhile; and what is wrong is said once
        try:
            self._digests = _read(self._file)
        except UsageError as error:
            _log.error("the old keys go on", reason=str(error))
        else:
            _log.info("keys read anew", keys=len(self._digests))

    def _take(self, caller: str, rate: int) -> None:
        """A token bucket that holds a minute's worth."""
        now = time.monotonic()
        left, since = self._tokens.pop(caller, (float(rate), now))
        left = min(float(rate), left + (now - since) * rate / 60)
        # to be refused takes nothing, or who asks faster would never be answered again
        self._tokens[caller] = (left if left < 1 else left - 1, now)
        while len(self._tokens) > _CALLERS:
            self._tokens.popitem(last=False)
        if left < 1:
            raise ProblemError(429, f"over {rate} requests a minute", retry_after_s=(1 - left) * 60 / rate)


def _read(file: Path) -> dict[str, str]:
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the keys in {file}: {error}") from error
    digests = {}
    for line in lines:
        name, _, digest = line.strip().partition(" ")
        if name and not name.startswith("#"):
            digest = digest.strip().lower()
            if not re.fullmatch(r"[0-9a-f]{64}", digest):
                raise UsageError(f"{file} has a line without a sha256; write 'NAME SHA256', as in docs/serving.md")
            digests[digest] = name
    if not digests:
        raise UsageError(f"{file} holds no key; write 'NAME SHA256' a line, or leave --api-keys out")
    return digests
