"""Tokenizers made elsewhere: the ids of the reference, kept; saved and loaded; what is damaged is refused."""

from __future__ import annotations

import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Model

from flowlm.data.tokens import EOS, PAD, Tokenizer
from helpers import REAL
from references import Gpt2, bert_words, byte_signs, gpt2_words, wordpiece

TEXTS = ("news.txt", "wiki.valid.raw", "tinystories.txt")
LINES = 1500  # of each text

# [PAD] not first, so that nothing passes by 0 being what it is by chance
PIECES = [
    "[unused0]",
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    *"abcdefgh.,!?'-[]<>|/",
    "##a",
    "##b",
    "##e",
]
PIECES += [
    "the",
    "cat",
    "cafe",
    "bad",
    "##d",
    "##ge",
    "##ged",
    "北",
    "京",
    "σ",
    "##σ",
    "1",
    "##1",
    "sep",
    "pad",
]
CASED = [*PIECES, "A", "The", "##A", "é", "##é"]

MERGES = [
    ("t", "h"),
    ("th", "e"),
    ("Ġ", "the"),
    ("a", "t"),
    ("c", "at"),
    ("Ġ", "cat"),
    ("Ã", "©"),
    ("e", "r"),
]
MERGES += [("Ġ", "a"), ("e", "e"), ("ee", "e"), ("1", "1"), ("Ġ", "Ġ"), ("ĠĠ", "ĠĠ"), ("'", "s"), ("a", "a")]
GPT2 = {piece: id for id, piece in enumerate([*byte_signs(), *map("".join, MERGES), "<|endoftext|>"])}


def _bert(folder: Path, pieces: Sequence[str] = PIECES, **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(pieces) + "\n", encoding="utf-8")
    if config:
        _write(folder / "tokenizer_config.json", config)
    return folder


def _gpt2(
    folder: Path,
    names: tuple[str, str] = ("encoder.json", "vocab.bpe"),
    vocab: dict[str, Any] = GPT2,
    merges: Sequence[tuple[str, ...]] = MERGES,
    **config: Any,
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / names[0], vocab)
    lines = ["#version: 0.2", *map(" ".join, merges)]
    (folder / names[1]).write_text("\n".join(lines) + "\n", encoding="utf-8")
    if config:
        _write(folder / "tokenizer_config.json", config)
    return folder


