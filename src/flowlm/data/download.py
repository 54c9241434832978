"""Text of named corpora from the Hugging Face hub: Parquet files, found and fetched by the `datasets` library.

Files lie in the hub's own cache and are read from there like anyone's. Which they were is kept beside the prepared
rows, so that the hub is asked once, and what was fetched is used without it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

from flowlm import files
from flowlm.data.registry import CORPORA, Sides
from flowlm.hub import reaching

__all__ = ["fetch"]


def fetch(corpus: str, kept: Path, say: Callable[[str], None]) -> tuple[Sides, str]:
    """The files of a named corpus, fetched where they are not here yet, and the commit they are of.

    Args:
        corpus: its name.
        kept: a folder, where it is written down which files they are.
        say: where plain messages go.

    Raises:
        ImportError: `datasets` is not installed.
        ValueError: no way to the hub, or not those files there.
        OSError: too little room for them.
    """
    named = CORPORA[corpus]
    asked = {"repository": named.repository, "revision": named.revision, "files": [named.train, named.held]}
    mark = hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:8]
    note = kept / f"hub-{corpus}-{mark}.json"
    if (found := _read(note)) is not None:
        return found
    try:
        import datasets
    except ImportError:
        raise ImportError(
            f"{corpus} is fetched from the hub by datasets: pip install 'flowlm[data]'; or give a folder of its "
            "Parquet files with --data.path"
        ) from None
    patterns = {"train": named.train} | ({"held": named.held} if named.held else {})
    place = f"hf://datasets/{named.repository}@{named.revision}"
    instead = "give a folder of its Parquet files with --data.path"
    with reaching(f"the text of {named.repository}", instead):
        builder = datasets.load_dataset_builder(
            "parquet", data_files={side: [f"{place}/{pattern}"] for side, pattern in patterns.items()}
        )
        # In the order of their names: the last documents are those of the last file.
        urls = {side: sorted(map(str, builder.config.data_files[side])) for side in patterns}
        if empty := [pattern for side, pattern in patterns.items() if not urls[side]]:
            raise ValueError(
                f"{named.repository} at {named.revision} has no files {' and '.join(empty)}: {instead}"
            )
        missing = _missing(list(chain.from_iterable(urls.values())))
        if missing:
            say(
                f"{corpus}: {len(missing)} files of {named.repository}, {sum(missing) / 1e9:,.1f} GB, are fetched from "
                "the hub into its cache"
            )
            _check_room(corpus, sum(missing))
        fetched = {side: datasets.DownloadManager().download(own) for side, own in urls.items()}
    sides = [[Path(path) for path in fetched.get(side, [])] for side in ("train", "held")]
    parts = sides[0][0].parts
    commit = parts[parts.index("snapshots") + 1] if "snapshots" in parts[:-1] else named.revision
    files.write_json(
        note, asked | {"commit": commit, "sides": [[str(path) for path in side] for side in sides]}
    )
    return (sides[0], sides[1]), commit


def _read(note: Path) -> tuple[Sides, str] | None:
    """What a note says, if all its files are still there."""
    try:
        said = json.loads(note.read_text(encoding="utf-8"))
        train, held = ([Path(path) for path in side] for side in said["sides"])
        return ((train, held), str(said["commit"])) if all(path.exists() for path in train + held) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _missing(urls: list[str]) -> list[int]:
    """Bytes of each file that does not lie in the hub's cache yet."""
    from huggingface_hub import HfFileSystem, try_to_load_from_cache

    system, sizes = HfFileSystem(), []
    for url in urls:
        at: Any = system.resolve_path(url)
        here = try_to_load_from_cache(
            at.repo_id, at.path_in_repo, revision=at.revision, repo_type=at.repo_type
        )
        if not isinstance(here, str):
            sizes.append(int(system.info(url)["size"]))
    return sizes


def _check_room(corpus: str, size: int) -> None:
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    free = shutil.disk_usage(next(folder for folder in (cache, *cache.parents) if folder.exists())).free
    if size > free:
        raise OSError(
            errno.ENOSPC,
            f"the files of {corpus} take {size / 1e9:,.1f} GB, and {cache} has {free / 1e9:,.1f} GB left: free some "
            "space, or choose another folder with the hub's variable HF_HOME; nothing was fetched",
        )
