"""Tokenizers made elsewhere, as their files describe them: tokenizer.json, BERT's vocab.txt, GPT-2's pairs.

Ids are those of the files and never move. The `tokenizers` library does the work; what it would do without a
word (move an id, keep the last of two equal pieces, drop what a file cut short does not say) is refused here.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import tokenizers

__all__ = [
    "CONFIG",
    "ENDS",
    "PADS",
    "TOKENIZER",
    "Found",
    "end_and_pad",
    "named",
    "parse",
    "read_config",
    "read_model",
]

TOKENIZER, CONFIG, VOCAB, ADDED = "tokenizer.json", "tokenizer_config.json", "vocab.txt", "added_tokens.json"
PAIRS = (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt"))
KNOWN = f"{TOKENIZER}, {VOCAB}, " + ", ".join(f"{vocab} with {merges}" for vocab, merges in PAIRS)

ENDS = ("[EOS]", "<|endoftext|>", "</s>", "[SEP]", "<eos>")
"""Names of an end token, the first found of which is taken."""
PADS = ("[PAD]", "<|pad|>", "<pad>")

_SPECIAL = re.compile(r"\[[^\s\[\]]+\]|<[^\s<>]+>")  # as special tokens are usually spelled
_LONGEST = 100  # characters: BERT's tokenizer takes a longer word for an unknown one
_UNREACHED = 0.01  # a share of pieces: names of special tokens are fewer


class Found(NamedTuple):
    """A tokenizer that was read."""

    model: tokenizers.Tokenizer
    path: Path
    """The file that errors name."""
    config: dict[str, Any]
    """tokenizer_config.json beside it; empty where there is none."""


def read_model(path: Path) -> Found:
    """The tokenizer in `path`, one of the known files or a folder that holds one.

    ValueError: nothing known there, a file that is missing, damaged, or of another form.
    """
    if not path.exists():
        raise ValueError(f"{path} does not exist: give a tokenizer's file or its folder ({KNOWN})")
    file = _choose(path) if path.is_dir() else path
    config = read_config(file.parent)
    pair = next((pair for pair in PAIRS if file.name in pair), None)
    if pair:
        model = _gpt2(file.parent / pair[0], file.parent / pair[1], config)
    elif file.suffix == ".json":
        model = _described(file)
    elif file.suffix == ".txt":
        model = _bert(file, config)
    else:
        raise ValueError(f"{file} is no tokenizer's file: what is read is {KNOWN}")
    return Found(model, file, config)


def _choose(folder: Path) -> Path:
    for name in (TOKENIZER, VOCAB):
        if (folder / name).exists():
            return folder / name
    for pair in PAIRS:
        if any((folder / name).exists() for name in pair):
            return folder / pair[0]
    raise ValueError(f"{folder} holds no tokenizer: what is looked for is {KNOWN}")


# ----------------------------------------------------------------------------------------------- the three forms


def parse(text: str, path: Path) -> tokenizers.Tokenizer:
    """The tokenizer that the text of a tokenizer.json describes. ValueError: damaged."""
    from tokenizers import Tokenizer as Model

    try:
        return Model.from_str(text)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # nothing narrower is raised, and a panic of the library is no Exception
        raise ValueError(f"{path} is damaged or no tokenizer file ({error}): save it again") from error


def _described(path: Path) -> tokenizers.Tokenizer:
    text = _text(path)
    said = _json(text, path)
    if not isinstance(said.get("model"), dict):
        raise ValueError(f"{path} describes no tokenizer (it has no 'model'): what is read is {KNOWN}")
    model = parse(text, path)
    # The library gives an added token the next free id, whatever the file says.
    vocab = said["model"].get("vocab")
    ids = dict(vocab) if isinstance(vocab, dict) else {}
    ids |= {token["content"]: token["id"] for token in said.get("added_tokens") or ()}
    for token, id in ids.items():
        if model.token_to_id(token) != id:
            raise ValueError(
                f"{path} gives {token!r} the id {id}, which would become {model.token_to_id(token)}: ids have to "
                "be 0..V-1, each once, with the added tokens last"
            )
    return model


def _bert(path: Path, config: dict[str, Any]) -> tokenizers.Tokenizer:
    from tokenizers import Tokenizer as Model
    from tokenizers import decoders, models, normalizers, pre_tokenizers

    _refuse_added(path.parent)
    pieces = [line.removesuffix("\r") for line in _text(path).rstrip("\n").split("\n")]
    if pieces == [""]:
        raise ValueError(f"{path} is empty: a {VOCAB} has a piece on each line")
    for number, piece in enumerate(pieces, 1):
        if not piece or piece != piece.strip():
            raise ValueError(
                f"{path}, line {number}: {piece!r} is no piece of a word; a {VOCAB} has one on each line, "
                "without spaces"
            )
    _refuse_twice(pieces, path)
    unk = named(config, "unk_token") or "[UNK]"
    if unk not in pieces:
        raise ValueError(
            f"{path} has no {unk}, so that it is no WordPiece vocabulary, or not all of it: what is read is {KNOWN}"
        )
    # ℝ and its like are upper-case and have no lower case: an uncased vocabulary holds them.
    cased = any(piece != piece.lower() for piece in pieces if not _SPECIAL.fullmatch(piece))
    model = Model(
        models.WordPiece(
            {piece: id for id, piece in enumerate(pieces)},
            unk_token=unk,
            max_input_chars_per_word=_LONGEST,
        )
    )
    model.normalizer = normalizers.BertNormalizer(
        lowercase=bool(_flag(config, "do_lower_case", not cased)),
        strip_accents=_flag(config, "strip_accents", None),
        handle_chinese_chars=bool(_flag(config, "tokenize_chinese_chars", True)),
    )
    model.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    model.decoder = decoders.WordPiece(cleanup=True)
    return model


def _gpt2(vocab_path: Path, merges_path: Path, config: dict[str, Any]) -> tokenizers.Tokenizer:
    from tokenizers import Tokenizer as Model
    from tokenizers import decoders, models, pre_tokenizers

    for path, other in ((vocab_path, merges_path), (merges_path, vocab_path)):
        if not path.exists():
            raise ValueError(f"{path} is missing: {other.name} needs it beside it")
    _refuse_added(vocab_path.parent)
    vocab = _json(_text(vocab_path), vocab_path)
    wrong = next((token for token, id in vocab.items() if type(id) is not int or id < 0), None)
    if wrong is not None:
        raise ValueError(f"{vocab_path} gives {wrong!r} the id {vocab[wrong]!r}: ids are 0, 1, 2, …")
    signs = set(pre_tokenizers.ByteLevel.alphabet())
    missing = signs - vocab.keys()
    if missing or any(token.endswith("</w>") for token in vocab):
        reason = f"{len(missing)} of 256 bytes have no piece" if missing else "its words end with </w>"
        raise ValueError(
            f"{vocab_path} is not GPT-2's kind of byte-level vocabulary ({reason}): give the {TOKENIZER}, which "
            "says how its text is split"
        )
    merges = _merges(merges_path, vocab)
    reached = signs | {left + right for left, right in merges}
    unreached = [token for token in vocab if token not in reached]
    if len(unreached) > max(_UNREACHED * len(vocab), 8):
        raise ValueError(
            f"{merges_path} leads to all but {len(unreached)} of the {len(vocab)} pieces of {vocab_path.name}, such "
            f"as {unreached[0]!r}: it is cut short, or belongs to another vocabulary"
        )
    model = Model(models.BPE(vocab, merges))
    prefix = bool(_flag(config, "add_prefix_space", False))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    model.decoder = decoders.ByteLevel()
    return model


def _merges(path: Path, vocab: dict[str, int]) -> list[tuple[str, str]]:
    """Pairs of pieces, in the order in which they are joined."""
    merges: list[tuple[str, str]] = []
    for number, line in enumerate(_text(path).rstrip("\n").split("\n"), 1):
        line = line.removesuffix("\r")
        if number == 1 and (line.startswith("#version") or not line):
            continue
        pair = line.split(" ")
        if len(pair) != 2:
            raise ValueError(
                f"{path}, line {number}: {line!r} is not two pieces with a space between: it is damaged"
            )
        for piece in (*pair, "".join(pair)):
            if piece not in vocab:
                raise ValueError(
                    f"{path}, line {number}: {piece!r} is not in the vocabulary; one of the two files is cut short, "
                    "or they do not belong together"
                )
        merges.append((pair[0], pair[1]))
    return merges


# ------------------------------------------------------------------------------------------------ special tokens


def end_and_pad(found: Found, eos: str, pad: str) -> tuple[str, str]:
    """The names of the end token and the pad, both in the model and marked as special; a missing pad is added.

    `eos` and `pad`, else what tokenizer_config.json names, else the first found of `ENDS` and `PADS`.

    ValueError: no end token, or none of that name; one token for both.
    """
    model = found.model
    if eos and eos == pad:
        raise ValueError(
            f"{eos!r} is to be both the end token and the pad: give two, or no pad, and one is added"
        )
    end = eos or named(found.config, "eos_token")
    if not end:
        end = next((name for name in ENDS if model.token_to_id(name) is not None), "")
    if not end or model.token_to_id(end) is None:
        reason = (
            f"there is no end token {end!r}" if end else f"there is no end token, none of {', '.join(ENDS)}"
        )
        raise ValueError(f"{found.path}: {reason}; name one with data.eos ({_offer(model)})")
    if pad == end:
        raise ValueError(
            f"{found.path}: its end token is {end!r}, and data.pad = {pad!r} is to fill rows: give another pad, or "
            "none, and one is added"
        )
    fill = pad or named(found.config, "pad_token")
    if not fill or fill == end:  # one token for both is usual elsewhere: a passage would have no end here
        taken = {end}
        fill = next((name for name in PADS if name not in taken and model.token_to_id(name) is not None), "")
        fill = fill or next(name for name in PADS if name not in taken)
    _mark(model, (end, fill))
    return end, fill


def _offer(model: tokenizers.Tokenizer) -> str:
    added = [token.content for token in model.get_added_tokens_decoder().values()]
    vocab = sorted(model.get_vocab(), key=model.get_vocab().__getitem__)
    names = list(dict.fromkeys(added + [token for token in vocab if _SPECIAL.fullmatch(token)]))
    if not names:
        return "none of its tokens looks special, but any will do that no text has"
    return "it has " + ", ".join(names[:5]) + (", …" if len(names) > 5 else "")


def _mark(model: tokenizers.Tokenizer, names: Iterable[str]) -> None:
    """Makes `names` special, so that no text is searched for them; a new one gets the next id."""
    from tokenizers import AddedToken

    special = {token.content for token in model.get_added_tokens_decoder().values() if token.special}
    new = [AddedToken(name, special=True, normalized=False) for name in names if name not in special]
    model.add_special_tokens(new)


# --------------------------------------------------------------------------------------------------------- files


def read_config(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json of `folder`; empty where there is none. ValueError: damaged."""
    path = folder / CONFIG
    return _json(_text(path), path) if path.exists() else {}