def _write(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def _described(folder: Path, model: Model, **changes: Any) -> Path:
    """A tokenizer.json of `model`, some of its parts replaced."""
    return _write(folder / "tokenizer.json", json.loads(model.to_str()) | changes)


def _whitespace(*tokens: str, unk: str = "<unk>") -> Model:
    model = Model(models.WordLevel({token: id for id, token in enumerate(tokens)}, unk_token=unk))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return model


def _unigram(**options: Any) -> Model:
    pieces = [
        ("<unk>", 0.0),
        ("</s>", 0.0),
        ("<pad>", 0.0),
        ("▁", -2.0),
        ("a", -3.0),
        ("b", -3.0),
        ("▁ab", -1.5),
    ]
    model = Model(models.Unigram(pieces, unk_id=0, **options))
    model.pre_tokenizer = pre_tokenizers.Metaspace()
    model.decoder = decoders.Metaspace()
    return model


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    folder = tmp_path_factory.mktemp("small")
    return {
        "bert": Tokenizer.read(_bert(folder / "bert")),
        "cased": Tokenizer.read(_bert(folder / "cased", CASED)),
        "gpt2": Tokenizer.read(_gpt2(folder / "gpt2")),
        "unigram": Tokenizer.read(_described(folder, _unigram())),
        "wordlevel": Tokenizer.read(_described(folder, _whitespace("<unk>", "<eos>", "a", "b"))),
    }


def _real(name: str) -> Path:
    path = REAL / name
    if not path.exists():
        pytest.skip(f"{name} is not here: real files are used where they lie beside the project")
    return path


def _lines(name: str) -> list[str]:
    return _real(name).read_text(encoding="utf-8").split("\n")[:LINES]


@pytest.fixture(scope="module")
def bert() -> Tokenizer:
    return Tokenizer.read(_real("bert-base-uncased"))


@pytest.fixture(scope="module")
def gpt2() -> Tokenizer:
    return Tokenizer.read(_real("gpt2"))


# ----------------------------------------------------------------------------------- ids are the reference's


@pytest.mark.parametrize("name", TEXTS)
def test_real_wordpiece_gives_the_reference_ids(bert: Tokenizer, name: str) -> None:
    pieces = _real("bert-base-uncased/vocab.txt").read_text(encoding="utf-8").splitlines()
    vocab = {piece: id for id, piece in enumerate(pieces)}
    lines = _lines(name)
    assert bert.encode(lines) == [wordpiece(line, vocab) for line in lines]


@pytest.mark.parametrize("name", TEXTS)
def test_real_gpt2_gives_the_reference_ids_and_text(gpt2: Tokenizer, name: str) -> None:
    vocab = json.loads(_real("gpt2/encoder.json").read_text(encoding="utf-8"))
    lines = _real("gpt2/vocab.bpe").read_text(encoding="utf-8").split("\n")[1:-1]
    first, second = zip(*(line.split() for line in lines))
    reference = Gpt2(vocab, list(zip(first, second)))
    # with line ends, so that white space of more than one kind is met
    texts = ["\n".join(group) for group in zip(*[iter(_lines(name))] * 3)]
    ids = gpt2.encode(texts)
    assert ids == [reference.encode(text) for text in texts]
    assert [gpt2.decode(row) for row in ids] == texts


def test_real_special_tokens(bert: Tokenizer, gpt2: Tokenizer) -> None:
    assert (bert.kind, bert.vocab_size, bert.eos_id, bert.pad_id, bert.unk_id) == (
        "wordpiece",
        30522,
        102,
        0,
        100,
    )
    assert bert.encode(["Hello world"]) == [[7592, 2088]]
    assert (gpt2.kind, gpt2.vocab_size, gpt2.eos_id, gpt2.pad_id, gpt2.unk_id) == (
        "bpe",
        50258,
        50256,
        50257,
        None,
    )
    assert gpt2.encode(["Hello world"]) == [[15496, 995]]
    assert gpt2.losses == ""


NASTY = "theTHE cataédgeb.,!?'- \t\n\u00a0\u3000[]<>|/北京σΣΟİſ1１\u00ad\u200b\u0301\x00\x1c�$^~«»–"


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet=NASTY, max_size=30) | st.lists(st.sampled_from(PIECES), max_size=8).map(" ".join))
@example("a" * 100 + " " + "a" * 101)
@example("[SEP] [PAD] ##d The café 北京ab")
def test_wordpiece_is_longest_match_of_the_basic_tokenizer(small: dict[str, Tokenizer], text: str) -> None:
    for name, pieces, lower in (("bert", PIECES, True), ("cased", CASED, False)):
        vocab = {piece: id for id, piece in enumerate(pieces)}
        assert small[name].encode([text]) == [wordpiece(text, vocab, lower)]


ASSIGNED = st.text(
    st.characters(exclude_categories=("Cs", "Cn"))
)  # new signs: as each Unicode version has it


@settings(max_examples=300, deadline=None)
@given(ASSIGNED | st.text(alphabet="the catéer11's \n\t\x1c\u3000", max_size=40))
@example("<|endoftext|>[PAD]  the   cat's 11  ")
def test_gpt2_merges_as_the_reference(small: dict[str, Tokenizer], text: str) -> None:
    assert small["gpt2"].encode([text]) == [Gpt2(GPT2, MERGES).encode(text)]


def test_the_references_do_what_is_published() -> None:
    assert bert_words("UNwanted, running\n naïve 北京") == ["unwanted", ",", "running", "naive", "北", "京"]
    vocab = {
        piece: id for id, piece in enumerate(["[UNK]", "want", "##want", "##ed", "wa", "un", "runn", "##ing"])
    }
    assert wordpiece("unwanted running unwantedX", vocab) == [5, 2, 3, 6, 7, 0]
    assert list(gpt2_words("Hello  world's 42 end.\n\n x ")) == [
        "Hello",
        " ",
        " world",
        "'s",
        " 42",
        " end",
        ".",
        "\n\n",
        " x",
        " ",
    ]


