"""`FlowLM`: saved, loaded strictly, and generated from, alike in any batch."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import flowlm
from flowlm import flows as flows_module
from flowlm import model as model_module
from flowlm.clock import AdaptiveClock
from flowlm.data.tokens import Tokenizer
from flowlm.files import sha256
from flowlm.model import FORMAT, FlowLM
from flowlm.samplers import Sample, Step, sample
from helpers import content, flm, fmlm, map_settings, tensors, trained

#: A config.json that names no field.
CONFIG = json.dumps({"format": FORMAT, "model": {}})


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A run that may be spoilt."""
    shutil.copytree(flm(), tmp_path / "run")
    return tmp_path / "run"


# ---------------------------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("run", [flm, fmlm])
def test_save_and_load(run: Callable[[], Path], tmp_path: Path) -> None:
    model = flowlm.FlowLM.from_pretrained(run())
    model.save_pretrained(tmp_path / "new" / "model")
    assert set(content(tmp_path / "new" / "model")) == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "clock.json",
        "data.json",
    }
    again = flowlm.FlowLM.from_pretrained(tmp_path / "new" / "model")
    assert again.denoiser.config == model.denoiser.config
    assert again.tokenizer.sha256 == model.tokenizer.sha256
    assert again.sampling_clock is None
    for name, value in model.denoiser.state_dict().items():
        assert torch.equal(again.denoiser.state_dict()[name], value), name
    assert again.generate(5, 3, seed=2) == model.generate(5, 3, seed=2)
    assert not again.denoiser.training
    again.save_pretrained(tmp_path / "twice")
    assert content(tmp_path / "twice") == content(tmp_path / "new" / "model")


def test_the_adaptive_clock_comes_along(tmp_path: Path) -> None:
    over = {"clock.kind": "adaptive", "clock.refit_every": 2, "train.steps": 4}
    run = trained(tmp_path / "run", map_settings(flm(), over))
    model = FlowLM.from_pretrained(run)
    model.save_pretrained(tmp_path / "model")
    again = FlowLM.from_pretrained(tmp_path / "model")
    one, other = model.sampling_clock, again.sampling_clock
    assert isinstance(one, AdaptiveClock)
    assert isinstance(other, AdaptiveClock)
    for name, value in one.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name
    seen: list[float] = []
    again.generate(1, 4, callback=lambda step: seen.append(step.t))
    assert seen == pytest.approx(other.time(torch.linspace(0, 1, 5, dtype=torch.float64))[:4].tolist())


def test_which_weights(copy: Path) -> None:
    auto, ema, raw = (FlowLM.from_pretrained(copy, weights=w) for w in ("auto", "ema", "model"))
    assert torch.equal(auto.embedding, tensors(copy / "ema.safetensors")["embedding"])
    assert torch.equal(auto.embedding, ema.embedding)
    assert torch.equal(raw.embedding, tensors(copy / "model.safetensors")["embedding"])
    assert not torch.equal(raw.embedding, ema.embedding)
    (copy / "ema.safetensors").unlink()
    assert torch.equal(FlowLM.from_pretrained(copy).embedding, raw.embedding)
    with pytest.raises(ValueError, match="weights = 'best': use 'auto', 'ema' or 'model'"):
        FlowLM.from_pretrained(copy, weights="best")


def test_attributes() -> None:
    model = FlowLM.from_pretrained(flm())
    assert model.embedding is model.denoiser.embedding
    assert model.embedding.shape == (model.tokenizer.vocab_size, 32)
    assert model.length == 12


# ------------------------------------------------------------------------------------------------ strict loading


def test_strict_loading_lists_every_key(copy: Path) -> None:
    state = tensors(copy / "ema.safetensors")
    state["surplus"] = torch.zeros(1)
    state["backbone.blocks.7.out.weight"] = torch.zeros(1)
    for name in ("head.bias", "backbone.norm.weight"):
        del state[name]
    state["embedding"] = state["embedding"][:5].contiguous()
    safetensors.torch.save_file(state, copy / "ema.safetensors")
    with pytest.raises(ValueError, match="do not fit the model") as caught:
        FlowLM.from_pretrained(copy)
    lines = str(caught.value).splitlines()
    assert str(copy / "ema.safetensors") in lines[0]
    assert lines[1] == "  missing: backbone.norm.weight, head.bias"
    assert lines[2] == "  unexpected: backbone.blocks.7.out.weight, surplus"
    assert lines[3] == "  shapes: embedding is (5, 32), expected (17, 32)"
    assert "config.json" in lines[4]