def named(config: dict[str, Any], key: str) -> str:
    """The token that `config` names under `key`, alone or with its options; empty where it names none."""
    value = config.get(key)
    if isinstance(value, dict):
        value = value.get("content")
    if not isinstance(value, str | None):
        raise ValueError(f"{CONFIG}: {key} = {value!r} is no token: give its text")
    return value or ""


def _flag(config: dict[str, Any], key: str, default: bool | None) -> bool | None:
    value = config.get(key)
    if not isinstance(value, bool | None):
        raise ValueError(f"{CONFIG}: {key} = {value!r}: use true or false")
    return default if value is None else value


def _text(path: Path) -> str:
    """As it stands, but for a byte order mark; line ends are not changed."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} cannot be read ({error}): give a tokenizer's file as it was made"
        ) from error


def _json(text: str, path: Path) -> dict[str, Any]:
    def once(items: list[tuple[str, Any]]) -> dict[str, Any]:
        _refuse_twice([key for key, _ in items], path)
        return dict(items)

    try:
        said = json.loads(text, object_pairs_hook=once)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged, or not JSON ({error}): fetch or save it again") from error
    if not isinstance(said, dict):
        raise ValueError(f"{path} holds {type(said).__name__}, not a JSON object: what is read is {KNOWN}")
    return said


def _refuse_twice(pieces: list[str], path: Path) -> None:
    if len(set(pieces)) < len(pieces):
        twice = next(piece for piece, count in Counter(pieces).items() if count > 1)
        raise ValueError(f"{path} lists {twice!r} twice: a piece has one id")


def _refuse_added(folder: Path) -> None:
    path = folder / ADDED
    if path.exists() and _json(_text(path), path):
        raise ValueError(
            f"{path} adds tokens, which are read from a {TOKENIZER} only: save the tokenizer in that form"
        )