# -------------------------------------------------------------------------------------------------------- laws


@settings(max_examples=400, deadline=None)
@given(st.text() | st.sampled_from(["<|endoftext|>", "a[PAD] ", " \n\r\x00", "\ufeff\u200d", "e\u0301Ġ"]))
def test_byte_level_text_comes_back(small: dict[str, Tokenizer], text: str) -> None:
    ids = small["gpt2"].encode([text])[0]
    assert small["gpt2"].decode(ids) == text
    assert not {small["gpt2"].eos_id, small["gpt2"].pad_id} & set(ids)


@settings(max_examples=400, deadline=None)
@given(st.text(alphabet=NASTY, max_size=30) | st.lists(st.sampled_from(PIECES), max_size=8).map(" ".join))
def test_wordpiece_text_is_read_again_as_the_same_pieces(small: dict[str, Tokenizer], text: str) -> None:
    for name in ("bert", "cased"):
        ids = small[name].encode([text])[0]
        if small[name].unk_id not in ids:
            assert small[name].encode([small[name].decode(ids)]) == [ids]


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="abcdefghijklmnopqrstuvwxyz ", max_size=80))
def test_real_wordpiece_keeps_lower_case_words(bert: Tokenizer, text: str) -> None:
    assert bert.decode(bert.encode([text])[0]) == " ".join(text.split())


def test_real_wordpiece_text_is_read_again_as_the_same_pieces(bert: Tokenizer) -> None:
    lines = [line for name in TEXTS for line in _lines(name)]
    known = [ids for ids in bert.encode(lines) if bert.unk_id not in ids]
    assert len(known) > 0.9 * len(lines)
    assert bert.encode([bert.decode(ids) for ids in known]) == known


def test_wordpiece_is_written_as_words(small: dict[str, Tokenizer]) -> None:
    tokenizer = small["bert"]
    ids = tokenizer.encode(["The Badged CAFÉ - a cat's bad, bad!"])[0]
    assert tokenizer.decode(ids) == "the badged cafe - a cat ' [UNK] bad, bad!"
    assert [tokenizer.token(i) for i in ids[:4]] == ["the", "bad", "##ged", "cafe"]
    assert tokenizer.decode([*ids[:3], tokenizer.eos_id, *ids]) == "the badged"
    assert tokenizer.decode([*ids[:3], tokenizer.pad_id]) == "the badged"
    assert tokenizer.decode([ids[0], tokenizer.pad_id, ids[3]]) == "the [PAD] cafe"


KINDS = pytest.mark.parametrize("kind", ["bert", "cased", "gpt2", "unigram", "wordlevel"])


@KINDS
def test_saved_loaded_and_pickled(small: dict[str, Tokenizer], kind: str, tmp_path: Path) -> None:
    tokenizer = small[kind]
    tokenizer.save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"tokenizer.json", "tokenizer_config.json"}
    texts = ["the cat's a b", "ab ab", "<|endoftext|> [SEP] [PAD] <pad> é  "]
    copies = [Tokenizer.load(tmp_path), Tokenizer.read(tmp_path), pickle.loads(pickle.dumps(tokenizer))]
    for again in copies:
        for name in (
            "sha256",
            "vocabulary_sha256",
            "kind",
            "losses",
            "vocab_size",
            "eos_id",
            "pad_id",
            "unk_id",
        ):
            assert getattr(again, name) == getattr(tokenizer, name), name
        assert again.encode(texts) == tokenizer.encode(texts)
        assert [again.decode(row) for row in again.encode(texts)] == [
            tokenizer.decode(row) for row in tokenizer.encode(texts)
        ]


def test_a_plain_tokenizer_saved_over_another_leaves_no_names(
    small: dict[str, Tokenizer], tmp_path: Path
) -> None:
    small["bert"].save(tmp_path)
    words = Tokenizer.train_words(["three words here"])
    words.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]
    assert Tokenizer.load(tmp_path).sha256 == words.sha256


