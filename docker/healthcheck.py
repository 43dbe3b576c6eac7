"""Healthy if every server named is at its address: healthcheck.py api, page or both (the image has no curl)."""

import os
import sys
from urllib.request import ProxyHandler, build_opener

SERVERS = {
    "api": ("CLIPHAR_PORT", "8000", "/readyz"),
    "page": ("CLIPHAR_APP_PORT", "8501", os.environ.get("CLIPHAR_APP_BASE_PATH", "").rstrip("/") + "/_stcore/health"),
}

direct = build_opener(ProxyHandler({}))  # Docker's own settings may name a proxy, which does not lead back here
for server in sys.argv[1:]:
    variable, port, path = SERVERS[server]
    url = f"http://127.0.0.1:{os.environ.get(variable) or port}{path}"
    try:
        direct.open(url, timeout=4).close()
    except OSError as error:
        sys.exit(f"{url}: {error}")
