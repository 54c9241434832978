"""Language models that judge text: perplexity under our own AR model, or under any causal model of Hugging Face's.

A perplexity means nothing without its scorer: what it calls a token, where a text is cut, whether its end counts. All
of that is in a scorer's name, which stands in every row; rows of different names are never in one table.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from flowlm import files
from flowlm.data.corpora import cache_folder
from flowlm.data.tokens import UNK
from flowlm.device import precision, resolve_device, resolve_dtype
from flowlm.evaluation.metrics import passage
from flowlm.model import FlowLM
from flowlm.progress import Progress

__all__ = ["ARScorer", "HFScorer", "Scorer", "Scores", "open_scorer", "score_texts", "scored"]

BATCH = 32


@dataclass(frozen=True)
class Scores:
    """What a scorer says of texts, one of each a text."""

    nats: tuple[float, ...]
    """-log p of the tokens that were judged."""
    tokens: tuple[int, ...]
    """How many these are; 0 for a text too short to judge."""

    @property
    def perplexity(self) -> float | None:
        """exp of the mean nats a token, over all tokens of all texts; None where there are none."""
        return math.exp(sum(self.nats) / count) if (count := sum(self.tokens)) else None


class Scorer(Protocol):
    """A causal model that judges texts."""

    @property
    def name(self) -> str:
        """What it is, of which revision, and what is judged: stands beside every perplexity."""

    def judge(self, texts: Sequence[str]) -> Scores:
        """At most `BATCH` texts."""


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

    @torch.no_grad()
    def judge(self, texts: Sequence[str]) -> Scores:
        from flowlm.discrete import ar

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
        rows = []
        for own in parts:
            ids = next(encoded)
            for _ in own[1:]:
                ids = [*ids, tokenizer.pad_id, *next(encoded)]
            rows.append([*ids, tokenizer.eos_id][:length])
        counts = torch.tensor([len(row) for row in rows])
        padded = torch.tensor([row + [tokenizer.pad_id] * (length - len(row)) for row in rows])
        with precision(self._device, self._dtype):
            losses = ar.losses(self._model.denoiser, padded.to(self._device)).double().cpu()
        judged = torch.arange(length) < counts[:, None]
        return Scores(tuple((losses * judged).sum(1).tolist()), tuple(counts.tolist()))


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
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(name, **options)
            self._model = cast("Any", AutoModelForCausalLM.from_pretrained(name, **options))
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(
                f"the scorer {name} cannot be loaded ({str(error).splitlines()[0]}): give a run of objective = 'ar', a "
                "folder with a causal model, or its name on the hub"
            ) from None
        room = int(getattr(self._model.config, "max_position_embeddings", 0) or 1024)
        if context > room:
            raise ValueError(f"the scorer {name} reads {room} tokens, and {context} were asked for")
        self._context = context or min(room, 1024)
        self._device = resolve_device(device)
        self._dtype, _ = resolve_dtype(dtype, self._device)
        self._model.to(self._device).eval()
        self.cut = 0
        """Texts that were longer than the context, so far."""
        commit = str(getattr(self._model.config, "_commit_hash", None) or revision or "local")[:8]
        self._name = (
            f"{Path(name).name if Path(name).is_dir() else name} {commit}, {str(self._dtype)[6:]}, its tokens after "
            f"the first, no end, texts cut at {self._context} tokens"
        )

    @property
    def name(self) -> str:
        return self._name

    @torch.no_grad()
    def judge(self, texts: Sequence[str]) -> Scores:
        ids = [self._tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        self.cut += sum(len(own) > self._context for own in ids)
        ids = [own[: self._context] for own in ids]
        longest = max(map(len, ids))
        if longest < 2:
            return Scores((0.0,) * len(ids), (0,) * len(ids))
        # Padding comes after a text, where a causal model does not see it.
        rows = torch.tensor([own + [0] * (longest - len(own)) for own in ids], device=self._device)
        mask = (
            torch.arange(longest, device=self._device)
            < torch.tensor([len(own) for own in ids], device=self._device)[:, None]
        )
        with precision(self._device, self._dtype):
            logits: Tensor = self._model(input_ids=rows, attention_mask=mask.long()).logits
        losses = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), rows[:, 1:], reduction="none")
        nats = (losses.double() * mask[:, 1:]).sum(1)
        return Scores(tuple(nats.tolist()), tuple(max(len(own) - 1, 0) for own in ids))


def scored(scorer: Scorer, texts: Sequence[str], say: Callable[[str], None] | None = None) -> dict[str, Any]:
    """``perplexity`` and ``scorer`` of a row: passages up to their end."""
    return {
        "perplexity": score_texts(scorer, [passage(text) for text in texts], say).perplexity,
        "scorer": scorer.name,
    }


def open_scorer(name: str, *, device: str = "auto") -> Scorer:
    """The scorer of a name: a run directory of ours, a folder of Hugging Face's, or a name on the hub.

    A revision of the hub's model follows an @: gpt2-large@32b71b1.

    Raises:
        ValueError: there is none.
    """
    folder = Path(name)
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

    A file of scores is named by the scorer and the texts; a damaged one is made anew.
    """
    named = json.dumps([scorer.name, list(texts)], ensure_ascii=False).encode()
    path = cache_folder() / "scores" / f"{hashlib.sha256(named).hexdigest()[:32]}.json"
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        if len(kept["nats"]) == len(kept["tokens"]) == len(texts):
            return Scores(tuple(kept["nats"]), tuple(kept["tokens"]))
    except (OSError, ValueError, KeyError, TypeError):
        pass
    nats, tokens = [0.0] * len(texts), [0] * len(texts)
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    with Progress(len(texts), 0, 0, say or (lambda line: None), label="texts scored", brief=True) as progress:
        for start in range(0, len(order), BATCH):
            some = order[start : start + BATCH]
            found = scorer.judge([texts[i] for i in some])
            for i, value, count in zip(some, found.nats, found.tokens, strict=True):
                nats[i], tokens[i] = value, count
            progress.advance(start + len(some))
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_json(path, {"scorer": scorer.name, "nats": nats, "tokens": tokens})
    return Scores(tuple(nats), tuple(tokens))
