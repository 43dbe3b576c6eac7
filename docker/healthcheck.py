"""Healthy if what the container's command serves answers; other commands serve nothing (the image has no curl)."""

import os
import sys
from pathlib import Path
from urllib.request import ProxyHandler, build_opener

API = ("CLIPHAR_PORT", "8000", "/readyz")
PAGE = ("CLIPHAR_APP_PORT", "8501", os.environ.get("CLIPHAR_APP_BASE_PATH", "") + "/_stcore/health")
SERVES = {"serve": [API], "app": [PAGE], "up": [API, PAGE]}

words = Path("/proc/1/cmdline").read_text().split("\0")  # [docker-init --] tini -- cliphar COMMAND ...
command = words[words.index("cliphar") + 1] if "cliphar" in words else "up"
direct = build_opener(ProxyHandler({}))  # Docker's own settings may name a proxy, which does not lead back here
for variable, port, path in SERVES.get(command, []):
    url = f"http://127.0.0.1:{os.environ.get(variable) or port}{path}"
    try:
        direct.open(url, timeout=4).close()
    except OSError as error:
        sys.exit(f"{url}: {error}")
