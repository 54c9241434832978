"""`FlowLM`: a network with its tokenizer, as a folder that is loaded, generated from and saved."""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flowlm import files
from flowlm.clock import AdaptiveClock, Clock
from flowlm.config import from_dict, to_dict
from flowlm.data.pretrained import CONFIG
from flowlm.data.tokens import Tokenizer
from flowlm.denoiser import DenoiserConfig, as_it_was
from flowlm.device import precision, resolve_device, resolve_dtype
from flowlm.families import Ask, family_of
from flowlm.hub import located, push
from flowlm.samplers import Step
from flowlm.weights import load_weights, stored_as, write_weights

FORMAT = "flowlm/1"
DATA = "data.json"
PACKAGED = Path(__file__).resolve().parent / "pretrained"
"""The model that comes with the package."""

#: State held at once while sampling on a CPU, in elements of (batch, L, max(d, V/8)): about 0.25 GiB with the network's
#: own. Larger parts are no faster there, and slower where each of their tensors is asked of the system anew.
SAMPLE_ELEMENTS = 2**22
#: How many times as much an accelerator holds: it is idle between small parts.
ACCELERATED = 16


@dataclass(frozen=True)
class Generation:
    """Passages and how they were made."""

    texts: list[str]
    """Decoded up to the first [EOS]; of a model of wrapped rows all passages of the row, one a line."""
    tokens: Tensor
    """(num, L) token ids, on the CPU."""
    nfe: int
    """Network calls per passage."""