def test_an_fmlms_weights_do_not_pass_for_an_flms(copy: Path) -> None:
    shutil.copy(fmlm() / "ema.safetensors", copy / "ema.safetensors")
    with pytest.raises(
        ValueError, match=r"unexpected: end_embedding\.mlp\.0\.bias, end_embedding\.mlp\.0\.weight"
    ):
        FlowLM.from_pretrained(copy)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "config.json",
            None,
            "holds no config.json: it is not a run, or its first checkpoint was never finished",
        ),
        ("config.json", "{", "config.json is damaged"),
        ("config.json", "[]", "has format None"),
        (
            "config.json",
            '{"format": "flowlm/99", "model": {}}',
            "has format 'flowlm/99', this version .* reads",
        ),
        ("config.json", CONFIG.replace("{}", '{"widht": 3}'), "unknown key 'model.widht'"),
        (
            "config.json",
            CONFIG.replace("{}", "3"),
            "model is a section: expected a table, got 3",
        ),
        ("config.json", CONFIG.replace("{}", '{"length": "3"}'), "model.length must be int"),
        ("ema.safetensors", "not weights", "ema.safetensors is damaged or cut short"),
        ("tokenizer.json", None, "tokenizer.json does not exist"),
        ("tokenizer.json", "{", "tokenizer.json"),
        ("clock.json", "{", "clock.json is damaged .*remove it to sample on the conditioning clock's grid"),
        ("clock.json", "{}", "clock.json is damaged"),
        ("clock.json", '{"sampling": "adaptive", "total": 3}', "clock.json is damaged"),
    ],
)
def test_half_written_and_foreign_folders(name: str, text: str | None, message: str, copy: Path) -> None:
    if text is None:
        (copy / name).unlink()
    else:
        (copy / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        FlowLM.from_pretrained(copy)


def test_a_config_that_is_not_text_is_damaged(copy: Path) -> None:
    (copy / "config.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        FlowLM.from_pretrained(copy)


def test_missing_folders(tmp_path: Path, copy: Path) -> None:
    with pytest.raises(ValueError, match=r"no run at .*nowhere: give a run directory"):
        FlowLM.from_pretrained(tmp_path / "nowhere")
    for name in ("ema.safetensors", "model.safetensors"):
        (copy / name).unlink()
    with pytest.raises(ValueError, match=r"no weights at .*model\.safetensors"):
        FlowLM.from_pretrained(copy)


def test_the_tokenizer_of_another_run(copy: Path) -> None:
    Tokenizer.train_words(["three words here"]).save(copy)
    with pytest.raises(
        ValueError, match=r"the tokenizer has 5 tokens and the model 17: .* tokenizer of another run"
    ):
        FlowLM.from_pretrained(copy)


def test_saving_is_of_all_files_or_of_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """New weights beside an old configuration would be loaded, and be another model."""

    def fail(*args: object) -> None:
        raise OSError(28, os.strerror(28))

    model, other = FlowLM.from_pretrained(flm()), FlowLM.from_pretrained(fmlm())
    model.save_pretrained(tmp_path / "model")
    before = content(tmp_path / "model")
    with monkeypatch.context() as patch:
        patch.setattr(model_module, "write_sampling_clock", fail)
        for folder in ("model", "new"):
            with pytest.raises(OSError, match=rf"cannot write .*{folder}: No space left"):
                other.save_pretrained(tmp_path / folder)
    assert content(tmp_path / "model") == before
    assert not (tmp_path / "new").exists()
    # A kill while the files change places: a folder that is known to be none of either.
    replace = os.replace

    def killed(source: Path, target: Path) -> None:
        if Path(target) == tmp_path / "model" / "tokenizer.json":
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        other.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        FlowLM.from_pretrained(tmp_path / "model")


def test_weights_are_named_while_they_are_there(copy: Path) -> None:
    model, later = FlowLM.from_pretrained(copy), FlowLM.from_pretrained(copy)
    assert model.weights == f"ema.safetensors {sha256(copy / 'ema.safetensors')}"
    shutil.copy(copy / "ema.safetensors", copy / "new")
    os.replace(copy / "new", copy / "ema.safetensors")  # as a run that trains on
    assert later.weights is None
    assert model.weights is not None
    (copy / "ema.safetensors").unlink()
    assert FlowLM(model.denoiser, model.tokenizer).weights is None


def test_config_json(copy: Path) -> None:
    saved = json.loads((copy / "config.json").read_text())
    assert saved["format"] == FORMAT
    assert saved["model"]["backbone"]["width"] == 32


# ----------------------------------------------------------------------------------------------------- generation


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 1},
        {"steps": 4},
        {"steps": 3, "gamma": 0.7},
        {"steps": 2, "last": "categorical", "temperature": 0.8, "prior_scale": 0.9},
    ],
)
@pytest.mark.parametrize("run", [flm, fmlm])
def test_passage_i_is_the_same_in_any_batch(run: Callable[[], Path], options: dict[str, Any]) -> None:
    model = FlowLM.from_pretrained(run())
    texts = model.generate(9, seed=5, **options)
    assert len(set(texts)) > 1
    for batch in (1, 2, 4, 100):
        assert model.generate(9, seed=5, batch=batch, **options) == texts
    assert model.generate(3, seed=5, first=6, **options) == texts[6:]
    assert model.generate(9, seed=6, **options) != texts


