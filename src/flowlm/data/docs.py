"""`docs`: real English without a download, the prose of docstrings that every installation has.

The docstrings of Python's standard library and of the packages that torch brings (torch, numpy, sympy, networkx and
their own) are read from their source files, never imported, and reduced to sentences. What comes out depends on the
versions installed: the list of them and a sha256 stand beside it, and in every report.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import importlib.util
import inspect
import json
import os
import platform
import re
import sysconfig
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from flowlm import files
from flowlm.progress import Progress

__all__ = ["LICENCES", "PACKAGES", "build", "module_sentences", "prose", "sentences", "sources", "versions"]

PACKAGES = ("torch", "numpy", "sympy", "mpmath", "networkx", "jinja2", "fsspec")
"""Read beside the standard library."""

LICENCES = {
    "python": "PSF-2.0",
    "torch": "BSD-3-Clause",
    "numpy": "BSD-3-Clause",
    "sympy": "BSD-3-Clause",
    "mpmath": "BSD-3-Clause",
    "networkx": "BSD-3-Clause",
    "jinja2": "BSD-3-Clause",
    "fsspec": "BSD-3-Clause",
}
"""Under which their sources, docstrings included, are published."""

VERSION = 1
"""Of the rules below: what they make is kept under this number."""

_SKIPPED = frozenset(
    {
        "test",
        "tests",
        "testing",
        "idle_test",
        "site-packages",
        "dist-packages",
        "__pycache__",
        "_vendor",
        "lib2to3",
    }
)
_SHORTEST, _LONGEST = 5, 60  # words in a sentence
_LETTERS = 0.88  # share of letters and spaces

# -- reStructuredText and docstring conventions ------------------------------------------------------------------
_UNDERLINE = re.compile(r"^\s*([=\-~^\"'#*+_`.:])\1{2,}\s*$")
_TABLE = re.compile(r"^\s*[|+].*[|+]\s*$|\S\s{3,}\S.*\s{3,}\S|={3,}|-{4,}")
_FIELD = re.compile(r"^\s*(:\w[^:]*:|@\w+|\.\. )")
_ITEM = re.compile(r"^\s*(?:[-*•]|\(?\d+[.)]|\(?[a-z]\))\s+")
_PARAMETER = re.compile(r"^\s*[\w*, .\\]+\s*(?:\([^)]*\))?\s*:(?:\s|$)")
_ROLE = re.compile(r":[\w:+.-]+:`~?([^`<]*?)(?:\s*<[^`]*>)?`")
_LINK = re.compile(r"`([^`<]+?)\s*<[^`>]*>`_{1,2}")
_LITERAL = re.compile(r"``([^`]+)``|`([^`]+)`_{0,2}")
_EMPHASIS = re.compile(r"(?<![\w*])\*{1,2}([^*\s](?:[^*]*[^*\s])?)\*{1,2}(?![\w*])")
_FOOTNOTE = re.compile(r"\s*\[[\w#*, ]{1,12}\]_?(?!\w)")
_END = re.compile(r"(?<=[.!?])[\"')]?\s+(?=[\"'(]?[A-Z])")
_ABBREVIATION = re.compile(
    r"(?:\b(?:e\.g|i\.e|cf|vs|etc|et al|al|resp|approx|Fig|Eq|Eqs|No|Vol|pp|Dr|Mr|St|Sec|Ref|Refs|[A-Z]))\.$"
)
_CODE = re.compile(
    r"[_\\<>{}=|@#$%^&*+~\[\]/`]|\w\(|\w\.\w|\b[a-z]+[A-Z]|\d[a-zA-Z]|[a-z]\d|--|\.\.|::|\s[.,;:!?]|[^\x00-\x7f]"
)
_LATIN = re.compile(r"\b(?:e\.g|i\.e|a\.k\.a|w\.r\.t)\.")
_START = re.compile(r"[A-Z][A-Za-z]*(?:['-][A-Za-z]+)*[ ,]")
_QUOTES = str.maketrans({"’": "'", "‘": "'", "“": '"', "”": '"', "\u00a0": " "})


def prose(docstring: str) -> Iterator[str]:
    """Paragraphs of running text in a docstring: no code, tables, headings, field lists; marks of markup stripped."""
    paragraph: list[str] = []
    code_indent = -1  # inside an indented block after "::" or a directive: deeper than this
    lines = docstring.expandtabs().translate(_QUOTES).split("\n")
    for i, line in enumerate([*lines, ""]):
        stripped = line.strip()
        indent = len(line) - len(line.lstrip())
        if code_indent >= 0 and stripped:
            if indent > code_indent:
                continue
            code_indent = -1
        following = lines[i + 1] if i + 1 < len(lines) else ""
        breaks = (
            not stripped
            or stripped.startswith((">>>", "...", "$ ", "#"))
            or _UNDERLINE.match(line) is not None
            or (_UNDERLINE.match(following) is not None and len(stripped.split()) < 8)
            or _TABLE.search(line) is not None
            or _FIELD.match(line) is not None
            or _PARAMETER.match(line) is not None
        )
        if breaks:
            if paragraph:
                yield _strip_marks(" ".join(paragraph))
                paragraph = []
            if stripped.startswith((">>>", "...")):
                code_indent = -1
            elif (
                stripped.startswith(".. ")
                and "::" in stripped
                and not re.match(r"\.\. (note|warning|seealso|tip|important)", stripped)
            ):
                code_indent = indent
            continue
        if (item := _ITEM.match(line)) is not None:
            if paragraph:
                yield _strip_marks(" ".join(paragraph))
            paragraph = []
            stripped = line[item.end() :].strip()
        if stripped.endswith("::"):
            stripped, code_indent = stripped[:-1], indent
        paragraph.append(stripped)


def _strip_marks(text: str) -> str:
    text = _ROLE.sub(r"\1", text)
    text = _LINK.sub(r"\1", text)
    text = _LITERAL.sub(lambda m: m.group(1) or m.group(2), text)
    text = _EMPHASIS.sub(r"\1", text)
    return re.sub(r"\s+", " ", _FOOTNOTE.sub("", text)).strip()


def sentences(docstring: str) -> Iterator[str]:
    """Sentences of a docstring fit to learn English from: whole, plain, 5 to 60 words, nearly all letters."""
    for paragraph in prose(docstring):
        held = ""
        for piece in _END.split(paragraph):
            held = f"{held} {piece}" if held else piece
            if _ABBREVIATION.search(held):
                continue
            if _is_plain(held):
                yield held
            held = ""


def _is_plain(text: str) -> bool:
    words = text.split(" ")
    if not _SHORTEST <= len(words) <= _LONGEST or text[-1] not in ".!?" or not _START.match(text):
        return False
    if _CODE.search(_LATIN.sub("", text)) or text.count('"') % 2 or text.count("(") != text.count(")"):
        return False
    if sum(len(word) == 1 and word not in "aAI" for word in words) > 1:
        return False  # formulas spelled with letters
    return sum(c.isalpha() or c == " " for c in text) >= _LETTERS * len(text)


def module_sentences(path: Path) -> list[str]:
    """Sentences of all docstrings of a Python file, in the order of the file; none of a file that does not parse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, RecursionError, OSError):
        return []
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found: list[str] = []
    for node in ast.walk(tree):
        if (isinstance(node, kinds) and (text := ast.get_docstring(node, clean=True))) or (
            isinstance(node, ast.Call)
            and node.args
            and isinstance(last := node.args[-1], (ast.Constant, ast.Call))
            and (text := _added_docstring(node, last))
        ):
            found += sentences(text)
    return found


