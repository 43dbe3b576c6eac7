"""Healthy if every address given answers 200: healthcheck.py URL... (the image has no curl)."""

import sys
from urllib.request import urlopen

for url in sys.argv[1:]:
    try:
        urlopen(url, timeout=4).close()  # noqa: S310 - the addresses are the image's own
    except OSError as error:
        sys.exit(f"{url}: {error}")