def test_our_own_are_read_as_they_are_loaded(tmp_path: Path) -> None:
    for tokenizer in (
        Tokenizer.train_words(["b b a c"], max_vocab=2),
        Tokenizer.train_bpe(["the cat"], vocab_size=260),
    ):
        tokenizer.save(tmp_path)
        again = Tokenizer.read(tmp_path / "tokenizer.json")
        assert (again.sha256, again.kind, again.losses) == (
            tokenizer.sha256,
            tokenizer.kind,
            tokenizer.losses,
        )


# ------------------------------------------------------------------------------------------- where it is found


def test_every_form_of_path(tmp_path: Path) -> None:
    bert, pair = _bert(tmp_path / "bert"), _gpt2(tmp_path / "gpt2")
    other = _gpt2(tmp_path / "other", ("vocab.json", "merges.txt"))
    (tmp_path / "my-vocab.txt").write_bytes((bert / "vocab.txt").read_bytes())
    forms = [
        [bert, bert / "vocab.txt", str(bert), tmp_path / "my-vocab.txt"],
        [pair, pair / "encoder.json", pair / "vocab.bpe", other, other / "vocab.json", other / "merges.txt"],
    ]
    for same in forms:
        assert len({Tokenizer.read(path).sha256 for path in same}) == 1
    # a folder's tokenizer.json says more than its other files
    Tokenizer.read(pair).save(bert)
    assert Tokenizer.read(bert).kind == "bpe"


