"""open_clip's tokenizers as a tokenizer.json that serving reads without open_clip, checked to give the same ids."""

from __future__ import annotations

import gzip
from collections.abc import Callable, Sequence
from typing import Any

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

from cliphar.errors import BundleError
from cliphar.models import OpenClipEncoder, import_open_clip

__all__ = ["clip_tokenizer"]

_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_PROBES = (
    "a photo of a person riding a bike",
    "Two people: laughing, hugging & dancing!",
    "it's 10 o'clock -- don't   stop",
    "naïve café, 自転車に乗る",
    "x",
    "",
    "running " * 100,
)


def clip_tokenizer(encoder: OpenClipEncoder) -> bytes:
    """tokenizer.json for the encoder's text tower: every text padded to its context length.

    Raises:
        BundleError: the model has a tokenizer of another kind, or ours would give other ids than open_clip's.
    """
    open_clip = import_open_clip()
    try:
        theirs = open_clip.get_tokenizer(encoder.name, context_length=encoder.context_length)
    except Exception as error:  # transformers is missing, or the hub's client raises one of its many
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise BundleError(f"cannot get the tokenizer of '{encoder.name}': {reason}; connect to the network") from error
    if not isinstance(theirs, open_clip.SimpleTokenizer):
        raise BundleError(
            f"'{encoder.name}' has a tokenizer of its own kind ({type(theirs).__name__}), which is not exported yet; "
            "choose a model with CLIP's"
        )
    ours = _byte_pairs(theirs, open_clip.tokenizer.default_bpe())
    ours.enable_padding(length=encoder.context_length, pad_id=0, pad_token="!")  # noqa: S106
    ours.enable_truncation(encoder.context_length)
    _compare(encoder.name, ours, lambda texts: theirs(texts).tolist())
    ours.no_truncation()  # by the bundle's context_length, when it is loaded
    content: str = ours.to_str()
    return content.encode()


def _byte_pairs(theirs: Any, merges_file: str) -> Tokenizer:
    with gzip.open(merges_file, "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")
    pairs = [(left, right) for left, right in (line.split() for line in lines[1 : 49152 - 256 - 2 + 1])]
    start, end = theirs.sot_token_id, theirs.eot_token_id
    names = {number: name for name, number in theirs.encoder.items()}
    tokenizer = Tokenizer(models.BPE(vocab=theirs.encoder, merges=pairs, end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{names[start]} $A {names[end]}", special_tokens=[(names[start], start), (names[end], end)]
    )
    return tokenizer


def _compare(name: str, ours: Tokenizer, theirs: Callable[[Sequence[str]], list[list[int]]]) -> None:
    for text, expected in zip(_PROBES, theirs(list(_PROBES)), strict=True):
        if ours.encode(text).ids != expected:
            raise BundleError(f"the tokenizer of '{name}' gives other ids here than open_clip's for {text[:40]!r}")
