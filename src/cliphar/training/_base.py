"""The bundle that training starts from: any that is here, or one of open_clip's models, fetched with its weights."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from pathlib import Path

from cliphar.bundle import Bundle, find_bundle, read_bundle, sha256_file, write_bundle
from cliphar.errors import BundleError, UsageError
from cliphar.export import open_clip_bundle, open_clip_name
from cliphar.models import WEIGHTS_FILE, open_clip_encoder, open_clip_towers, save_weights

__all__ = ["find_base"]


def find_base(base: str, cache: Path, log: Callable[[str], None]) -> Bundle:
    """A bundle by name or path; ``open_clip:ARCHITECTURE/WEIGHTS``, where WEIGHTS is one of open_clip's tags or a
    file's absolute path after another slash, is made once, of a file once for each content, and kept in ``cache``.

    Raises:
        BundleError: no such bundle, or the weights cannot be had.
        UsageError: open_clip has no such model, or no weights are named.
    """
    if (known := open_clip_name(base)) is None:
        return find_bundle(base)
    architecture, weights = known
    if not weights:
        raise UsageError(f"base '{base}' names no weights; write {base}/TAG or {base}//path/to/weights")
    file = Path(weights) if Path(weights).is_file() else None
    told = f"{architecture}-{weights if file is None else file.name}"
    content = "" if file is None else f"-{sha256_file(file)[:12]}"  # what was trained on has the same name
    name = re.sub(r"[^A-Za-z0-9._]+", "-", told).strip("-.")[: 64 - len(content)] + content
    target = cache / "bases" / name
    try:
        return read_bundle(target)
    except BundleError:
        log(f"making a bundle of open_clip's {architecture} with weights {weights}")
    encoder = open_clip_encoder(architecture, weights)
    with tempfile.TemporaryDirectory() as work:  # in its place only with its weights
        bundle = open_clip_bundle(
            encoder, Path(work) / name, name=name, weights=Path(weights).name, tokenizer=file and file.parent
        )
        files: dict[str, Path | bytes] = {part: bundle.file(part) for part in bundle.info.files}
        files[WEIGHTS_FILE] = save_weights(open_clip_towers(encoder))
        return write_bundle(target, bundle.info, files, overwrite=True)
