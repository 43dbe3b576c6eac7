"""What the weights learned from, on what terms, and what they are not good for: it goes into every model card."""

from __future__ import annotations

from cliphar.bundle import Source

__all__ = ["LIMITS", "MINI_SOURCES", "SPACE_SOURCES"]

_PHOTOS = (
    Source(
        name="Human Action Recognition, 15 classes",
        role="photos and labels of the known actions",
        licence="none stated; photos from the web",
    ),
    Source(
        name="100 Sports (70 of them)", role="photos and labels of sports", licence="none stated; photos from the web"
    ),
    Source(name="Flickr8k", role="photos and captions", licence="research use; photos belong to their Flickr authors"),
)
_CLIP = Source(name="OpenAI CLIP ViT-B/16, image tower in int8", role="the space; teacher", licence="MIT")
_TEXT = Source(name="all-MiniLM-L6-v2", role="sentence encoder, 4-bit, vocabulary cut", licence="Apache-2.0")
_GLOSSARY = Source(name="cliphar's glossary", role="descriptions of actions", licence="Apache-2.0")

SPACE_SOURCES = (_CLIP, _TEXT, *_PHOTOS, _GLOSSARY)
MINI_SOURCES = (
    Source(name="EfficientNet-Lite1, ImageNet weights", role="start of the image tower", licence="Apache-2.0"),
    *SPACE_SOURCES,
)
LIMITS = (
    "decisions about people: it names what a picture looks like, and is wrong for some groups more than for others",
    "surveillance, emergencies and safety without a person who checks: a fight or a fall can be missed",
    "actions that need time to tell apart, such as sitting down from standing up: it sees single photos",
    "several people doing different things: it answers for the photo as a whole",
    "words far from everyday English; known actions are trained, others are understood by their words alone",
    "the words of the known actions overlap (calling, texting; laughing, hugging), and so did their labels",
)