def _added_docstring(call: ast.Call, last: ast.expr) -> str:
    """The text that torch and numpy attach to compiled functions: add_docstr(f, \"\"\"...\"\"\"), add_newdoc(...)."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if name not in ("_add_docstr", "add_docstr", "add_newdoc", "add_docstr_all"):
        return ""
    if isinstance(last, ast.Call) and isinstance(last.func, ast.Attribute) and last.func.attr == "format":
        last = last.func.value
    if isinstance(last, ast.Constant) and isinstance(last.value, str):
        return inspect.cleandoc(last.value)
    return ""


def sources() -> list[tuple[str, Path]]:
    """(name, path) of every file that is read, sorted by name: "json/decoder.py", "torch/nn/modules/linear.py"."""
    roots = [("", Path(sysconfig.get_paths()["stdlib"]))]
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.submodule_search_locations:
            roots.append((package, Path(next(iter(spec.submodule_search_locations)))))
    found: list[tuple[str, Path]] = []
    for name, root in roots:
        for folder, folders, names in os.walk(root):
            folders[:] = sorted(f for f in folders if f not in _SKIPPED and not f.startswith("config-"))
            here = Path(folder)
            found += [
                ((Path(name) / here.relative_to(root) / file).as_posix(), here / file)
                for file in names
                if file.endswith(".py") and not file.startswith("test_")
            ]
    return sorted(found)


def versions() -> dict[str, str]:
    """What the corpus depends on: the version of Python and of every package read."""
    installed = {name for name in PACKAGES if importlib.util.find_spec(name) is not None}
    return {"python": platform.python_version()} | {
        name: importlib.metadata.version(name) if name in installed else "not installed" for name in PACKAGES
    }


def build(
    folder: Path, say: Callable[[str], None], like: Mapping[str, str] | None = None
) -> tuple[Path, dict[str, str]]:
    """The corpus as a file of `folder`, docs-<versions>.jsonl, and the versions; made on first use, in about a minute.

    A line is a source file with its sentences, a sentence a line: {"source": "json/decoder.py", "text": "…"}. A
    sentence that several files have belongs to the first of them.

    Args:
        like: versions of which a corpus is preferred to the present ones, if it was once made here: a run goes on
            with the text it began with, whatever was upgraded since.

    Raises:
        OSError: the file cannot be written.
        ValueError: no sentence found: the installation has no sources.
    """
    if like and (path := _path(folder, like)).exists():
        return path, dict(like)
    now = versions()
    path = _path(folder, now)
    if path.exists():
        return path, now
    say("docs: collecting the docstrings of Python's library and of " + ", ".join(PACKAGES))
    seen: set[str] = set()
    lines = []
    found = sources()
    with Progress(len(found), 0, 0, say, label="source file") as progress:
        for i, (name, source) in enumerate(found, 1):
            new = [s for s in dict.fromkeys(module_sentences(source)) if s not in seen]
            seen.update(new)
            if new:
                lines.append(json.dumps({"source": name, "text": "\n".join(new)}) + "\n")
            progress.advance(i)
    if not seen:
        raise ValueError(
            "docs: no docstrings were found: this Python comes without the sources of its library; use "
            "data.corpus = 'text' with a text of your own"
        )
    files.write_data(path, "".join(lines))
    say(f"docs: {len(seen):,} sentences of {len(lines):,} files, in {path}")
    return path, now


def _path(folder: Path, made_of: Mapping[str, str]) -> Path:
    key = hashlib.sha256(json.dumps([VERSION, dict(made_of)]).encode()).hexdigest()[:12]
    return folder / f"docs-{key}.jsonl"
