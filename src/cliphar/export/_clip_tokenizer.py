"""open_clip's tokenizers as a tokenizer.json that serving reads without open_clip, checked to give the same ids."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

from cliphar.errors import BundleError, reason_of
from cliphar.models import OpenClipEncoder, hub_if_reachable, import_open_clip

__all__ = ["clip_tokenizer"]

_Theirs: TypeAlias = Callable[[Sequence[str]], list[list[int]]]
_PARTS = ("tokenizer.json", "tokenizer_config.json")
_SPACES = [normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
# open_clip's ways to clean a text, but for what mends broken encodings and HTML
_CLEANING = {
    "whitespace": _SPACES,
    "lower": [*_SPACES, normalizers.Lowercase()],
    "canonicalize": [
        normalizers.Replace("_", " "),
        normalizers.Replace(Regex(r"[!-/:-@\[-`{-~]"), ""),
        normalizers.Lowercase(),
        *_SPACES,
    ],
}
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


def clip_tokenizer(encoder: OpenClipEncoder, folder: Path | None = None) -> bytes:
    """tokenizer.json for the encoder's text tower: every text padded to its context length.

    Args:
        encoder: CLIP's byte pairs are open_clip's own; a model that names a tokenizer, such as SigLIP's, brings it.
        folder: where that tokenizer.json lies, with its tokenizer_config.json; None asks the hub.

    Raises:
        BundleError: the tokenizer cannot be had, is of another kind, or ours would give other ids than open_clip's.
    """
    open_clip = import_open_clip()
    length, config = encoder.context_length, encoder.config["text_cfg"]
    if config.get("hf_tokenizer_name"):
        ours, theirs = _named(encoder.name, config, folder)
    else:
        simple = open_clip.SimpleTokenizer(context_length=length, **config.get("tokenizer_kwargs", {}))
        ours, theirs = _byte_pairs(simple, open_clip.tokenizer.default_bpe()), lambda texts: simple(texts).tolist()
        ours.enable_padding(length=length, pad_id=0, pad_token="!")  # noqa: S106
    ours.enable_truncation(length)
    _compare(encoder.name, ours, theirs)
    ours.no_truncation()  # by the bundle's context_length, when it is loaded
    content: str = ours.to_str()
    return content.encode()


def _named(name: str, config: dict[str, Any], folder: Path | None) -> tuple[Tokenizer, _Theirs]:
    """A tokenizer of the hub's form, with open_clip's cleaning of the text inside, and what it is to answer.

    transformers, through which open_clip reads it, sets ends and padding by tokenizer_config.json; so is done here.
    """
    wishes = {"clean": "whitespace"} | config.get("tokenizer_kwargs", {})
    clean = wishes.pop("clean")
    if wishes or config.get("tokenizer_mode") or config.get("hf_model_name") or clean not in _CLEANING:
        raise BundleError(
            f"'{name}' handles text in a way that is not exported yet; choose a model of CLIP's or SigLIP's"
        )
    try:
        file, settings = (_file(config["hf_tokenizer_name"], folder, part) for part in _PARTS)
        ours, told = Tokenizer.from_file(str(file)), json.loads(settings.read_text(encoding="utf-8"))
        pad = told["pad_token"]
        pad = pad["content"] if isinstance(pad, dict) else pad
        if "add_bos_token" in told or "add_eos_token" in told:
            ends = [told[f"{end}_token"] if told.get(f"add_{end}_token") else None for end in ("bos", "eos")]
            ours.post_processor = _ends(ours, *(end["content"] if isinstance(end, dict) else end for end in ends))
        plain = Tokenizer.from_str(ours.to_str())
        length, side = config["context_length"], told.get("padding_side", "right")
        for one in (plain, ours):
            one.enable_padding(length=length, pad_id=one.token_to_id(pad), pad_token=pad, direction=side)
        plain.enable_truncation(length)
    except Exception as error:  # tokenizers raises plain Exception, the hub's client classes of its own
        raise BundleError(
            f"cannot get the tokenizer of '{name}' from {folder or 'the hub'}: {reason_of(error)}; "
            f"put {' and '.join(_PARTS)} beside the weights"
        ) from error
    ours.normalizer = normalizers.Sequence([*_CLEANING[clean], *([ours.normalizer] if ours.normalizer else [])])
    cleaned = import_open_clip().tokenizer.get_clean_fn(clean)
    return ours, lambda texts: [plain.encode(cleaned(text)).ids for text in texts]


def _file(repository: str, folder: Path | None, name: str) -> Path:
    if folder is not None:
        return folder / name
    from huggingface_hub import hf_hub_download

    with hub_if_reachable():
        return Path(hf_hub_download(repository, name))


def _ends(tokenizer: Tokenizer, first: str | None, last: str | None) -> Any:
    named = [(token, tokenizer.token_to_id(token)) for token in (first, last) if token]
    single = " ".join([*([first] if first else []), "$A", *([last] if last else [])])
    return processors.TemplateProcessing(single=single, special_tokens=named)


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


def _compare(name: str, ours: Tokenizer, theirs: _Theirs) -> None:
    for text, expected in zip(_PROBES, theirs(list(_PROBES)), strict=True):
        if ours.encode(text).ids != expected:
            raise BundleError(f"the tokenizer of '{name}' gives other ids here than open_clip's for {text[:40]!r}")