def test_line_ends_and_byte_order_marks_are_no_pieces(tmp_path: Path) -> None:
    plain = Tokenizer.read(_bert(tmp_path / "a")), Tokenizer.read(_gpt2(tmp_path / "b"))
    for path in (tmp_path / "a" / "vocab.txt", tmp_path / "b" / "vocab.bpe"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert [t.sha256 for t in plain] == [Tokenizer.read(tmp_path / name).sha256 for name in "ab"]


def test_an_uncased_vocabulary_is_known_by_its_pieces(tmp_path: Path) -> None:
    def cased(pieces: list[str], **config: Any) -> bool:
        return "lower-cases" not in Tokenizer.read(_bert(tmp_path, pieces, **config)).losses

    assert not cased(PIECES)
    assert not cased([*PIECES, "ℝ"])  # has no lower case
    assert cased([*PIECES, "É"])
    assert cased(PIECES, do_lower_case=False)
    assert not cased(CASED, do_lower_case=True)


def test_other_rules_of_bert_are_taken_from_its_config(tmp_path: Path) -> None:
    tokenizer = Tokenizer.read(_bert(tmp_path, CASED, do_lower_case=True, strip_accents=False))
    assert tokenizer.encode(["É"]) == [[CASED.index("é")]]
    assert "accents" not in tokenizer.losses
    tokenizer = Tokenizer.read(_bert(tmp_path, tokenize_chinese_chars=False))
    assert tokenizer.encode(["北京"]) == [[PIECES.index("[UNK]")]]
    with pytest.raises(ValueError, match=r"do_lower_case = 'no': use true or false"):
        Tokenizer.read(_bert(tmp_path, do_lower_case="no"))


def test_a_space_before_the_text_is_said(tmp_path: Path) -> None:
    tokenizer = Tokenizer.read(_gpt2(tmp_path, add_prefix_space=True))
    assert tokenizer.encode(["the"]) == [[GPT2["Ġthe"]]]
    assert tokenizer.losses == "puts a space before the text"


# ---------------------------------------------------------------------------------------------- special tokens


def test_end_tokens_in_order_and_by_name(tmp_path: Path) -> None:
    def ends(*names: str, eos: str = "", pad: str = "", **config: Any) -> tuple[str, str, int]:
        pieces = ["[UNK]", "a", "b", *names]
        folder = _bert(tmp_path / ("named" if config else "bare"), pieces, **config)
        tokenizer = Tokenizer.read(folder, eos=eos, pad=pad)
        assert [tokenizer.token(i) for i in range(len(pieces))] == pieces  # no id moves
        return tokenizer.token(tokenizer.eos_id), tokenizer.token(tokenizer.pad_id), tokenizer.vocab_size

    assert ends("<eos>", "[SEP]", "</s>", "<pad>", "[PAD]") == ("</s>", "[PAD]", 8)
    assert ends("<eos>", "<pad>", "<|pad|>") == ("<eos>", "<|pad|>", 6)
    assert ends("[EOS]") == ("[EOS]", "[PAD]", 5)
    assert ends("[SEP]", "[CLS]", "<pad>", eos="[CLS]") == ("[CLS]", "<pad>", 6)
    assert ends("[SEP]", "<pad>", pad="[fill]") == ("[SEP]", "[fill]", 6)
    named = {"eos_token": {"content": "[CLS]", "special": True}, "pad_token": "[MASK]"}
    assert ends("[SEP]", "[CLS]", "[MASK]", **named) == ("[CLS]", "[MASK]", 6)
    assert ends("[SEP]", "[CLS]", "[MASK]", **named, eos="[SEP]") == ("[SEP]", "[MASK]", 6)
    # one token for both is usual elsewhere: the passage needs an end of its own
    assert ends("[SEP]", eos_token="[SEP]", pad_token="[SEP]") == ("[SEP]", "[PAD]", 5)
    assert ends("[PAD]", eos="[PAD]") == ("[PAD]", "<|pad|>", 5)


def test_the_end_token_is_part_of_what_is_identified(tmp_path: Path) -> None:
    model = _whitespace("[UNK]", "a", "[SEP]", "[CLS]", "[PAD]")
    model.add_special_tokens(["[SEP]", "[CLS]", "[PAD]"])
    path = _described(tmp_path, model)
    one, two = (Tokenizer.read(path, eos=eos) for eos in ("[SEP]", "[CLS]"))
    assert one.sha256 != two.sha256
    assert one.vocabulary_sha256 == two.vocabulary_sha256


def test_missing_end_tokens_show_what_there_is(tmp_path: Path) -> None:
    folder = _bert(tmp_path, ["[UNK]", "a", "[one]", "<two>", "[three]", "[four]", "[five]"])
    with pytest.raises(
        ValueError,
        match=r"vocab.txt: there is no end token, none of \[EOS\].*<eos>; name one with data.eos "
        r"\(it has \[UNK\], \[one\], <two>, \[three\], \[four\], …\)",
    ):
        Tokenizer.read(folder)
    with pytest.raises(ValueError, match=r"there is no end token '\[end\]'; name one with data.eos"):
        Tokenizer.read(folder, eos="[end]")
    with pytest.raises(ValueError, match=r"'\[one\]' is to be both the end token and the pad"):
        Tokenizer.read(folder, eos="[one]", pad="[one]")
    with pytest.raises(ValueError, match="none of its tokens looks special"):
        Tokenizer.read(_described(tmp_path, _whitespace("a", "b", "c")))
    with pytest.raises(ValueError, match=r"eos_token = 3 is no token"):
        Tokenizer.read(_bert(tmp_path / "x", eos_token=3))
    with pytest.raises(
        ValueError, match=r"its end token is '\[SEP\]', and data.pad = '\[SEP\]' is to fill rows"
    ):
        Tokenizer.read(_bert(tmp_path / "y"), pad="[SEP]")


@KINDS
def test_special_tokens_come_from_no_text_or_it_is_said(small: dict[str, Tokenizer], kind: str) -> None:
    tokenizer = small[kind]
    for id in (tokenizer.eos_id, tokenizer.pad_id):
        name = tokenizer.token(id)
        read = any(id in row for row in tokenizer.encode([name, f"a {name} b", f"a{name}b"]))
        assert read == (f"a text that spells {name} is read as that token" in tokenizer.losses)
    assert ("spells" in tokenizer.losses) == (kind in ("unigram", "wordlevel"))


def test_ordinary_added_tokens_become_special(tmp_path: Path) -> None:
    model = _whitespace("<unk>", "a", "b")
    model.add_tokens(["<eos>", "<x>"])
    tokenizer = Tokenizer.read(_described(tmp_path, model))
    assert tokenizer.encode(["a<eos>b <x> <eos>"]) == [[0, 4, 0]]
    assert (tokenizer.eos_id, tokenizer.pad_id) == (3, 5)


# ---------------------------------------------------------------------------------------------- tokenizer.json


def test_tokenizers_of_the_library(tmp_path: Path) -> None:
    unigram = Tokenizer.read(_described(tmp_path, _unigram()))
    assert (unigram.kind, unigram.unk_id, unigram.eos_id, unigram.pad_id) == ("unigram", 0, 1, 2)
    assert unigram.decode(unigram.encode(["ab ba"])[0]) == "ab ba"
    assert "signs outside the vocabulary become <unk>" in unigram.losses
    words = Tokenizer.read(_described(tmp_path, _whitespace("<unk>", "<eos>", "a", "b")))
    assert (words.kind, words.unk_id, words.token(words.pad_id)) == ("wordlevel", 0, PAD)
    assert words.decode(words.encode(["a  c b"])[0]) == "a <unk> b"


def test_nothing_is_cut_filled_or_added(tmp_path: Path) -> None:
    model = _whitespace("<unk>", "<eos>", "<pad>", "a", "b")
    model.add_special_tokens(["<eos>", "<pad>"])
    model.enable_truncation(2)
    model.enable_padding(pad_id=2, pad_token="<pad>", length=6)
    model.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    tokenizer = Tokenizer.read(_described(tmp_path, model))
    assert tokenizer.encode(["a b a b", "a"]) == [[3, 4, 3, 4], [3]]


def test_bytes_for_the_unknown_leave_nothing_unknown(tmp_path: Path) -> None:
    """As in tokenizers of SentencePiece: a sign without a piece is spelled in bytes, if they all have pieces."""

    def read(missing: int) -> Tokenizer:
        pieces = ["<unk>", "</s>", "▁", "a", *(f"<0x{byte:02X}>" for byte in range(256) if byte != missing)]
        vocab = {piece: id for id, piece in enumerate(pieces)}
        model = Model(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
        model.normalizer = normalizers.Replace(" ", "▁")
        model.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        )
        return Tokenizer.read(_described(tmp_path, model))

    tokenizer = read(-1)
    assert tokenizer.unk_id is None
    assert tokenizer.losses == "rewrites the text by a rule of its own (Replace)"
    assert tokenizer.decode(tokenizer.encode(["a é"])[0]) == "a é"
    assert read(0xA9).unk_id == 0
    assert "signs outside the vocabulary become <unk>" in read(0xA9).losses


def test_words_without_an_unknown_token_are_refused(tmp_path: Path) -> None:
    tokenizer = Tokenizer.read(_described(tmp_path, _whitespace("<eos>", "a", "b")))
    assert tokenizer.unk_id is None
    with pytest.raises(ValueError, match="has no token for something in the text"):
        tokenizer.encode(["a c"])


def test_random_pieces_are_refused(tmp_path: Path) -> None:
    model = Model(models.BPE(GPT2, MERGES, dropout=0.5))
    with pytest.raises(ValueError, match=r'at random \(dropout = 0.5\).*set "dropout" to null'):
        Tokenizer.read(_described(tmp_path, model))


def test_ids_that_the_library_would_move_are_refused(tmp_path: Path) -> None:
    model = _whitespace("<unk>", "<eos>", "a", "b")
    model.add_tokens([AddedToken("<x>")])
    added = json.loads(model.to_str())["added_tokens"]
    for id in (10, 2):
        with pytest.raises(ValueError, match=rf"gives '<x>' the id {id}, which would become 4"):
            Tokenizer.read(_described(tmp_path, model, added_tokens=[added[0] | {"id": id}]))


def test_ids_with_gaps_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"encoder.json: the tokenizer's ids are not 0\.\."):
        Tokenizer.read(_gpt2(tmp_path, vocab=GPT2 | {"late": 1000}))


