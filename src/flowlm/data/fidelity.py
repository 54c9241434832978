"""What a text loses on the way to ids and back, said from the rules of the tokenizer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import tokenizers

__all__ = ["CHARACTER", "bytes_missing", "cuts_at_spaces", "losses", "unknown_token"]

CHARACTER = r"[\s\S]"
"""What a tokenizer of characters splits a text into."""

Described = dict[str, Any]  # the JSON of a tokenizer, or of a part of it

_NORMALIZERS = {
    "Lowercase": "lower-cases the text",
    "StripAccents": "strips accents",
    "Strip": "strips white space at the ends",
    "NFC": "brings the text into the Unicode form NFC",
    "NFD": "brings the text into the Unicode form NFD",
    "NFKC": "brings the text into the Unicode form NFKC",
    "NFKD": "brings the text into the Unicode form NFKD",
}


def losses(model: tokenizers.Tokenizer, described: Described, reserved: Sequence[str]) -> str:
    """Empty if decode(encode(text)) == text for every text; else what is lost, in plain words.

    Args:
        model: the tokenizer.
        described: its JSON.
        reserved: special tokens that a text must not become, the end token and the pad.
    """
    spelled = [name for name in reserved if _is_read(model, name)]
    if not spelled and (_is_exact(model, described) or _is_of_characters(described)):
        return ""
    said = [*_normalizing(described["normalizer"]), *_spacing(described)]
    said += _unknown(model, described)
    said += [f"a text that spells {name} is read as that token" for name in spelled]
    return "; ".join(dict.fromkeys(said)) or "decoding need not give back the text exactly"


def cuts_at_spaces(described: Described) -> bool:
    """Whether a tokenizer surely cuts every text before a single space or end of line, so that a long text may be cut
    there first and its parts tokenised by themselves.

    BERT's and GPT-2's do; others may join an end of line with the sign before it, or have words that a space is in.
    """
    if any(
        token["lstrip"] or token["rstrip"] or any(sign.isspace() for sign in token["content"])
        for token in described["added_tokens"]
    ):
        return False
    normalizer, split = described["normalizer"], list(_parts(described["pre_tokenizer"]))
    if len(split) != 1:
        return False
    if split[0]["type"] == "ByteLevel":
        return (
            normalizer is None and bool(split[0].get("use_regex", True)) and not split[0]["add_prefix_space"]
        )
    plain = normalizer is None or normalizer["type"] in ("BertNormalizer", "Lowercase")
    return plain and split[0]["type"] in ("BertPreTokenizer", "Whitespace", "WhitespaceSplit")


def bytes_missing(model: tokenizers.Tokenizer) -> int:
    """How many of the 256 bytes have no piece in the vocabulary."""
    from tokenizers import pre_tokenizers

    return sum(model.token_to_id(sign) is None for sign in pre_tokenizers.ByteLevel.alphabet())


def unknown_token(model: tokenizers.Tokenizer, described: Described) -> str | None:
    """The token of what the vocabulary does not have; None where no text becomes one."""
    rules = described["model"]
    if _byte_fallback(model, described):
        return None
    if rules["type"] == "Unigram":
        return None if rules["unk_id"] is None else str(rules["vocab"][rules["unk_id"]][0])
    name = rules.get("unk_token")
    return None if name is None or model.token_to_id(name) is None else str(name)


def _is_exact(model: tokenizers.Tokenizer, described: Described) -> bool:
    rules = described["model"]
    split = list(_parts(described["pre_tokenizer"]))
    return (
        rules["type"] == "BPE"
        and not rules["continuing_subword_prefix"]
        and not rules["end_of_word_suffix"]
        and described["normalizer"] is None
        and [part["type"] for part in split].count("ByteLevel") == 1
        and all(_keeps(part) for part in split)
        and (described["decoder"] or {}).get("type") == "ByteLevel"
        and bytes_missing(model) == 0
        and all(_comes_back(model, token) for token in described["added_tokens"] if not token["special"])
    )


def _is_of_characters(described: Described) -> bool:
    """Whether each character is a token, and a text that has others is refused."""
    rules, split = described["model"], described["pre_tokenizer"] or {}
    return (
        rules["type"] == "WordLevel"
        and rules["unk_token"] not in rules["vocab"]
        and described["normalizer"] is None
        and split.get("pattern") == {"Regex": CHARACTER}
        and split.get("behavior") == "Isolated"
        and (described["decoder"] or {}).get("type") == "Fuse"
    )


def _keeps(split: Described) -> bool:
    """Whether a pre-tokenizer hands on all of the text, as it is or as bytes."""
    if split["type"] == "ByteLevel":
        return not split["add_prefix_space"]
    if split["type"] in ("Split", "Punctuation"):
        return bool(split["behavior"] != "Removed")
    return split["type"] in ("Digits", "UnicodeScripts")


def _comes_back(model: tokenizers.Tokenizer, added: Described) -> bool:
    """Whether an added token that texts are searched for is written as it was read."""
    if added["lstrip"] or added["rstrip"]:  # takes the spaces around it with it
        return False
    return bool(model.decode([added["id"]], skip_special_tokens=False) == added["content"])


def _is_read(model: tokenizers.Tokenizer, name: str) -> bool:
    try:
        return model.token_to_id(name) in model.encode(name, add_special_tokens=False).ids
    except Exception:  # the library raises nothing narrower: a text that is refused is not read as anything
        return False


def _byte_fallback(model: tokenizers.Tokenizer, described: Described) -> bool:
    """Whether every text can be spelled in bytes."""
    if any(part["type"] == "ByteLevel" for part in _parts(described["pre_tokenizer"])):
        return described["model"]["type"] == "BPE" and bytes_missing(model) == 0
    return bool(described["model"].get("byte_fallback")) and all(
        model.token_to_id(f"<0x{byte:02X}>") is not None for byte in range(256)
    )


# ---------------------------------------------------------------------------------------------------- sentences


def _normalizing(normalizer: Described | None) -> Iterator[str]:
    for part in _parts(normalizer):
        if part["type"] == "BertNormalizer":
            if part["lowercase"]:
                yield "lower-cases the text"
            if part["strip_accents"] or (part["strip_accents"] is None and part["lowercase"]):
                yield "strips accents"
            if part["clean_text"]:
                yield "drops control characters"
        else:
            yield _NORMALIZERS.get(part["type"], f"rewrites the text by a rule of its own ({part['type']})")


def _spacing(described: Described) -> Iterator[str]:
    decoder, split = described["decoder"], list(_parts(described["pre_tokenizer"]))
    if any(part.get("add_prefix_space") for part in split):
        yield "puts a space before the text"
    if decoder is None:
        yield "writes the pieces as the vocabulary spells them, with spaces between"
    elif decoder["type"] == "WordPiece":
        close = ", none before . , ! ?" if decoder["cleanup"] else ""
        yield f"spacing is set by rule: a space between words and signs{close}"
    elif any(part["type"] == "Metaspace" for part in split):
        yield "white space at the ends may change"
    elif not all(_keeps(part) for part in split if part["type"] != "ByteLevel"):
        yield "spacing is set by rule"


def _unknown(model: tokenizers.Tokenizer, described: Described) -> Iterator[str]:
    kind, unk = described["model"]["type"], unknown_token(model, described)
    if unk is not None:
        what = "signs" if kind in ("Unigram", "BPE") else "words"
        yield f"{what} outside the vocabulary become {unk}"
    elif kind == "BPE" and not _byte_fallback(model, described):
        yield "signs outside the vocabulary are dropped"


def _parts(described: Described | None) -> Iterator[Described]:
    """The steps of a normaliser or pre-tokenizer, in order."""
    if described is None:
        return
    if described["type"] != "Sequence":
        yield described
        return
    for key in ("normalizers", "pretokenizers"):
        for part in described.get(key, ()):
            yield from _parts(part)
