"""Language models that judge text: perplexity under our own AR model, or under any causal model of Hugging Face's.

A perplexity means nothing without its scorer: what it calls a token, where a text is cut, whether its end counts. All
of that is in a scorer's name, which stands in every row; rows of different names are never in one table.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from flowlm import files
from flowlm.data.corpora import cache_folder
from flowlm.data.tokens import UNK
from flowlm.device import precision, resolve_device, resolve_dtype
from flowlm.evaluation.bootstrap import ratio_interval
from flowlm.evaluation.frechet import frechet_distance
from flowlm.evaluation.metrics import passage
from flowlm.hub import fetch_file
from flowlm.model import FlowLM
from flowlm.progress import Progress

__all__ = [
    "ARScorer",
    "HFScorer",
    "Scorer",
    "Scores",
    "distance",
    "feature_texts",
    "open_scorer",
    "score_texts",
    "scored",
]

BATCH = 32
LOGITS = 2**28
"""Logits of a Hugging Face model that are held at once: 1 GB of float32."""
_KEEP_EVERY = 10.0  # seconds between points that an interrupted scoring goes on from


@dataclass(frozen=True)
class Scores:
    """What a scorer says of texts, one of each a text."""

    nats: tuple[float, ...]
    """-log p of the tokens that were judged."""
    tokens: tuple[int, ...]
    """How many these are; 0 for a text too short to judge."""
    cut: int = 0
    """Texts that were longer than what is read of one."""

    @property
    def perplexity(self) -> float | None:
        """exp of the mean nats a token, over all tokens of all texts; None where there are none."""
        return math.exp(sum(self.nats) / count) if (count := sum(self.tokens)) else None

    @property
    def interval(self) -> list[float] | None:
        """95 % bootstrap interval of the perplexity."""
        return ratio_interval(self.nats, self.tokens, math.exp)


class Scorer(Protocol):
    """A causal model that judges texts."""

    @property
    def name(self) -> str:
        """What it is, of which revision, and what is judged: stands beside every perplexity."""

    def judge(self, texts: Sequence[str]) -> Scores:
        """At most `BATCH` texts."""

    def features(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """(texts, d) of at most `BATCH` texts: the mean over the judged tokens of the last hidden state before the
        head, from which each is predicted; 0 for a text too short to judge."""


class ARScorer:
    """A run of the family AR: its own tokens, the end of a passage counted.

    Args:
        run: its directory.
        device, dtype: where and in what it computes.

    Raises:
        ValueError: the run is of another family, or not there.
    """

    def __init__(self, run: Path, *, device: str = "auto", dtype: str = "float32"):
        self._model = FlowLM.from_pretrained(run, device=device)
        if self._model.family.name != "ar":
            raise ValueError(
                f"{run} is of the family {self._model.family.label}, which has no exact likelihood: a scorer is a run "
                "of objective = 'ar', or a causal model of Hugging Face's"
            )
        self._device = self._model.embedding.device
        self._dtype, _ = resolve_dtype(dtype, self._device)
        source = self._model.source
        assert source is not None
        self._name = (
            f"AR {run.name} {files.sha256(source)[:8]}, {str(self._dtype)[6:]}, its {self._model.tokenizer.kind} and "
            f"the end, texts cut at {self._model.length} tokens"
        )

    @property
    def name(self) -> str:
        return self._name

    def _rows(self, texts: Sequence[str]) -> tuple[Tensor, Tensor, int]:
        """Tokens (B, L) with their ends, padded; (B,) how many they are; how many texts were cut."""
        tokenizer, length = self._model.tokenizer, self._model.length
        # A model that writes filling inside a passage shows it: to the scorer it is that token, and unlikely there.
        filling = tokenizer.token(tokenizer.pad_id)
        parts = [text.split(filling) for text in texts]
        try:
            encoded = iter(tokenizer.encode([part for own in parts for part in own]))
        except ValueError as error:
            raise ValueError(
                f"the scorer cannot read the samples: {error}. Train it on the same text with data.vocab_size or "
                f"data.tokenizer = 'bpe', so that it knows {UNK} or bytes"
            ) from None
        rows, cut = [], 0
        for own in parts:
            ids = next(encoded)
            for _ in own[1:]:
                ids = [*ids, tokenizer.pad_id, *next(encoded)]
            cut += len(ids) > length  # the end alone may fall outside, as in training
            rows.append([*ids, tokenizer.eos_id][:length])
        counts = torch.tensor([len(row) for row in rows])
        padded = torch.tensor([row + [tokenizer.pad_id] * (length - len(row)) for row in rows])
        return padded.to(self._device), counts, cut

    @torch.no_grad()
    def judge(self, texts: Sequence[str]) -> Scores:
        from flowlm.discrete import ar

        rows, counts, cut = self._rows(texts)
        with precision(self._device, self._dtype):
            losses = ar.losses(self._model.denoiser, rows).cpu().double()
        judged = torch.arange(rows.shape[1]) < counts[:, None]
        return Scores(tuple((losses * judged).sum(1).tolist()), tuple(counts.tolist()), cut)

    @torch.no_grad()
    def features(self, texts: Sequence[str]) -> NDArray[np.float64]:
        from flowlm.discrete import ar

        rows, counts, _ = self._rows(texts)
        network = self._model.denoiser
        with precision(self._device, self._dtype):
            hidden = network(ar.shifted(rows, network.config.vocab_size)).hidden
        return _means(hidden, counts)


def _folder_hash(folder: Path) -> str:
    """Of the names and contents of a folder's files."""
    own = sorted(path for path in folder.iterdir() if path.is_file())
    return hashlib.sha256("\n".join(f"{path.name} {files.sha256(path)}" for path in own).encode()).hexdigest()


