"""The text tower learns the image tower's space; the image tower stays as it is.

Locked-image tuning (Zhai et al., "LiT", 2022, https://arxiv.org/abs/2111.07991): captions against their photos'
embeddings with a symmetric contrastive loss, and photos with a label against prompts and descriptions of it. Only a
projection on top of a frozen, quantised sentence encoder is trained: with a few thousand captions, more forgets more
words than it learns.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor, nn

from cliphar.export import quantize_sentence_encoder
from cliphar.labels import glossary, prompts
from cliphar.models import SentenceEncoder, TextProjection
from cliphar.training._corpus import TRAIN, Corpus
from cliphar.training._rates import warm_cosine
from cliphar.training._recipe import TextRecipe

__all__ = ["TRAIN_TEMPLATES", "Sentences", "build_sentences", "prune_tokenizer", "train_projection"]

TRAIN_TEMPLATES = (
    "{}",
    "a photo of {}",
    "a photo of people {}",
    "a person {}",
    "a photo of a person doing {}",
    "people doing {}",
    "an action photo of {}",
    "the sport of {}",
    "someone is {}",
    "a picture of {} in action",
    "a man {}",
    "a woman {}",
    "a group of people {}",
)
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def prune_tokenizer(path: Path, size: int, texts: Sequence[str]) -> tuple[Tokenizer, list[int]]:
    """Cut a WordPiece tokenizer.json to ``size`` tokens.

    Kept are the special tokens, single ASCII characters (so that no plain word is ever unknown), what ``texts`` use,
    most used first, and then the checkpoint's own order, which is by frequency.

    Returns:
        The tokenizer, and the old id of each new id; [PAD] is 0.
    """
    tree = json.loads(path.read_text(encoding="utf-8"))
    old: dict[str, int] = tree["model"]["vocab"]
    words = {index: token for token, index in old.items()}
    original = Tokenizer.from_str(json.dumps(tree | {"truncation": None, "padding": None}))
    counts = Counter(index for encoding in original.encode_batch(list(texts)) for index in encoding.ids)
    characters = [t for t in old if t.isascii() and len(t.removeprefix("##")) == 1]
    by_rank = [t for t in sorted(old, key=old.__getitem__) if t.isascii() and not t.startswith("[unused")]
    used = [words[index] for index, _ in counts.most_common()]
    kept = list(dict.fromkeys([*_SPECIAL, *characters, *used, *by_rank]))[:size]
    tree["model"]["vocab"] = {token: index for index, token in enumerate(kept)}
    tree["added_tokens"] = [
        entry | {"id": kept.index(entry["content"])} for entry in tree["added_tokens"] if entry["content"] in kept
    ]
    for name, entry in tree["post_processor"]["special_tokens"].items():
        entry["ids"] = [kept.index(name)]
    tree["truncation"] = tree["padding"] = None
    return Tokenizer.from_str(json.dumps(tree)), [old[token] for token in kept]


class Sentences:
    """The quantised sentence encoder at work: texts to float32 [N,384]."""

    def __init__(self, model: onnx.ModelProto, tokenizer: Tokenizer, context_length: int) -> None:
        self._session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        self._tokenizer = tokenizer
        tokenizer.enable_truncation(context_length)
        tokenizer.enable_padding()

    def __call__(self, texts: Sequence[str]) -> Tensor:
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # equal lengths together: less padding
        out = np.zeros((len(texts), SentenceEncoder.out_features), np.float32)
        for start in range(0, len(order), 128):
            rows = order[start : start + 128]
            ids = np.array([e.ids for e in self._tokenizer.encode_batch([texts[i] for i in rows])], np.int64)
            out[rows] = self._session.run(["sentences"], {"ids": ids})[0]
        return torch.from_numpy(out)


def build_sentences(recipe: TextRecipe, encoder: Path, corpus: Corpus) -> tuple[onnx.ModelProto, Tokenizer]:
    """Prune and quantise the sentence encoder found in ``encoder`` (its folder of weights and tokenizer)."""
    captions = [text for i in corpus.select(source="captioned", part=TRAIN) for text in corpus.captions[i]]
    known = [text for name, described in glossary().items() for text in (name, *described)]
    tokenizer, kept = prune_tokenizer(encoder / "tokenizer.json", recipe.vocabulary, known * 3 + captions)
    model = SentenceEncoder(len(kept))
    model.load_minilm(load_file(encoder / "model.safetensors"), kept)
    return quantize_sentence_encoder(model, recipe.block), tokenizer


def train_projection(
    corpus: Corpus,
    teacher: NDArray[np.float32],
    sentences: Sentences,
    recipe: TextRecipe,
    labels: Sequence[str],
    seed: int,
    log: Callable[[str], None],
) -> TextProjection:
    """Train on the TRAIN captions and on the TRAIN photos of ``labels``; ``teacher`` is float32 [N,D], unit length."""
    numbers = corpus.select(source="captioned", part=TRAIN)
    per_photo = min(len(corpus.captions[i]) for i in numbers)
    captions = sentences([text for i in numbers for text in corpus.captions[i][:per_photo]])
    named = []
    for label in labels:
        in_templates, described = prompts(label, TRAIN_TEMPLATES)
        described = described or [label]
        named.append(sentences([*in_templates, *(described * 2)[:2]]))
    material = _Material(
        photos=torch.from_numpy(teacher),
        captioned=numbers,
        captions=captions.view(len(numbers), per_photo, -1),
        prompts=torch.stack(named),
        pools=[corpus.select(part=TRAIN, labels=[label]) for label in labels],
    )
    members = []
    for member in range(recipe.average):
        members.append(_train_one(material, recipe, seed * 100 + member))
        log(f"text projection {member + 1}/{recipe.average} trained")
    return TextProjection.merged(members)


@dataclass(frozen=True)
class _Material:
    """``captions`` float [P,K,384] are of the photos ``captioned`` [P]; ``prompts`` float [L,T,384] are of L labels,
    whose photos are ``pools``."""

    photos: Tensor
    captioned: NDArray[np.int64]
    captions: Tensor
    prompts: Tensor
    pools: list[NDArray[np.int64]]


def _train_one(material: _Material, recipe: TextRecipe, seed: int) -> TextProjection:
    torch.manual_seed(seed)
    random = np.random.default_rng(seed)
    photos, captions, numbers = material.photos, material.captions, material.captioned
    prompt_bank, pools = material.prompts, material.pools
    classes, per_photo = len(pools), captions.shape[1]
    model = TextProjection(photos.shape[1], recipe.hidden, recipe.dropout)
    scale = nn.Parameter(torch.tensor(np.log(50.0), dtype=torch.float32))
    optimizer = torch.optim.AdamW([*model.parameters(), scale], recipe.lr, weight_decay=recipe.weight_decay)
    schedule = warm_cosine(optimizer, 50, recipe.steps)

    def noisy(x: Tensor) -> Tensor:
        shaken: Tensor = x + recipe.noise * torch.randn_like(x) / x.shape[-1] ** 0.5
        return shaken

    model.train()
    batch_size = min(recipe.batch_size, len(numbers))
    for _ in range(recipe.steps):
        rows = torch.from_numpy(random.choice(len(numbers), batch_size, replace=False))
        picks = torch.from_numpy(random.integers(0, per_photo, batch_size))
        texts = model(noisy(captions[rows, picks]))
        images = F.normalize(noisy(photos[numbers[rows]]), dim=-1)
        temperature = scale.exp().clamp(max=100)
        logits = temperature * texts @ images.T
        same = torch.arange(batch_size)
        loss = F.cross_entropy(logits, same, label_smoothing=0.05) + F.cross_entropy(
            logits.T, same, label_smoothing=0.05
        )
        picks = torch.from_numpy(random.integers(0, prompt_bank.shape[1], classes))
        names = model(noisy(prompt_bank[torch.arange(classes), picks]))
        chosen = np.concatenate([random.choice(pool, 4) for pool in pools])
        images = F.normalize(noisy(photos[chosen]), dim=-1)
        # captions stand by as hard negatives: a photo must fit its label better than somebody else's sentence
        logits = temperature * images @ torch.cat([names, texts[:256]]).T
        loss = loss / 2 + recipe.label_weight * F.cross_entropy(logits, torch.arange(classes).repeat_interleave(4))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    return model.eval()
