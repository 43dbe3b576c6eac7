"""What is done when: from a video or a camera to segments of time."""

from cliphar.timeline._draw import annotate, colours, contact_sheet
from cliphar.timeline._live import Live, LiveAnswer
from cliphar.timeline._tables import to_csv, to_webvtt
from cliphar.timeline._types import Progress, Segment, Timeline
from cliphar.timeline._video import recognize_video, stream_video

__all__ = [
    "Live",
    "LiveAnswer",
    "Progress",
    "Segment",
    "Timeline",
    "annotate",
    "colours",
    "contact_sheet",
    "recognize_video",
    "stream_video",
    "to_csv",
    "to_webvtt",
]