class HFScorer:
    """A causal model of Hugging Face's, as papers on these models use gpt2-large.

    Texts are tokenised anew, cut where its context ends; the first token is read and not judged, no end is added.

    Args:
        name: of a model on the hub, or a folder.
        revision: of the hub's model; the newest when empty.
        context: tokens of a text that are read; those the model has room for, at most 1,024, when 0.

    Raises:
        ImportError: transformers is missing.
        ValueError: there is no such model, or it has no room for `context`.
    """

    def __init__(
        self,
        name: str,
        *,
        revision: str = "",
        context: int = 0,
        device: str = "auto",
        dtype: str = "float32",
    ):
        try:
            from transformers import AutoModelForCausalLM, AutoTokenizer
        except ImportError as error:
            raise ImportError(
                "a scorer of Hugging Face's needs transformers: pip install 'flowlm[eval]'"
            ) from error
        options: dict[str, Any] = {"revision": revision} if revision else {}
        instead = "give a run of objective = 'ar', a folder with a causal model, or its name on the hub"
        if not Path(name).is_dir():
            # One file first: without a way there, the library would try for each of many.
            fetch_file(f"{name}@{revision}" if revision else name, "config.json", instead)
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(name, **options)
            self._model = cast("Any", AutoModelForCausalLM.from_pretrained(name, **options))
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(
                f"the scorer {name} cannot be loaded ({files.first_line(error)}): {instead}"
            ) from None
        room = int(getattr(self._model.config, "max_position_embeddings", 0) or 1024)
        if context > room:
            raise ValueError(f"the scorer {name} reads {room} tokens, and {context} were asked for")
        self._context = context or min(room, 1024)
        self._device = resolve_device(device)
        self._dtype, _ = resolve_dtype(dtype, self._device)
        self._model.to(self._device).eval()
        there = Path(name)
        hub = str(getattr(self._model.config, "_commit_hash", None) or revision or "main")
        # A folder's name says nothing of what lies in it.
        commit = (_folder_hash(there) if there.is_dir() else hub)[:8]
        self._name = (
            f"{Path(name).name if Path(name).is_dir() else name} {commit}, {str(self._dtype)[6:]}, its tokens after "
            f"the first, no end, texts cut at {self._context} tokens"
        )

    @property
    def name(self) -> str:
        return self._name

    def _rows(self, texts: Sequence[str]) -> tuple[Tensor, Tensor, int]:
        """Tokens (B, L), padded to at least two; (B,) how many they are; how many texts were cut."""
        ids = [self._tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        cut = sum(len(own) > self._context for own in ids)
        ids = [own[: self._context] for own in ids]
        longest = max(2, *map(len, ids))
        # Padding comes after a text, where a causal model does not see it.
        rows = torch.tensor([own + [0] * (longest - len(own)) for own in ids], device=self._device)
        return rows, torch.tensor([len(own) for own in ids]), cut

    def _read(self, rows: Tensor, counts: Tensor, **options: bool) -> Any:
        # Of an empty text one token is read too, and nothing made of it: a row without any is not a number.
        mask = torch.arange(rows.shape[1]) < counts.clamp_min(1)[:, None]
        with precision(self._device, self._dtype):
            return self._model(input_ids=rows, attention_mask=mask.long().to(self._device), **options)

    @torch.no_grad()
    def judge(self, texts: Sequence[str]) -> Scores:
        rows, counts, cut = self._rows(texts)
        judged = (counts - 1).clamp_min(0)
        at_once = max(1, LOGITS // (rows.shape[1] * int(self._model.config.vocab_size)))
        nats = [
            self._nats(*part)
            for part in zip(rows.split(at_once), counts.split(at_once), judged.split(at_once))
        ]
        return Scores(tuple(torch.cat(nats).tolist()), tuple(judged.tolist()), cut)

    def _nats(self, rows: Tensor, counts: Tensor, judged: Tensor) -> Tensor:
        logits: Tensor = self._read(rows, counts).logits
        losses = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), rows[:, 1:], reduction="none")
        kept = torch.arange(rows.shape[1] - 1) < judged[:, None]
        return (losses.cpu().double() * kept).sum(1)

    @torch.no_grad()
    def features(self, texts: Sequence[str]) -> NDArray[np.float64]:
        rows, counts, _ = self._rows(texts)
        hidden: Tensor = self._read(rows, counts, output_hidden_states=True).hidden_states[-1]
        return _means(hidden[:, :-1], (counts - 1).clamp_min(0))