# -------------------------------------------------------------------------------------------- damaged, unknown


def test_nothing_known(tmp_path: Path) -> None:
    known = r"tokenizer.json, vocab.txt, encoder.json with vocab.bpe, vocab.json with merges.txt"
    with pytest.raises(ValueError, match=rf"holds no tokenizer: what is looked for is {known}"):
        Tokenizer.read(tmp_path)
    with pytest.raises(ValueError, match=rf"nowhere does not exist: give .* \({known}\)"):
        Tokenizer.read(tmp_path / "nowhere")
    (tmp_path / "spiece.model").write_bytes(b"\x00")
    with pytest.raises(ValueError, match=rf"spiece.model is no tokenizer's file: what is read is {known}"):
        Tokenizer.read(tmp_path / "spiece.model")


@pytest.mark.parametrize("names", [("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt")])
def test_one_of_two_files(tmp_path: Path, names: tuple[str, str]) -> None:
    for kept, missing in (names, names[::-1]):
        folder = _gpt2(tmp_path / kept, names)
        (folder / missing).unlink()
        for path in (folder, folder / kept):
            with pytest.raises(ValueError, match=rf"{missing} is missing: {kept} needs it"):
                Tokenizer.read(path)


@pytest.mark.parametrize(
    ("pieces", "reason"),
    [
        ([], "vocab.txt is empty"),
        (["[UNK]", "a", "[SEP]", "a"], "vocab.txt lists 'a' twice"),
        (["[UNK]", "", "a"], "vocab.txt, line 2: '' is no piece"),
        (["[UNK]", "a b ", "a"], "vocab.txt, line 2: 'a b ' is no piece"),
        (["a", "b", "[SEP]"], r"vocab.txt has no \[UNK\], so that it is no WordPiece vocabulary"),
        (["[UNK]", "[SEP]"], r"vocab.txt: the vocabulary has 1 token"),
    ],
)
def test_bad_word_lists(tmp_path: Path, pieces: list[str], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Tokenizer.read(_bert(tmp_path, pieces))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "encoder.json is damaged, or not JSON"),
        ("[1]", "encoder.json holds list, not a JSON object"),
        ('{"a": 1, "a": 2}', "encoder.json lists 'a' twice"),
        ('{"a": "b"}', "encoder.json gives 'a' the id 'b'"),
        ('{"a": -1}', "encoder.json gives 'a' the id -1"),
        ('{"a": 0}', r"not GPT-2's kind of byte-level vocabulary \(255 of 256 bytes have no piece\)"),
        (json.dumps(GPT2 | {"a</w>": len(GPT2)}), r"not GPT-2's kind .* \(its words end with </w>\)"),
        (
            json.dumps({k: v for k, v in GPT2.items() if k != "the"}),
            r"vocab.bpe, line 3: 'the' is not in the voc",
        ),
    ],
)
def test_bad_encoders(tmp_path: Path, text: str, reason: str) -> None:
    folder = _gpt2(tmp_path)
    (folder / "encoder.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=reason):
        Tokenizer.read(folder)


def test_bad_merges(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"vocab.bpe, line 18: 't' is not two pieces"):
        Tokenizer.read(_gpt2(tmp_path, merges=[*MERGES, ("t",)]))
    with pytest.raises(ValueError, match=r"vocab.bpe, line 2: 'zz' is not in the vocabulary"):
        Tokenizer.read(_gpt2(tmp_path, merges=[("z", "z")]))
    with pytest.raises(ValueError, match=r"all but 13 of the 273 pieces .* such as 'Ġcat'|cut short"):
        Tokenizer.read(_gpt2(tmp_path, merges=MERGES[:4]))
    (tmp_path / "vocab.bpe").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ValueError, match=r"vocab.bpe cannot be read"):
        Tokenizer.read(tmp_path)