class FlowLM:
    """A flow language model, its flow map, or a model of another family (`family`), with its tokenizer.

    Args:
        denoiser: the network.
        tokenizer: of the same vocabulary.
        sampling_clock: in whose τ sampling grids are uniform; the denoiser's own when None.

    Raises:
        ValueError: the tokenizer's vocabulary is not the denoiser's.
    """

    def __init__(self, denoiser: Any, tokenizer: Tokenizer, sampling_clock: Clock | None = None):
        if tokenizer.vocab_size != denoiser.config.vocab_size:
            raise ValueError(
                f"the tokenizer has {tokenizer.vocab_size} tokens and the model {denoiser.config.vocab_size}: "
                "this is the tokenizer of another run"
            )
        if denoiser.config.vocabulary not in ("", tokenizer.vocabulary_sha256):
            raise ValueError(
                "the tokenizer has as many tokens as the model but not the same ones: this is the tokenizer of "
                "another run"
            )
        self.denoiser, self.tokenizer, self.sampling_clock = denoiser, tokenizer, sampling_clock
        self.family = family_of(denoiser.config)
        self.source: Path | None = None
        """The file its weights were read from, if any."""
        self._written = 0  # when that file was, in ns
        self.data: dict[str, Any] = {}
        """What is known of the data it was trained on: data.json of its run."""

    @property
    def embedding(self) -> nn.Parameter:
        """E (V, d)."""
        embedding: nn.Parameter = self.denoiser.embedding
        return embedding

    @property
    def length(self) -> int:
        """L, tokens in a passage."""
        return int(self.denoiser.config.length)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path | None = None, *, weights: str = "auto", device: str = "cpu"
    ) -> FlowLM:
        """Load a run directory or a saved model.

        Args:
            folder: with config.json, tokenizer.json and weights; hf://USER/NAME[@REVISION] for one on the Hugging
                Face hub; None for the model that comes with the package.
            weights: "ema" (averaged), "model" (as trained), or "auto" (averaged where there are any).
            device: "auto", "cpu", "cuda" or "mps".

        Raises:
            ValueError: no model there, a half-written or foreign folder, weights that do not fit (every missing
                and unexpected key is listed), a tokenizer of another vocabulary.
        """
        folder = PACKAGED if folder is None else located(folder)
        config = read_model_config(folder)
        if weights not in ("auto", "ema", "model"):
            raise ValueError(f"weights = {weights!r}: use 'auto', 'ema' or 'model'")
        name = weights
        if weights == "auto":
            name = "ema" if (folder / "ema.safetensors").exists() else "model"
        denoiser = family_of(config).network(config)
        path = folder / f"{name}.safetensors"
        written = path.stat().st_mtime_ns if path.exists() else 0
        load_weights(denoiser, path)
        denoiser.eval()
        tokenizer = Tokenizer.load(folder)
        sampling = read_sampling_clock(folder, getattr(denoiser, "clock", None))
        place = resolve_device(device)
        model = cls(denoiser.to(place), tokenizer, None if sampling is None else sampling.to(place))
        model.source = path
        model._written = written
        model.data = describe_data(folder)
        return model

    @functools.cached_property
    def weights(self) -> str | None:
        """File and sha256 of the weights that it was loaded with; None where there is none, or others are there now, as
        where a run trains on."""
        if self.source is None or not self.source.exists():
            return None
        digest = files.sha256(self.source)
        return f"{self.source.name} {digest}" if self.source.stat().st_mtime_ns == self._written else None

    def save_pretrained(self, folder: str | Path, *, dtype: str = "float32") -> None:
        """Write config.json, model.safetensors, the tokenizer and data.json: all of them, or what was there stays.

        Args:
            folder: made when missing.
            dtype: of the stored weights: "float32", "bfloat16" (half the size) or "int8" (a quarter; see
                `flowlm.weights.stored_as`). The model here is not changed, and computes as before when loaded.

        Raises:
            ValueError: another dtype; the folder is a run's, or another program's model.
            OSError: with the reason and what to do (full disk, no permission).
        """
        self._save(Path(folder), dtype)

    def _save(self, folder: Path, dtype: str, gone: Sequence[str] = ()) -> None:
        """The same; files of the names in `gone` go with those that are replaced."""
        if (folder / "checkpoints").exists():
            raise ValueError(
                f"{folder} is a run with checkpoints, and its weights would be replaced: give another folder"
            )
        if (folder / "config.json").exists():
            read_model_config(folder)  # another program's is not written over
        stored = stored_as(dtype, self.denoiser)
        # An average of other weights would be loaded in place of these.
        with files.together(folder, "config.json", ("ema.safetensors", CONFIG, DATA, *gone)) as staged:
            write_weights(staged / "model.safetensors", stored)
            self.tokenizer.save(staged)
            write_sampling_clock(staged, self.sampling_clock)
            if self.data:
                files.write_json(staged / DATA, self.data)
            write_model_config(staged, self.denoiser.config)

    def is_as_loaded(self) -> bool:
        """Whether its parameters are, number for number, those in the file that it was loaded from."""
        if self.weights is None:
            return False
        assert self.source is not None
        kept = self.family.network(self.denoiser.config)
        load_weights(kept, self.source)
        mine, theirs = dict(self.denoiser.named_parameters()), dict(kept.named_parameters())
        return mine.keys() == theirs.keys() and all(
            torch.equal(own.detach().cpu(), theirs[name]) for name, own in mine.items()
        )

    def push_to_hub(
        self, name: str, *, dtype: str = "float32", private: bool = False, licence: str = ""
    ) -> str:
        """Put the model on the Hugging Face hub, with a card of what it is and how its run made it; as files of an
        earlier model, an earlier card is replaced. (`flowlm evaluate FOLDER --card --push NAME` adds how good it is.)

        Args:
            name: USER/NAME; made when missing.
            dtype: of the stored weights, as in `save_pretrained`.
            private: of a repository that is made.
            licence: for the card, such as apache-2.0; whose it is to give depends on the data.

        Returns:
            The address of what was pushed.

        Raises:
            ValueError: another dtype, no leave to write, no way to the hub, or the files that say how it was made are
                damaged.
        """
        from flowlm.card import save_with_card  # which reads models

        with tempfile.TemporaryDirectory(prefix="flowlm-") as folder:
            save_with_card(
                self, Path(folder), name.partition("@")[0].rpartition("/")[2], dtype=dtype, licence=licence
            )
            return push(Path(folder), name, private=private)

    def generate_in_parts(
        self,
        num: int,
        steps: int = 1,
        *,
        seed: int = 0,
        first: int = 0,
        dtype: str = "float32",
        batch: int = 0,
        callback: Callable[[Step], None] | None = None,
        **options: Any,
    ) -> Iterator[Generation]:
        """As `generate`, handing out parts that fit in memory, of at most `batch` passages."""
        options = self.family.check_options(options)
        numbers = {
            "num": (num, 1),
            "steps": (steps, 1),
            "batch": (batch, 0),
            "first": (first, 0),
            "seed": (seed, 0),
        }
        for name, (value, least) in numbers.items():
            if isinstance(value, bool) or not isinstance(value, Integral):
                raise ValueError(f"{name} must be a whole number, got {value!r}")
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        device = self.embedding.device
        compute, _ = resolve_dtype(dtype, device)
        elements = SAMPLE_ELEMENTS * (1 if device.type == "cpu" else ACCELERATED)
        size = max(1, elements // (self.length * max(self.embedding.shape[1], len(self.embedding) // 8)))
        size = min(size, batch or size)
        for start in range(0, num, size):
            with precision(device, compute):
                count = min(size, num - start)
                ask = Ask(count, self.length, steps, seed, first + start, self.sampling_clock, callback)
                part = self.family.sample(self.denoiser, ask, **options)
            tokens = part.tokens.cpu()
            yield Generation([self._text(row) for row in tokens.tolist()], tokens, part.nfe)

    def _text(self, row: list[int]) -> str:
        """The passage of a row; where passages were wrapped into rows, all that stands in it, one a line."""
        begin = self.data.get("bos", "")
        if self.data.get("rows") == "wrap":
            return "\n".join(self.tokenizer.decode_all(row, begin))
        return self.tokenizer.decode(self.tokenizer.opened(row, begin))

    def generate(self, num: int, steps: int = 1, **options: Any) -> list[str]:
        """num passages in `steps` network calls each, as texts.

        Args:
            num: how many; done in parts that fit in memory.
            steps: network calls per passage.
            options: seed, first, dtype, batch, callback, and those of the family's sampler (`family.options`): of
                flows gamma, prior_scale, temperature, last: see `flowlm.sample`. Passage i depends on (seed, first + i)
                alone.

        Raises:
            ValueError: numbers that are not whole or too small, options that the sampler does not have or that mean
                nothing.
        """
        return [text for part in self.generate_in_parts(num, steps, **options) for text in part.texts]


def describe_data(folder: Path) -> dict[str, Any]:
    """data.json of a run; empty for a model saved without one.

    Raises:
        ValueError: it is damaged.
    """
    path = folder / DATA
    if not path.exists():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{path} is damaged ({error}): remove it; what it says of the data is then not known"
        ) from None


