"""The text a model was trained on, found again: to judge what it writes, or to hand it on."""

from __future__ import annotations

import dataclasses
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from flowlm import files
from flowlm.config import read_run_config
from flowlm.data.corpora import Corpus, DataConfig, load_corpus, upgraded
from flowlm.data.readers import TextReader
from flowlm.model import FlowLM

__all__ = ["ROWS", "corpus_of", "save_rows"]

ROWS = "rows.npz"


def save_rows(folder: Path, corpus: Corpus) -> None:
    """Put the tokenised text beside an exported model, so that it can be evaluated where the text is not."""

    def write(path: Path) -> None:
        with path.open("xb") as f:
            np.savez_compressed(f, train=np.asarray(corpus.train), held_out=np.asarray(corpus.held_out))

    files.write_atomically(folder / ROWS, write)


def corpus_of(
    run: Path, model: FlowLM, say: Callable[[str], None] | None = None, moved_to: str = ""
) -> Corpus:
    """What a model was trained on: the rows beside an exported one, or the text that its config.toml names.

    Args:
        run: its folder.
        model: loaded from there.
        say: where plain messages go.
        moved_to: where the text is now, if not where it was; of a model that does not say, what it is judged by, in
            rows as it writes them.

    Raises:
        ValueError: it is not known, not there, or has changed since.
    """
    if (run / ROWS).exists():
        try:
            with np.load(run / ROWS) as rows:
                return Corpus(rows["train"], rows["held_out"], model.tokenizer, model.data)
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise ValueError(f"{run / ROWS} is damaged ({error}): export the model again") from None
    if not (run / "config.toml").exists():
        if not moved_to:
            raise ValueError(
                f"{run} does not say what text it was trained on: give it, or a text like it, with --data.path"
            )
        return load_corpus(_like(run, model, moved_to), model.length, model.tokenizer, say, counts=False)
    data = read_run_config(run).data
    if moved_to:
        data = dataclasses.replace(data, path=moved_to)
    # What is to be said of the text was said at training; how its preparation goes, where one is needed, is not.
    corpus = load_corpus(data, model.length, model.tokenizer, say, like=model.data, counts=False)
    for key in ("sha256", "law_sha256"):
        if corpus.meta.get(key) != model.data.get(key):
            raise ValueError(
                f"the text has changed since {run} was trained{upgraded(model.data, corpus.meta)}"
            )
    return corpus


def _like(run: Path, model: FlowLM, text: str) -> DataConfig:
    """How a text is read for a model of which only the form of its rows is known."""
    form: dict[str, Any] = {name: model.data[name] for name in ("rows", "bos") if name in model.data}
    own: dict[str, Any] = {"tokenizer": str(run / "tokenizer.json")} if form.get("bos") else {}
    # What stands in records is taken as it is, of plain text each line.
    unit = "record" if TextReader(text).has_records else "line"
    return DataConfig(corpus="text", path=text, unit=unit, **form, **own)