def _means(hidden: Tensor, counts: Tensor) -> NDArray[np.float64]:
    """The mean of the first `counts` (B,) states of each row of hidden (B, L, d), in float64; 0 of none."""
    states = hidden.detach().cpu().double()
    judged = (torch.arange(states.shape[1]) < counts[:, None])[..., None]
    means: NDArray[np.float64] = (states.where(judged, 0.0).sum(1) / counts.clamp_min(1)[:, None]).numpy()
    return means


def scored(scorer: Scorer, texts: Sequence[str], say: Callable[[str], None] | None = None) -> dict[str, Any]:
    """``perplexity`` with its interval, ``scorer`` and ``cut`` of a row: passages up to their end."""
    scores = score_texts(scorer, [passage(text) for text in texts], say)
    if scores.cut and say is not None:
        say(
            f"{scores.cut:,} of {len(texts):,} texts are longer than the scorer reads, and were cut: {scorer.name}"
        )
    return {
        "perplexity": scores.perplexity,
        "scorer": scorer.name,
        "cut": scores.cut,
        "intervals": {"perplexity": scores.interval},
    }


def distance(scorer: Scorer, texts: Sequence[str], reference: NDArray[np.float64]) -> dict[str, Any]:
    """``frechet`` of a row: the distance of passages from a reference (see `feature_texts`), between as many of
    each, ``frechet_num``, the first ones, since it depends on how many they are; None with fewer than two."""
    num = min(len(texts), len(reference))
    if num < 2:
        return {"frechet": None}
    own = feature_texts(scorer, [passage(text) for text in texts[:num]])
    return {"frechet": frechet_distance(own, reference[:num]), "frechet_num": num}


def open_scorer(name: str, *, device: str = "auto") -> Scorer:
    """The scorer of a name: a run directory of ours, a folder of Hugging Face's, or a name on the hub.

    A revision of the hub's model follows an @: gpt2-large@32b71b1.

    Raises:
        ValueError: there is none.
    """
    folder = Path(name)
    if not folder.exists() and (folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1):
        raise ValueError(
            f"there is no scorer at {name}: give a run of objective = 'ar', a folder with a causal model of Hugging "
            "Face's, or its name on the hub"
        )
    if folder.is_dir() and (folder / "tokenizer.json").exists() and _is_ours(folder):
        return ARScorer(folder, device=device)
    model, _, revision = name.partition("@")
    return HFScorer(model, revision=revision, device=device)


