"""Published checkpoints: their weights here give their own outputs; what a file names is never run."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flowlm import FlowLM
from flowlm.cli import main
from flowlm.data.tokens import Tokenizer
from flowlm.inert import Inert, StoredTensor, plain, read_torch_file
from flowlm.published import convert, our_name
from helpers import REAL

V, L, D, BLOCKS, HEADS, COND = 97, 12, 64, 2, 4, 32
ANGLES = "backbone.rotary_emb.inv_freq"


def tokenizer() -> Tokenizer:
    words = " ".join(f"w{i:02d}" for i in range(V - 2))
    out = Tokenizer.train_words([words])
    assert out.vocab_size == V
    return out


def parameters(two_times: bool) -> OrderedDict[str, Tensor]:
    """Random weights by their published names, in the order of the module."""
    gen = torch.Generator().manual_seed(int(two_times))

    def random(*shape: int) -> Tensor:
        return 0.1 * torch.randn(shape, generator=gen)

    out: OrderedDict[str, Tensor] = OrderedDict()
    out["vocab_embed.embedding"] = random(V, D)
    for name in ("sigma_map", *["sigma_map_prime"] * two_times):
        for i, wide in ((0, 256), (2, COND)):
            out[f"{name}.mlp.{i}.weight"], out[f"{name}.mlp.{i}.bias"] = random(COND, wide), random(COND)
    out["rotary_emb.inv_freq"] = 1e4 ** -(torch.arange(0, D // HEADS, 2) / (D // HEADS))
    for i in range(BLOCKS):
        block = {"norm1.weight": (D,), "attn_qkv.weight": (3 * D, D), "attn_out.weight": (D, D)}
        block |= {"norm2.weight": (D,), "mlp.0.weight": (4 * D, D), "mlp.0.bias": (4 * D,)}
        block |= {"mlp.2.weight": (D, 4 * D), "mlp.2.bias": (D,)}
        block |= {"adaLN_modulation.weight": (6 * D, COND), "adaLN_modulation.bias": (6 * D,)}
        out |= {f"blocks.{i}.{name}": random(*shape) for name, shape in block.items()}
    out["output_layer.norm_final.weight"] = random(D)
    out["output_layer.linear.weight"], out["output_layer.linear.bias"] = random(V, D), random(V)
    out["output_layer.adaLN_modulation.weight"] = random(2 * D, COND)
    out["output_layer.adaLN_modulation.bias"] = random(2 * D)
    return out


def content(two_times: bool = True) -> dict[str, Any]:
    """A checkpoint of the published form."""
    raw = parameters(two_times)
    return {
        "state_dict": OrderedDict((f"backbone.{name}", value) for name, value in raw.items()),
        "ema": {
            "decay": 0.9999,
            "shadow_params": [value + 1 for name, value in raw.items() if name != "rotary_emb.inv_freq"],
        },
        "global_step": 7,
        "hyper_parameters": {"vocab_size": V, "n_heads": HEADS, "length": L},
    }


def saved(folder: Path, what: Any) -> Path:
    torch.save(what, folder / "last.ckpt")
    return folder / "last.ckpt"


# --- the golden vectors --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["flm", "fmlm"])
@pytest.mark.parametrize("weights", ["raw", "averaged"])
def test_golden_outputs(tmp_path: Path, kind: str, weights: str) -> None:
    """The published architecture's own log-probabilities, through the state y = xE."""
    from safetensors.torch import load_file

    golden = REAL / "official_golden"
    if not golden.is_dir():
        pytest.skip(f"no golden vectors at {golden}")
    said: list[str] = []
    model = convert(
        golden / f"golden_{kind}.ckpt", tmp_path / "out", tokenizer(), weights=weights, say=said.append
    )
    for part in (f"V = {V}", f"L = {L}", "2 blocks of 4 heads", "of step 1,000", "logits capped at 30"):
        assert part in said[0]
    vectors = {
        name.removeprefix(f"{kind}."): value
        for name, value in load_file(golden / "golden.safetensors").items()
        if name.startswith(f"{kind}.")
    }
    net = model.denoiser
    times = [net.clock.time(vectors[name].double()) for name in ("tau", "tau_end") if name in vectors]
    with torch.no_grad():
        got = net(vectors["x"] @ net.embedding, *times).log_probs()
    wanted = vectors["log_probs" if weights == "raw" else "ema.log_probs"]
    likely = wanted > -8
    torch.testing.assert_close(got[likely], wanted[likely], atol=1e-5, rtol=0)
    # They are as far as 4e-5 from this in float64, where they are -59: float32's rounding, theirs.
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(got.exp(), wanted.exp(), atol=1e-5, rtol=0)