def test_parts_are_numbered_through(monkeypatch: pytest.MonkeyPatch) -> None:
    model = FlowLM.from_pretrained(flm())
    calls: list[tuple[int, int]] = []

    def recorded(denoiser: Any, num: int, *args: Any, **options: Any) -> Sample:
        calls.append((options["first"], num))
        return sample(denoiser, num, *args, **options)

    monkeypatch.setattr(flows_module, "sample", recorded)
    parts = list(model.generate_in_parts(10, 2, first=7, batch=4))
    assert calls == [(7, 4), (11, 4), (15, 2)]
    assert [len(part.texts) for part in parts] == [4, 4, 2]
    assert [tuple(part.tokens.shape) for part in parts] == [(4, 12), (4, 12), (2, 12)]
    assert {part.nfe for part in parts} == {2}
    for part in parts:
        assert part.texts == [model.tokenizer.decode(row) for row in part.tokens]


@pytest.mark.parametrize(("elements", "size"), [(12 * 32 * 3, 3), (1, 1), (2**22, 2**22 // (12 * 32))])
def test_more_samples_than_fit_in_memory_are_made_in_parts(
    elements: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any number may be asked for; the parts that reach the sampler stay bounded, and come one at a time."""
    model = FlowLM.from_pretrained(flm())
    calls: list[int] = []

    def recorded(denoiser: Any, num: int, length: int, *args: Any, **options: Any) -> Sample:
        calls.append(num)
        return Sample(torch.zeros(min(num, 3), length, dtype=torch.long), 1)

    monkeypatch.setattr(flows_module, "sample", recorded)
    monkeypatch.setattr(model_module, "SAMPLE_ELEMENTS", elements)
    parts = model.generate_in_parts(10**12, 1)
    for _ in range(3):
        next(parts)
    assert calls == [size] * 3


def test_wide_vocabularies_make_smaller_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    for vocab in (17, 50_000):
        model = FlowLM.from_pretrained(flm())
        model.denoiser.embedding = torch.nn.Parameter(torch.zeros(vocab, 32))

        def stop(denoiser: Any, num: int, *args: Any, **options: Any) -> Sample:
            sizes.append(num)
            raise StopIteration

        monkeypatch.setattr(flows_module, "sample", stop)
        with pytest.raises(RuntimeError):
            next(model.generate_in_parts(10**9, 1))
    assert sizes == [2**22 // (12 * 32), 2**22 // (12 * 50_000 // 8)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num": 0}, "num must be at least 1, got 0"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"steps": -2}, "steps must be at least 1, got -2"),
        ({"gamma": 1.5}, r"gamma must lie in \[0, 1\], got 1.5"),
        ({"gamma": -0.1}, r"gamma must lie in \[0, 1\], got -0.1"),
        ({"prior_scale": 0.0}, "prior_scale must be positive"),
        ({"temperature": -1.0}, "temperature must be positive"),
        ({"last": "best"}, "last = 'best'"),
        ({"dtype": "half"}, "unknown dtype 'half'"),
    ],
)
def test_options_that_mean_nothing(options: dict[str, Any], message: str) -> None:
    model = FlowLM.from_pretrained(flm())
    with pytest.raises(ValueError, match=message):
        model.generate(**{"num": 2} | options)


def test_the_callback_sees_every_call() -> None:
    seen: list[Step] = []
    FlowLM.from_pretrained(flm()).generate(2, 3, callback=seen.append)
    assert [step.index for step in seen] == [0, 1, 2]
    assert all(step.y.shape == (2, 12, 32) for step in seen)


def test_bfloat16_generation_says_what_it_is() -> None:
    model = FlowLM.from_pretrained(flm())
    dtypes = []
    for name in ("float32", "bfloat16"):
        model.generate(1, 1, dtype=name, callback=lambda step: dtypes.append(step.posterior.hidden.dtype))
    assert dtypes == [torch.float32, torch.bfloat16]


def test_a_tokenizer_made_elsewhere_is_saved_with_the_model(tmp_path: Path) -> None:
    denoiser = FlowLM.from_pretrained(flm()).denoiser
    pieces = ["[UNK]", "[SEP]", *"abcdefghijklmn", "##a"]
    (tmp_path / "vocab.txt").write_text("\n".join(pieces[: denoiser.config.vocab_size - 1]), encoding="utf-8")
    tokenizer = Tokenizer.read(tmp_path)  # adds a pad
    denoiser.config = replace(denoiser.config, vocabulary=tokenizer.vocabulary_sha256)
    model = FlowLM(denoiser, tokenizer)
    model.save_pretrained(tmp_path / "model")
    again = FlowLM.from_pretrained(tmp_path / "model")
    assert again.tokenizer.sha256 == tokenizer.sha256
    assert again.generate(3, 2, seed=1) == model.generate(3, 2, seed=1)


def test_the_tokenizer_must_fit() -> None:
    model = FlowLM.from_pretrained(flm())
    with pytest.raises(ValueError, match="the tokenizer has 5 tokens and the model 17"):
        FlowLM(model.denoiser, Tokenizer.train_words(["three words here"]))
