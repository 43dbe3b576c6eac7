"""Where bundles live: in the package, in the user's store, or anywhere by path."""

from __future__ import annotations

import difflib
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from cliphar.bundle._io import BUNDLE_JSON, Bundle, read_bundle
from cliphar.errors import BundleError

__all__ = ["DEFAULT_MODEL", "StoredModel", "find_bundle", "list_models", "packaged", "store"]

DEFAULT_MODEL = "mini"
_PACKAGED = Path(__file__).resolve().parent.parent / "assets"


def packaged(name: str) -> Path:
    """Directory of what the package holds of a model."""
    return _PACKAGED / name


def store() -> Path:
    """Directory of models: CLIPHAR_HOME, else the user's cache directory."""
    if home := os.environ.get("CLIPHAR_HOME"):
        return Path(home)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cliphar" / "models"
    except RuntimeError:  # a user without a home
        return Path(tempfile.gettempdir()) / "cliphar" / "models"


@dataclass(frozen=True)
class StoredModel:
    """A model that has a name here: ``state`` is ``ready``, ``to pull`` or ``damaged``."""

    name: str
    path: Path
    state: str


def _is_whole(path: Path) -> bool:
    try:
        read_bundle(path, verify=False)
    except BundleError:
        return False
    return True


def _is_outdated(path: Path) -> bool:
    """Whether it is an extended copy of a model of the package, which has another one by now."""
    own = packaged(path.name)
    if path == own or not _is_whole(own):
        return False
    graphs = (read_bundle(folder, verify=False).info.files.get("image.onnx") for folder in (path, own))
    hashes = {graph and graph.sha256 for graph in graphs}
    return None in hashes or len(hashes) > 1


_exists = os.path.exists  # Path's raises on too long a name


def list_models() -> list[StoredModel]:
    """Models by name: those of the package and those in the store; the default comes first."""
    models: dict[str, StoredModel] = {}
    for root in (store(), _PACKAGED):
        try:
            manifests = sorted(root.glob(f"[!.]*/{BUNDLE_JSON}"))
        except OSError:  # another user's home
            continue
        for manifest in manifests:
            path = manifest.parent
            whole = _is_whole(path) and not _is_outdated(path)
            state = "ready" if whole else "to pull" if packaged(path.name).is_dir() else "damaged"
            if path.name not in models or (whole and models[path.name].state != "ready"):
                models[path.name] = StoredModel(path.name, path, state)
    return sorted(models.values(), key=lambda model: (model.name != DEFAULT_MODEL, model.name))


def find_bundle(model: str | os.PathLike[str] | None = None, *, verify: bool = True) -> Bundle:
    """Read a bundle by name or path; None takes MODEL_PATH, else the embedded one.

    Raises:
        BundleError: no such model, one that must be pulled first, or one that is damaged.
    """
    chosen = os.fspath(model) if model is not None else os.environ.get("MODEL_PATH") or None
    name = DEFAULT_MODEL if chosen is None else chosen
    path = Path(name)
    is_path = not name or name != path.name  # it has a separator
    # with nothing asked for, what lies in the working directory must not take the embedded model's place
    if is_path or (chosen is not None and _exists(path / BUNDLE_JSON)):
        return read_bundle(path, verify=verify)
    known = {stored.name: stored for stored in list_models()}
    if name in known:
        if known[name].state == "to pull":
            raise BundleError(f"model '{name}' is not complete here; run 'cliphar model pull {name}' once")
        return read_bundle(known[name].path, verify=verify)
    if _exists(path):
        return read_bundle(path, verify=verify)
    close = difflib.get_close_matches(name, known, 1)
    hint = f"did you mean '{close[0]}'?" if close else f"known are {', '.join(known) or 'none'}"
    raise BundleError(f"no model '{name}': it is neither a name nor a bundle's directory; {hint}")