# --- conversion ----------------------------------------------------------------------------------


@pytest.mark.parametrize("two_times", [False, True])
@pytest.mark.parametrize("weights", ["raw", "averaged"])
def test_every_weight_finds_its_place(tmp_path: Path, two_times: bool, weights: str) -> None:
    what = content(two_times)
    model = convert(saved(tmp_path, what), tmp_path / "out", tokenizer(), weights=weights)
    got = dict(model.denoiser.named_parameters())
    raw = parameters(two_times)
    raw.pop("rotary_emb.inv_freq")
    assert {our_name(name) for name in raw} == got.keys()
    for name, value in raw.items():
        assert torch.equal(got[our_name(name)], value + (weights == "averaged")), name
    config = model.denoiser.config
    assert (config.two_times, config.length, config.vocab_size) == (two_times, L, V)
    assert (config.backbone.heads, config.backbone.depth, config.backbone.mlp_ratio) == (HEADS, BLOCKS, 4)
    assert (config.logit_softcap, config.backbone.attention_softcap) == (30, 50)


def test_a_converted_model_writes_teaches_and_trains_on(tmp_path: Path, capsys: Any) -> None:
    torch.manual_seed(0)
    (tmp_path / "words.txt").write_text("\n".join(f"w{i:02d} w{i + 1:02d}" for i in range(93)))
    tokenizer().save(tmp_path / "tokens")
    flm, fmlm = content(False), content(True)
    for name, what in (("flm", flm), ("fmlm", fmlm)):
        path = saved(tmp_path, what)
        asked = ["convert", str(path), str(tmp_path / name), "--tokenizer", str(tmp_path / "tokens")]
        assert main([*asked, "--weights", "raw"]) == 0
        assert main(["generate", str(tmp_path / name), "--num", "2", "--steps", "2"]) == 0
    capsys.readouterr()
    asked = ["evaluate", str(tmp_path / "fmlm"), "--steps", "1", "--num", "4"]
    assert main(asked) == 0  # of what it was trained on nothing is known
    assert "--data.path: no perplexity" in capsys.readouterr().err
    found = tmp_path / "found.json"
    by_text = ["--data.path", str(tmp_path / "words.txt"), "--frontier", "--json", str(found)]
    assert main([*asked, *by_text]) == 0
    own = json.loads(found.read_text())[0]
    assert own["perplexity"] > 1
    assert own["frontier"]["entropy"] > 0
    assert 0 <= own["copied"] <= 1
    text = ["--data.corpus", "text", "--data.path", str(tmp_path / "words.txt"), "--train.steps", "2"]
    text += [
        "--train.batch",
        "4",
        "--data.tokenizer",
        str(tmp_path / "tokens"),
        "--data.rows",
        "cut",
        "--data.vocab-size",
        "0",
    ]
    assert main(["train", "text", "--init", str(tmp_path / "flm"), "--out", str(tmp_path / "on"), *text]) == 0
    assert (
        main(
            [
                "distill",
                "text-fmlm",
                "--teacher",
                str(tmp_path / "flm"),
                "--out",
                str(tmp_path / "student"),
                *text,
            ]
        )
        == 0
    )
    assert FlowLM.from_pretrained(tmp_path / "on").denoiser.config.backbone.attention_softcap == 50
    assert main(["evaluate", str(tmp_path / "student"), "--steps", "1", "--num", "4"]) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("ema"), "no averaged weights: take the others with --weights raw"),
        (lambda c: c["ema"]["shadow_params"].pop(), "averages 33 tensors, and the network has 34"),
        (lambda c: c["ema"]["shadow_params"].reverse(), "has another shape"),
        (lambda c: c.pop("state_dict"), "no Lightning checkpoint"),
        (lambda c: c["state_dict"].pop("backbone.vocab_embed.embedding"), "missing: vocab_embed.embedding"),
        (lambda c: c["state_dict"].update({"backbone.new.weight": torch.ones(2)}), "unknown: new.weight"),
        (lambda c: c["state_dict"].pop("backbone.output_layer.linear.bias"), "the network has 33"),
        (lambda c: c["hyper_parameters"].update(n_heads=8), "settings say n_heads = 8, its tensors 4"),
        (lambda c: c["hyper_parameters"].update(algo="mdlm"), "settings say algo = 'mdlm', whose tensors"),
        (lambda c: c["hyper_parameters"].update(config={"algo": {"name": "duo_base"}}), "algo = 'duo_base'"),
        (lambda c: c["hyper_parameters"].pop("length"), "give --length"),
        (lambda c: c["ema"]["shadow_params"][0].fill_(float("nan")), "not finite"),
        (lambda c: c.update(hyper_parameters=[1, 2]), "give --length"),
        (lambda c: c["state_dict"].update({3: torch.ones(2)}), "no Lightning checkpoint"),
        (
            lambda c: c["state_dict"].update({ANGLES: torch.ones(())}),
            r"have shapes .* it is damaged",
        ),
        (
            lambda c: c["state_dict"].update({"backbone.vocab_embed.embedding": torch.ones(V, 0)}),
            r"have shapes .* it is damaged",
        ),
        (
            lambda c: c["state_dict"].update({"backbone.sigma_map.mlp.2.weight": torch.ones(())}),
            "its first block or its times have no MLP",
        ),
        (
            lambda c: c["state_dict"].update({"backbone.blocks.0.mlp.0.weight": torch.ones(())}),
            "its first block or its times have no MLP",
        ),
        (
            lambda c: c["state_dict"].update({ANGLES: torch.ones(0)}),
            r"have shapes .* it is damaged",
        ),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, change: Any, message: str) -> None:
    what = content()
    change(what)
    with pytest.raises(ValueError, match=message):
        convert(saved(tmp_path, what), tmp_path / "out", tokenizer())
    assert not (tmp_path / "out").exists()