def _is_ours(folder: Path) -> bool:
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return str(content.get("format", "")).startswith("flowlm/")


def score_texts(scorer: Scorer, texts: Sequence[str], say: Callable[[str], None] | None = None) -> Scores:
    """Scores of any number of texts, in batches of like length, kept in the cache by content.

    A file of scores is named by the scorer and the texts; a damaged one is made anew. What was interrupted goes on.

    Raises:
        ValueError: a text that cannot be read, or one whose likelihood is not finite.
    """
    try:
        named = json.dumps([scorer.name, list(texts)], ensure_ascii=False).encode()
    except UnicodeEncodeError:
        wrong = next(i for i, text in enumerate(texts) if any("\ud800" <= sign <= "\udfff" for sign in text))
        raise ValueError(
            f"text {wrong}, {texts[wrong][:40]!r}, holds half of a pair of UTF-16, which no tokenizer reads: mend it, "
            "or leave it out"
        ) from None
    path = cache_folder() / "scores" / f"{hashlib.sha256(named).hexdigest()[:32]}.json"
    if (kept := _kept(path, len(texts))) is not None:
        return Scores(tuple(kept["nats"]), tuple(kept["tokens"]), kept["cut"])
    part = path.with_suffix(".part.json")
    named_parts = ("nats", "tokens", "cut", "done")
    begun = _kept(part, len(texts), named_parts) or {
        "nats": [0.0] * len(texts),
        "tokens": [0] * len(texts),
        "cut": 0,
        "done": 0,
    }
    nats, tokens, cut, done = (begun[name] for name in named_parts)

    def keep() -> None:
        with contextlib.suppress(OSError, ValueError):  # it would only have saved time
            files.write_json(part, {"nats": nats, "tokens": tokens, "cut": cut, "done": done})

    last = time.monotonic()
    with Progress(
        len(texts), done, 0, say or (lambda line: None), label="texts scored", brief=True
    ) as progress:
        try:
            for some in _batches(texts, done):
                found = scorer.judge([texts[i] for i in some])
                for i, value, count in zip(some, found.nats, found.tokens, strict=True):
                    nats[i], tokens[i] = value, count
                cut, done = cut + found.cut, done + len(some)
                progress.advance(done)
                if time.monotonic() - last > _KEEP_EVERY:
                    keep()
                    last = time.monotonic()
        except KeyboardInterrupt:
            keep()
            raise
    if (bad := next((i for i, value in enumerate(nats) if not math.isfinite(value)), None)) is not None:
        raise ValueError(
            f"{scorer.name} gives text {bad}, {texts[bad][:40]!r}, a likelihood of {nats[bad]} nats: it cannot "
            "score; try another --device, or another scorer"
        )
    try:
        files.write_json(path, {"scorer": scorer.name, "nats": nats, "tokens": tokens, "cut": cut})
        part.unlink(missing_ok=True)
    except OSError as error:
        (say or print)(f"the scores are not kept for another time: {error.strerror}")
    return Scores(tuple(nats), tuple(tokens), cut)


def _kept(path: Path, num: int, names: Sequence[str] = ("nats", "tokens", "cut")) -> dict[str, Any] | None:
    """What a file of scores of `num` texts says; None where there is none, or a damaged one."""
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        found = {name: kept[name] for name in names}
        return found if len(found["nats"]) == len(found["tokens"]) == num else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def feature_texts(scorer: Scorer, texts: Sequence[str]) -> NDArray[np.float64]:
    """Features (texts, d) of any number of texts, in batches of like length. ValueError: no texts."""
    if not texts:
        raise ValueError("texts is empty: there is nothing to read features from; give at least one text")
    found = {
        i: row for some in _batches(texts) for i, row in zip(some, scorer.features([texts[i] for i in some]))
    }
    return np.stack([found[i] for i in range(len(texts))])


def _batches(texts: Sequence[str], done: int = 0) -> Iterator[list[int]]:
    """Numbers of texts, those of like length together, but for the first `done` in that order."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    for start in range(done, len(order), BATCH):
        yield order[start : start + BATCH]
