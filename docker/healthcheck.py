"""healthcheck.py [PID]: healthy if what a process's command serves answers (the image has no curl).

The process is the container's first. Other commands serve nothing; where it is a shell, not cliphar, the API is asked.
"""

import os
import sys
from argparse import ArgumentParser
from pathlib import Path
from urllib.request import ProxyHandler, build_opener

words = os.fsdecode(Path("/proc", *(sys.argv[1:] or ["1"]), "cmdline").read_bytes()).split("\0")
names = [Path(word).name for word in words]  # [docker-init --] tini -- cliphar COMMAND ...
command, *given = words[names.index("cliphar") + 1 :] if "cliphar" in names else ["serve"]


def told(flag: str, variable: str, otherwise: str) -> str:
    """What an option of the command says, as cliphar takes it: its flag, else its variable."""
    option = ArgumentParser()
    option.add_argument(flag, dest="value", default=os.environ.get(variable) or otherwise)
    return option.parse_known_args(given)[0].value


page = told("--base-path", "CLIPHAR_APP_BASE_PATH", "") + "/_stcore/health"
api = told("--port", "CLIPHAR_PORT", "8000") + "/readyz"
serves = {
    "serve": [api],
    "app": [told("--port", "CLIPHAR_APP_PORT", "8501") + page],
    "up": [api, told("--page-port", "CLIPHAR_APP_PORT", "8501") + page],
}
direct = build_opener(ProxyHandler({}))  # Docker's own settings may name a proxy, which does not lead back here
for at in serves.get(command, []):
    try:
        direct.open(f"http://127.0.0.1:{at}", timeout=4).close()
    except OSError as error:
        sys.exit(f"http://127.0.0.1:{at}: {error}")