def test_sizes_are_checked(tmp_path: Path) -> None:
    path = saved(tmp_path, content())
    with pytest.raises(ValueError, match="the model has 97 tokens and the tokenizer 14"):
        convert(path, tmp_path / "out", Tokenizer.train_words(["a b c d e f g h i j k l"]))
    with pytest.raises(ValueError, match="passages of 12 tokens, and 16 were asked for"):
        convert(path, tmp_path / "out", tokenizer(), length=16)
    with pytest.raises(ValueError, match="use 'averaged' or 'raw'"):
        convert(path, tmp_path / "out", tokenizer(), weights="ema")


def test_the_command_asks_for_what_is_missing(tmp_path: Path, capsys: Any) -> None:
    assert main(["convert"]) == 1
    assert "give first a checkpoint" in capsys.readouterr().err
    assert main(["convert", "last.ckpt", "out"]) == 1
    assert "give the tokenizer it was trained with" in capsys.readouterr().err
    tokenizer().save(tmp_path)
    assert main(["convert", "gone.ckpt", "out", "--tokenizer", str(tmp_path)]) == 1
    assert "gone.ckpt does not exist" in capsys.readouterr().err


def test_a_checkpoint_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is fetched by its name there, of the revision that is asked for; what is not there is told."""
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    there = saved(tmp_path, content())
    tokenizer().save(tmp_path)
    asked: list[tuple[str, str, str | None]] = []

    def fetch(repository: str, name: str, *, revision: str | None = None) -> str:
        asked.append((repository, name, revision))
        if name != "checkpoints/fmlm.ckpt":
            raise EntryNotFoundError("there is no such file")
        return str(there)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    given = ["--hub", "somebody/flows@abc", "--tokenizer", str(tmp_path)]
    out = tmp_path / "out"
    assert main(["convert", "checkpoints/fmlm.ckpt", str(out), *given]) == 0
    assert asked == [("somebody/flows", "checkpoints/fmlm.ckpt", "abc")]
    assert len(FlowLM.from_pretrained(out).generate(num=2, steps=1)) == 2
    capsys.readouterr()
    assert main(["convert", "gone.ckpt", str(tmp_path / "other"), *given]) == 1
    assert "the hub refuses gone.ckpt of somebody/flows" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


# --- reading without running ---------------------------------------------------------------------


class Hostile:
    """Its pickle has a command run."""

    def __init__(self, command: str):
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


class Settings:
    """An object of a class that whoever reads it need not have."""

    def __init__(self, **values: Any):
        self._content = values


def test_nothing_is_run(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    command = f"touch {mark}"
    what = content() | {"hostile": Hostile(command), "callbacks": [{"at": Hostile(command)}]}
    path = saved(tmp_path, what)
    read = read_torch_file(path)
    assert isinstance(read["hostile"], Inert)
    assert read["hostile"].args == (command,)
    convert(path, tmp_path / "out", tokenizer())
    assert not mark.exists()
    # The file does what it says elsewhere.
    torch.load(path, weights_only=False)
    assert mark.exists()


@pytest.mark.parametrize(
    "program",
    [
        b"cos\nsystem\n(S'touch MARK'\ntR.",
        b"(S'touch MARK'\nios\nsystem\n.",
        b"(cos\nsystem\nS'touch MARK'\no.",
        b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x0atouch MARK\x85R.",
        b'c__builtin__\neval\n(S\'__import__("os").system("touch MARK")\'\ntR.',
        b"\x80\x04\x8c\x09posixpath\x8c\x09os.system\x93\x8c\x0atouch MARK\x85R.",
    ],
    ids=["GLOBAL", "INST", "OBJ", "STACK_GLOBAL", "eval", "dotted"],
)
def test_no_opcode_reaches_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: bytes) -> None:
    monkeypatch.chdir(tmp_path)
    with zipfile.ZipFile("hostile.ckpt", "w") as archive:
        archive.writestr("last/data.pkl", program)
    assert isinstance(read_torch_file(Path("hostile.ckpt")), Inert)
    assert not Path("MARK").exists()
    pickle.loads(program)
    assert Path("MARK").exists()


def test_settings_are_read_as_data(tmp_path: Path) -> None:
    what = content()
    what["hyper_parameters"] = {
        "config": Settings(model=Settings(length=L, n_heads=HEADS, dropout=0.25), other=[1, "two", None]),
        "tokenizer": Settings(),
    }
    path = saved(tmp_path, what)
    said = plain(read_torch_file(path)["hyper_parameters"])
    assert said["config"] == {
        "model": {"length": L, "n_heads": HEADS, "dropout": 0.25},
        "other": [1, "two", None],
    }
    model = convert(path, tmp_path / "out", tokenizer())
    assert (model.length, model.denoiser.config.backbone.dropout) == (L, 0.25)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool])
def test_tensors_as_they_were(tmp_path: Path, dtype: torch.dtype) -> None:
    whole = torch.arange(24).view(2, 3, 4).to(dtype)
    kept = {"whole": whole, "turned": whole.permute(2, 0, 1), "part": whole[1, 1:], "none": whole[:0]}
    kept["parameter"] = torch.nn.Parameter(whole, requires_grad=False)
    read = read_torch_file(saved(tmp_path, kept))
    for name, value in kept.items():
        assert isinstance(read[name], StoredTensor)
        got = read[name].load()
        assert got.dtype == dtype
        assert torch.equal(got, value), name


def test_damaged_files(tmp_path: Path) -> None:
    path = saved(tmp_path, content())
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="cut short"):
        convert(path, tmp_path / "out", tokenizer())
    path.write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match=r"no checkpoint of torch\.save"):
        convert(path, tmp_path / "out", tokenizer())
    # One flipped bit in the numbers.
    at = whole.index(parameters(True)["vocab_embed.embedding"].numpy().tobytes())
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    with pytest.raises(ValueError, match="damaged"):
        convert(path, tmp_path / "out", tokenizer(), weights="raw")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("last/other", b"")
    with pytest.raises(ValueError, match=r"no data\.pkl"):
        convert(path, tmp_path / "out", tokenizer())
    assert not (tmp_path / "out").exists()


def test_a_tensor_beyond_its_numbers() -> None:
    storage: Any = type("S", (), {"numel": 5})()
    wrong: list[Any] = [(0, (2, 3), (3, 1)), (-1, (2,), (1,)), (0, (2,), (-1,)), (5, (1,), (1,))]
    wrong += [(0, (2,), ("1",)), ("0", (2,), (1,)), (0, (2, 2), (1,)), (0, (None,), (1,))]
    for offset, shape, stride in wrong:
        stored = StoredTensor(lambda _: torch.zeros(5), storage, offset, shape, stride)
        with pytest.raises(ValueError, match="reaches beyond its 5 numbers"):
            stored.load()


def test_rows_of_a_published_model_are_told_as_they_were_framed(tmp_path: Path) -> None:
    """OpenWebText's begin with the token that ends a passage: without that being known, all would be empty."""
    from tokenizers import Tokenizer as Plain
    from tokenizers.models import WordLevel

    for begin, end in (("[CLS]", "[SEP]"), ("<|endoftext|>", "<|endoftext|>")):
        words = list(dict.fromkeys([begin, end, "[PAD]"]))
        words += [f"w{i:02d}" for i in range(V - len(words))]
        Plain(WordLevel({word: i for i, word in enumerate(words)})).save(str(tmp_path / "tokenizer.json"))
        tokens = Tokenizer.read(str(tmp_path / "tokenizer.json"), eos=end, pad="[PAD]")
        model = convert(saved(tmp_path, content()), tmp_path / end.strip("[]<|>"), tokens)
        ids = [tokens.id(word) for word in (begin, "w01", "w02", end, "w03", end)]
        assert model._text(ids).split() == ["w01", "w02", "w03"]
