"""What a run begins as: its model, which only data, teacher, or the run whose weights it starts from, say in full."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from torch import nn

from flowlm.config import RunConfig
from flowlm.data.tokens import Tokenizer
from flowlm.denoiser import DenoiserConfig
from flowlm.families import family
from flowlm.model import FlowLM, read_model_config

__all__ = ["instead", "load_teacher", "prepare_config"]


def _started(config: RunConfig) -> DenoiserConfig:
    """The model that starts from the weights of `config.init`. ValueError: it cannot."""
    kind, source = family(config.objective), read_model_config(Path(config.init))
    kind.check_source(config, source, config.init)
    return source if source.two_times else dataclasses.replace(source, **kind.fill(config))


def prepare_config(config: RunConfig, tokenizer: Tokenizer | None) -> RunConfig:
    """Fill in what only the data, the objective or the run it starts from know: vocabulary, family, second time."""
    model, kind = config.model, family(config.objective)
    if config.teacher:
        teacher = read_model_config(Path(config.teacher))
        kind.check_source(config, teacher, config.teacher)
        student = dataclasses.replace(teacher, **kind.fill(config))
        if model not in (DenoiserConfig(), student):
            raise ValueError(
                f"a student is made like its teacher {config.teacher}: leave out [model] and --model.* "
                f"(asked for: {', '.join(_differences(model, student))})"
            )
        if config.init:
            started = _started(config)
            if started != student:
                raise ValueError(
                    f"{config.init}, whose weights the student is to start from, is made otherwise than its teacher "
                    f"{config.teacher}: they differ in {', '.join(_differences(started, student)) or 'their tokens'}"
                )
        model = student
    elif config.init:
        model = _started(config)
    elif tokenizer is not None:
        if model.vocab_size not in (0, tokenizer.vocab_size):
            raise ValueError(
                f"model.vocab_size = {model.vocab_size}, but the data's tokenizer has {tokenizer.vocab_size} tokens: "
                "leave it out, set data.vocab_size, or name with data.tokenizer the one that has so many"
            )
        # A run that is resumed is what its config.toml says, wherever it once started.
        if not model.vocabulary:
            data: dict[str, Any] = {
                "vocab_size": tokenizer.vocab_size,
                "vocabulary": tokenizer.vocabulary_sha256,
            }
            model = dataclasses.replace(model, **data, **kind.fill(config))
    return dataclasses.replace(config, model=model)


def instead(asked: DenoiserConfig, model: DenoiserConfig) -> str:
    """What of the model that was asked for is not so."""
    differences = _differences(asked, model) if asked != DenoiserConfig() else []
    return f", not the recipe's: {', '.join(differences)}" if differences else ""


def _differences(model: DenoiserConfig, source: DenoiserConfig) -> list[str]:
    """Choices of a model in which it differs from another, but for what data and objective fill in."""
    model = dataclasses.replace(
        model,
        vocab_size=source.vocab_size,
        vocabulary=source.vocabulary,
        family=source.family,
        two_times=source.two_times,
        head_start=source.head_start,
    )
    return [
        f"{prefix}.{name} = {getattr(mine, name)!r} (the run has {getattr(other, name)!r})"
        for prefix, mine, other in (
            ("model", model, source),
            ("model.backbone", model.backbone, source.backbone),
        )
        for name in (field.name for field in dataclasses.fields(mine))
        if name != "backbone" and getattr(mine, name) != getattr(other, name)
    ]


def load_teacher(config: RunConfig) -> nn.Module | None:
    """The network of `config.teacher`, frozen; None where there is none."""
    if not config.teacher:
        return None
    return FlowLM.from_pretrained(config.teacher, weights="auto").denoiser.requires_grad_(False)