def test_added_tokens_beside_a_word_list_are_not_overlooked(tmp_path: Path) -> None:
    for folder in (_bert(tmp_path / "a"), _gpt2(tmp_path / "b")):
        _write(folder / "added_tokens.json", {})
        Tokenizer.read(folder)
        _write(folder / "added_tokens.json", {"<new>": 99})
        with pytest.raises(
            ValueError, match=r"added_tokens.json adds tokens, which are read from a tokenizer.json"
        ):
            Tokenizer.read(folder)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "tokenizer.json is damaged, or not JSON"),
        ('{"version": "1.0"}', "tokenizer.json describes no tokenizer"),
        ('{"model": {}}', "tokenizer.json is damaged or no tokenizer file"),
    ],
)
def test_bad_descriptions(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "tokenizer.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=reason):
        Tokenizer.read(tmp_path)


def test_a_panic_of_the_library_is_an_error(tmp_path: Path) -> None:
    described = json.loads(Model(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")])).to_str())
    del described["model"]["vocab"]["ab"]
    with pytest.raises(ValueError, match=r"tokenizer.json is damaged"):
        Tokenizer.read(_write(tmp_path / "tokenizer.json", described))


def test_damaged_names(tmp_path: Path) -> None:
    folder = _bert(tmp_path)
    Tokenizer.read(folder).save(folder)
    (folder / "tokenizer_config.json").write_text("{", encoding="utf-8")
    for read in (Tokenizer.read, Tokenizer.load):
        with pytest.raises(ValueError, match=r"tokenizer_config.json is damaged"):
            read(folder)


# ------------------------------------------------------------------------------------------------- what is lost


def _byte_level(*, vocab: dict[str, int] = GPT2, prefix: bool = False) -> Model:
    model = Model(models.BPE(vocab, MERGES))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    model.decoder = decoders.ByteLevel()
    return model


def test_what_keeps_text_promises_it(tmp_path: Path) -> None:
    split = pre_tokenizers.Split(" ", "merged_with_next")
    raw = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model = _byte_level()
    model.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.Digits(), raw])
    model.add_tokens(["foo bar"])
    tokenizer = Tokenizer.read(_described(tmp_path, model))
    assert tokenizer.losses == ""
    text = "a  foo bar123 é\n<|endoftext|>"
    assert tokenizer.decode(tokenizer.encode([text])[0]) == text


def test_every_loss_is_said(tmp_path: Path) -> None:
    """Each tokenizer loses something, shown by a text, and says what."""

    def check(model: Model, text: str, said: str) -> None:
        tokenizer = Tokenizer.read(_described(tmp_path, model), eos="<|endoftext|>")
        assert tokenizer.decode(tokenizer.encode([text])[0]) != text
        assert said in tokenizer.losses

    check(_byte_level(prefix=True), "a", "puts a space before the text")
    for normalizer, text, said in (
        (normalizers.Lowercase(), "A", "lower-cases the text"),
        (normalizers.NFC(), "e\u0301", "Unicode form NFC"),
        (normalizers.Strip(), " a", "strips white space at the ends"),
        (normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()]), "é", "strips accents"),
        (normalizers.Replace("a", "b"), "a", "rewrites the text by a rule of its own (Replace)"),
    ):
        model = _byte_level()
        model.normalizer = normalizer
        check(model, text, said)
    model = _byte_level()
    model.decoder = None
    check(model, "a cat", "writes the pieces as the vocabulary spells them")
    model = _byte_level()
    model.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), model.pre_tokenizer])
    check(model, "a cat", "spacing is set by rule")
    ending = Model(models.BPE(GPT2, MERGES, end_of_word_suffix="</w>"))
    ending.pre_tokenizer, ending.decoder = _byte_level().pre_tokenizer, decoders.ByteLevel()
    check(ending, "a", "decoding need not give back the text exactly")
    for token in (AddedToken("bat", lstrip=True), AddedToken("è")):
        model = _byte_level()
        model.add_tokens([token])
        check(model, f"a  {token.content}", "decoding need not give back the text exactly")
    vocab = {token: id for id, token in enumerate(token for token in GPT2 if token != "z")}
    check(_byte_level(vocab=vocab), "az", "signs outside the vocabulary are dropped")


def test_losses_of_our_own() -> None:
    assert Tokenizer.train_bpe(["the cat"], vocab_size=260).losses == ""
    assert Tokenizer.train_words(["b b a"]).losses == "spacing is set by rule"
    unknown = Tokenizer.train_words(["b b a c"], max_vocab=2).losses
    assert unknown == "spacing is set by rule; words outside the vocabulary become [UNK]"
    assert EOS not in unknown