def write_model_config(folder: Path, config: DenoiserConfig) -> None:
    """config.json: the format's version and what the denoiser is made of."""
    files.write_json(folder / "config.json", {"format": FORMAT, "model": to_dict(config)})


def read_model_config(folder: Path) -> DenoiserConfig:
    """The denoiser's config of a saved model.

    Raises:
        ValueError: no such folder, no config.json, another format, unknown keys.
    """
    path = folder / "config.json"
    if not folder.is_dir():
        raise ValueError(f"no run at {folder}: give a run directory, such as runs/grammar")
    if (folder / "meta.json").exists() and not path.exists():
        raise ValueError(
            f"{folder} is prepared text, not a model: train one on it with flowlm train RECIPE --data.path {folder}"
        )
    if not path.exists():
        raise ValueError(
            f"{folder} holds no config.json: it is not a run, or its first checkpoint was never finished; "
            "train again, or resume with flowlm train --resume if it has checkpoints"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} is damaged ({error}): restore it from the run's checkpoints folder"
        ) from None
    found = content.get("format") if isinstance(content, dict) else None
    if found != FORMAT:
        raise ValueError(
            f"{path} has format {found!r}, this version of flowlm reads {FORMAT!r}: "
            "it was written by another version, or by another program"
        )
    try:
        return from_dict(DenoiserConfig, as_it_was(content.get("model", {})), "model.")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def write_sampling_clock(folder: Path, clock: Clock | None) -> None:
    """clock.json: what the sampling grid is uniform in; nothing to keep but for an adaptive clock."""
    state: dict[str, Any] = {"sampling": "conditioning"}
    if isinstance(clock, AdaptiveClock):
        state = {"sampling": "adaptive", "floor": clock.floor, "memory": clock.memory}
        state |= {name: getattr(clock, name).tolist() for name in ("cdf", "total", "count")}
    files.write_json(folder / "clock.json", state)


def read_sampling_clock(folder: Path, base: Clock | None) -> Clock | None:
    """The sampling clock saved beside a model; None for the conditioning clock.

    Raises:
        ValueError: clock.json is damaged.
    """
    path = folder / "clock.json"
    if not path.exists():
        return None
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        if state["sampling"] == "conditioning":
            return None
        if base is None:
            raise KeyError("a clock, for a model that has none")
        clock = AdaptiveClock(base, len(state["total"]), state["floor"], state["memory"])
        for name in ("cdf", "total", "count"):
            getattr(clock, name).copy_(torch.tensor(state[name], dtype=torch.float64))
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(
            f"{path} is damaged ({error}): restore it from a checkpoint, or remove it to sample on the "
            "conditioning clock's grid"
        ) from None
    return clock
