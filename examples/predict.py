"""python examples/predict.py PHOTO [URL]"""

import sys

from cliphar.client import Client
from cliphar.errors import ClipharError

photo, *rest = sys.argv[1:]
with Client(rest[0] if rest else "http://127.0.0.1:8000") as client:
    for answer in client.predict([photo, photo], ["taking a photo", "sleeping"]):
        if isinstance(answer, ClipharError):  # this photo could not be read; the others were answered
            print(answer)
        else:
            print(answer.label, round(answer.score, 3), answer.set)
