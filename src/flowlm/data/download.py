"""Text of named corpora from the Hugging Face hub: Parquet files, found and fetched by the `datasets` library.

Files lie in the hub's own cache and are read from there like anyone's, or are read on the hub. Which they are is kept
beside the prepared rows, so that the hub is asked once; rows that are prepared are used without it and without them.
"""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flowlm import files
from flowlm.data.registry import CORPORA, Sides
from flowlm.data.remote import HubFile
from flowlm.hub import reaching

__all__ = ["address", "fetch", "listed"]


def address(corpus: str) -> str:
    """Where a named corpus lies on the hub, for its file system."""
    return f"hf://datasets/{CORPORA[corpus].repository}@{CORPORA[corpus].revision}"


def fetch(corpus: str, kept: Path, rows: Path, say: Callable[[str], None]) -> tuple[Sides, Path]:
    """The files of a named corpus, fetched where they are not here yet, and the folder that they lie in as on the hub.

    Args:
        corpus: its name.
        kept: a folder, where it is written down which files they are.
        rows: a folder, on whose disk the prepared rows will lie.
        say: where plain messages go.

    Raises:
        ImportError: `datasets` is not installed.
        ValueError: no way to the hub, or not those files there.
        OSError: too little room for them, or for their rows beside them.
    """
    named, note = CORPORA[corpus], _note(corpus, kept, "hub")
    try:
        said = json.loads(note.read_text(encoding="utf-8"))
        train, held = ([Path(path) for path in side] for side in said["sides"])
        if all(path.exists() for path in train + held):
            return (train, held), Path(said["folder"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    sides = listed(corpus, kept)
    every = [file for side in sides for file in side]
    missing = [file.size for file in every if not _is_here(file)]
    if missing:
        say(
            f"{corpus}: {len(missing)} files of {named.repository}, {sum(missing) / 1e9:,.1f} GB, are fetched from the "
            "hub into its cache"
        )
        _check_room(corpus, sum(missing), rows)
    with reaching(f"the text of {named.repository}", _INSTEAD):
        manager = _library(corpus).DownloadManager()
        here = [[Path(path) for path in manager.download([str(f) for f in side]) if side] for side in sides]
    folder = here[0][0].parents[len(Path(every[0].inside).parts) - 1]
    files.write_json(note, {"folder": str(folder), "sides": [[str(path) for path in side] for side in here]})
    return (here[0], here[1]), folder


def listed(corpus: str, kept: Path) -> tuple[list[HubFile], list[HubFile]]:
    """The files of a named corpus on the hub, to be read there.

    Args:
        kept: a folder, where it is written down which files they are.

    Raises:
        ImportError: `datasets` is not installed.
        ValueError: no way to the hub, or not those files there.
    """
    named, note = CORPORA[corpus], _note(corpus, kept, "stream")
    try:
        train, held = (
            [HubFile(**file) for file in side] for side in json.loads(note.read_text(encoding="utf-8"))
        )
        return train, held
    except (OSError, ValueError, TypeError):
        pass
    with reaching(f"the text of {named.repository}", _INSTEAD):
        from huggingface_hub import HfFileSystem

        system, urls = HfFileSystem(), _urls(corpus)

        def file(url: str) -> HubFile:
            about = system.info(url)
            inside = url.removeprefix(f"{address(corpus)}/")
            return HubFile(
                named.repository, named.revision, inside, int(about["size"]), str(about["lfs"]["sha256"])
            )

        sides = [[file(url) for url in side] for side in urls]
    files.write_json(note, [[asdict(found) for found in side] for side in sides])
    return sides[0], sides[1]


_INSTEAD = "give a folder of its Parquet files with --data.path"


def _note(corpus: str, kept: Path, how: str) -> Path:
    named = CORPORA[corpus]
    asked = [named.repository, named.revision, named.train, named.held]
    return kept / f"{how}-{corpus}-{hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:8]}.json"


def _library(corpus: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise ImportError(
            f"{corpus} is fetched from the hub by datasets: pip install 'flowlm[data]'; or {_INSTEAD}"
        ) from None
    return datasets


def _urls(corpus: str) -> tuple[list[str], list[str]]:
    """Of the files of a named corpus, and of its held-out split, in the order of their names: the last documents are
    those of the last file."""
    named = CORPORA[corpus]
    patterns = {"train": named.train} | ({"held": named.held} if named.held else {})
    builder = _library(corpus).load_dataset_builder(
        "parquet", data_files={side: [f"{address(corpus)}/{pattern}"] for side, pattern in patterns.items()}
    )
    urls = {side: sorted(map(str, builder.config.data_files[side])) for side in patterns}
    if empty := [pattern for side, pattern in patterns.items() if not urls[side]]:
        raise ValueError(
            f"{named.repository} at {named.revision} has no files {' and '.join(empty)}: {_INSTEAD}"
        )
    return urls["train"], urls.get("held", [])


def _is_here(file: HubFile) -> bool:
    """Whether it lies in the hub's cache."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(file.repository, file.inside, revision=file.revision, repo_type="dataset")
    return isinstance(found, str)


def _check_room(corpus: str, size: int, rows: Path) -> None:
    """Whether what is fetched has room, and beside it the rows that are made of it, if they lie on the same disk."""
    from huggingface_hub import constants

    cache, rows = _existing(Path(constants.HF_HUB_CACHE)), _existing(rows)
    free = shutil.disk_usage(cache).free
    together = _disk(cache) == _disk(rows)
    later = CORPORA[corpus].rows_size if together else 0.0
    if size + later > free:
        beside = (
            f", and the rows made of them about {later / 1e9:,.1f} GB on the same disk" if together else ""
        )
        raise OSError(
            errno.ENOSPC,
            f"the files of {corpus} take {size / 1e9:,.1f} GB{beside}, and {constants.HF_HUB_CACHE} has "
            f"{free / 1e9:,.1f} GB left: free some space, choose another folder with the hub's variable HF_HOME, or "
            f"read them on the hub, with flowlm prepare --data.corpus {corpus} --streaming; nothing was fetched",
        )


def _disk(folder: Path) -> int:
    return folder.stat().st_dev


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    return next(place for place in (folder, *folder.parents) if place.exists())
