"""Models by name on the Hugging Face hub: hf://USER/NAME, with @REVISION for another than the newest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from flowlm.files import first_line

__all__ = ["SCHEME", "UnreachableError", "fetch_file", "located", "push", "reaching"]

SCHEME = "hf://"


class UnreachableError(ValueError):
    """There is no way to the hub, or it is busy: another time there may be."""


_FILES = [
    *("README.md", "about.json", "clock.json", "config.json", "config.toml", "data.json"),
    *("ema.safetensors", "model.safetensors", "rows.npz", "tokenizer.json", "tokenizer_config.json"),
]
"""What a model of this package may consist of. Nothing else of a folder is pushed, and nothing else of a repository
fetched: names in full, since in the hub's patterns a * stands for folders as well."""


def located(name: str | Path) -> Path:
    """The folder of a model: the path itself; of hf://USER/NAME its files, fetched into the hub's cache here.

    Raises:
        ValueError: there is no such repository, or no way to the hub.
    """
    name = str(name)
    if name.startswith("hf:/") and not name.startswith(SCHEME):
        name = SCHEME + name.removeprefix("hf:/")  # of two slashes a Path keeps one
    if not name.startswith(SCHEME):
        return Path(name)
    from huggingface_hub import snapshot_download

    repo, revision = _parts(name)
    with reaching(f"{SCHEME}{repo}", "give the folder of a model that is on this machine"):
        return Path(snapshot_download(repo, revision=revision, allow_patterns=_FILES))


def fetch_file(repository: str, name: str, instead: str = "give the path of the file without --hub") -> Path:
    """A file of a repository, NAME or NAME@REVISION, where it lies on this machine.

    Args:
        instead: what to do without it, for errors.

    Raises:
        ValueError: there is no such file, or no way to the hub.
    """
    from huggingface_hub import hf_hub_download

    repo, revision = _parts(repository)
    with reaching(f"{name} of {repo}", instead):
        return Path(hf_hub_download(repo, name, revision=revision))


def push(folder: Path, name: str, *, private: bool = False, say: Callable[[str], None] | None = None) -> str:
    """Put a model's folder on the hub, where `huggingface_hub` is logged in; the repository is made when missing.

    Args:
        folder: as `FlowLM.save_pretrained` or `flowlm export` wrote it.
        name: hf://USER/NAME or USER/NAME.
        private: of a repository that is made.
        say: where plain messages go.

    Returns:
        The address of what was pushed.

    Raises:
        ValueError: no model there, no leave to write, no way to the hub.
    """
    from huggingface_hub import HfApi

    if not (folder / "config.json").exists():
        raise ValueError(f"{folder} holds no config.json: push what flowlm export or save_pretrained wrote")
    repo, revision = _parts(name)
    with reaching(f"{SCHEME}{repo}", "log in with `hf auth login`, and check the name"):
        api = HfApi()
        api.create_repo(repo, private=private, exist_ok=True)
        address = str(
            api.upload_folder(
                repo_id=repo,
                folder_path=folder,
                revision=revision,
                allow_patterns=_FILES,
                # What another model left there would be taken for this one's.
                delete_patterns=[name for name in _FILES if name != "README.md"],
            )
        )
    if say is not None:
        say(f"pushed to {address}")
    return address


def _parts(name: str) -> tuple[str, str | None]:
    repo, _, revision = name.removeprefix(SCHEME).partition("@")
    return repo, revision or None


@contextmanager
def reaching(what: str, else_: str) -> Iterator[None]:
    """Around what is asked of the hub: its errors in plain words, with what to do `else_`.

    Raises:
        UnreachableError: it cannot be reached, or is busy.
        ValueError: it refuses.
    """
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        LocalTokenNotFoundError,
        OfflineModeIsEnabled,
    )

    try:
        yield
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError):
        raise UnreachableError(
            f"the hub cannot be reached, and {what} is not in its cache here: {else_}"
        ) from None
    except (
        EntryNotFoundError,
        HfHubHTTPError,
        HFValidationError,
        LocalTokenNotFoundError,
        FileNotFoundError,
    ) as error:
        reason = first_line(error)
        status = getattr(getattr(error, "response", None), "status_code", 0)
        if status in (408, 429) or status >= 500:
            raise UnreachableError(f"the hub is busy ({reason}), asked for {what}: try again later") from None
        raise ValueError(f"the hub refuses {what} ({reason}): check the name; else {else_}") from None
    except Exception as error:
        # Its file system hands on the errors of the library that speaks HTTP, which differs between versions.
        if not any(kind.__name__ in ("TransportError", "RequestException") for kind in type(error).__mro__):
            raise
        raise UnreachableError(f"the hub cannot be reached ({error}), for {what}: {else_}") from None
