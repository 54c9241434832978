"""English from docstrings: whole plain sentences, no code, the same file for the same versions, split by source."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sysconfig
from pathlib import Path

import numpy as np
import pytest

from flowlm.data import docs
from flowlm.data.corpora import DataConfig, load_corpus, prepare_corpus
from flowlm.data.prepared import open_prepared
from flowlm.model import describe_data
from flowlm.training.loop import open_run
from helpers import begin, map_settings, settings, silent, trained

DOCSTRING = """Return the first item of the list.

The value of *key* is looked up with :meth:`dict.get <dict>` and ``None`` is given
back when it is missing. See `the manual <https://example.org>`_ for the rules [1]_.
Use it e.g. for short lists of values (they are not copied).

Parameters
----------
name : str, optional
    The name of the item that is looked for.
axis : int

Examples
--------
>>> first([1, 2])
1

An example of the code follows::

    The code that stands here is not a sentence.

- This is an item of a list, and it ends here.
- no capital at the start of this one.

=====  ==================  =====
One    Two words.          Three words in a table.
=====  ==================  =====

.. math::

    The formula is not text either.

.. note::
    Notes are made of sentences like this one.

Call self.get_value(x) before anything else. Too short. What about the value of x?
"""


def test_sentences() -> None:
    assert list(docs.sentences(DOCSTRING)) == [
        "Return the first item of the list.",
        # the next one, of `dict.get`, has code in it
        "See the manual for the rules.",
        "Use it e.g. for short lists of values (they are not copied).",
        "The name of the item that is looked for.",
        "This is an item of a list, and it ends here.",
        "Notes are made of sentences like this one.",
        "What about the value of x?",
    ]


@pytest.mark.parametrize(
    "text",
    [
        "Set x = 3 before the call is made.",
        "Return a_b from the list of names.",
        "The file foo.py is read from the disk.",
        "It has (an open bracket and never closes it.",
        "Numbers 1 2 3 4 5 6 7 8 9 10 11 12 13.",
        "No end to this sentence that goes on",
        "lower case at the start of a sentence.",
        "Let n and m and k be whole numbers.",
        "Das Wort für Straße ist hier nicht dabei.",
        "Too short it is.",
    ],
)
def test_what_is_no_plain_sentence(text: str) -> None:
    assert list(docs.sentences(text)) == []


def test_module_sentences(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(
        '"""The docstring of this module is here."""\n'
        "class A:\n    '''The docstring of this class is here.'''\n"
        "    def f(self):\n        r'''The docstring of this method is here.'''\n"
        "        return 'The text here is no docstring.'\n"
        'add_docstr(f, r"""\nf(x) -> y\n\nThe text of a compiled function is here.\n""".format(**args))\n'
        'print("The text that is printed is not a docstring.")\n'
    )
    found = docs.module_sentences(path)
    assert sorted(found) == sorted(
        [f"The docstring of this {kind} is here." for kind in ("module", "class", "method")]
        + ["The text of a compiled function is here."]
    )
    path.write_text("this is no Python (")
    assert docs.module_sentences(path) == []


@pytest.mark.slow
def test_there_are_some_fifty_thousand_sentences() -> None:
    """Of the installation that the tests run in, by every twentieth of its files."""
    files = docs.sources()[::20]
    assert len(files) > 100
    assert 20 * len({sentence for _, path in files for sentence in docs.module_sentences(path)}) > 40_000


def test_the_library_of_this_python() -> None:
    found = docs.module_sentences(Path(sysconfig.get_paths()["stdlib"]) / "textwrap.py")
    assert len(found) > 10
    assert all(sentence[0].isupper() and sentence[-1] in ".!?" for sentence in found)
    assert any("whitespace" in sentence for sentence in found)


def test_sources() -> None:
    names = [name for name, _ in docs.sources()]
    assert names == sorted(names)
    assert {"json/decoder.py", "torch/nn/modules/linear.py", "numpy/__init__.py", "sympy/__init__.py"} <= set(
        names
    )
    assert not [name for name in names if "/tests/" in name or name.startswith(("test/", "site-packages/"))]


def _fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = [
        "one",
        "two",
        "three",
        "four",
        "five",
        "six",
        "seven",
        "eight",
        "nine",
        "ten",
        "eleven",
        "twelve",
    ]
    files = []
    for number in numbers:
        path = tmp_path / f"{number}.py"
        body = " ".join(f"The {word} of file {number} is here." for word in ("name", "size", "age"))
        path.write_text(f'"""{body} This sentence is in every file."""\n')
        files.append((f"lib/{number}.py", path))
    monkeypatch.setattr(docs, "sources", lambda: sorted(files))
    monkeypatch.setenv("FLOWLM_CACHE", str(tmp_path / "cache"))


def test_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _fake(tmp_path, monkeypatch)
    said: list[str] = []
    path, versions = docs.build(tmp_path / "cache", said.append)
    assert versions == docs.versions()
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [r["source"] for r in records] == sorted(r["source"] for r in records)
    assert len(records) == 12
    sentences = [s for r in records for s in r["text"].split("\n")]
    assert len(sentences) == len(set(sentences)) == 12 * 3 + 1
    assert any("37 sentences of 12 files" in line for line in said)
    written = path.stat().st_mtime_ns
    assert docs.build(tmp_path / "cache", said.append) == (path, versions)
    assert path.stat().st_mtime_ns == written
    monkeypatch.setattr(docs, "VERSION", docs.VERSION + 1)
    assert docs.build(tmp_path / "cache", said.append)[0] != path


def test_a_run_goes_on_with_the_text_it_began_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _fake(tmp_path, monkeypatch)
    over = {"data.corpus": "docs", "data.path": "", "data.held_out": 4, "model.length": 16, "train.steps": 2}
    run = trained(tmp_path / "run", settings({**over, "train.save_every": 1}))
    old = docs.versions()
    monkeypatch.setattr(docs, "versions", lambda: old | {"numpy": "99"})
    fewer = docs.sources()[:8]
    monkeypatch.setattr(docs, "sources", lambda: fewer)
    shutil.rmtree(max((run / "checkpoints").iterdir()))
    # A student learns the text of its teacher, and a run that goes on its own.
    student = begin(tmp_path / "student", map_settings(run, over))
    assert student.corpus.meta["sha256"] == describe_data(run)["sha256"]
    assert student.corpus.meta["versions"] == old
    assert open_run(run, say=silent).train().finished
    new = begin(tmp_path / "new", settings(over))
    assert new.corpus.meta["versions"]["numpy"] == "99"
    # Where that text is gone, what was upgraded is said.
    for made in (tmp_path / "cache").glob("docs-*"):
        shutil.rmtree(made) if made.is_dir() else made.unlink()
    with pytest.raises(ValueError, match=r"has changed \(sha256 was .*numpy [^;]*, is 99"):
        open_run(run, say=silent)


def test_split_by_source_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _fake(tmp_path, monkeypatch)
    corpus = load_corpus(DataConfig(corpus="docs", held_out=4), 16)
    train, held_out = (
        [corpus.tokenizer.decode(row) for row in rows] for rows in (corpus.train, corpus.held_out)
    )
    files = [{text.split()[4] for text in side if "of file" in text} for side in (train, held_out)]
    assert not files[0] & files[1]
    assert len(files[0]) == 11
    assert len(files[1]) == 1
    assert corpus.meta["documents"] == 12
    assert corpus.meta["versions"].keys() == {"python", *docs.PACKAGES}
    assert len(corpus.meta["sha256"]) == 64


def test_a_python_without_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(docs, "sources", list)
    with pytest.raises(ValueError, match="no docstrings were found: this Python comes without the sources"):
        docs.build(tmp_path, print)


def test_prepared_rows_are_taken_in_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine with other packages, or none: their versions and licences come with the rows."""
    config, folder = DataConfig(corpus="docs", vocab_size=200, unknown="drop", held_out=4), tmp_path / "rows"
    (tmp_path / "docs.jsonl").write_text(
        "".join(
            json.dumps({"text": f"The value number {i} is read.\n\nIt is kept."}) + "\n" for i in range(40)
        )
    )
    versions = {"python": "3.11", "torch": "1"}
    monkeypatch.setattr(docs, "build", lambda *_: (tmp_path / "docs.jsonl", versions))
    assert prepare_corpus(config, 16, folder, silent) == folder.resolve()
    monkeypatch.setattr(docs, "build", lambda *_: pytest.fail("it was built again"))
    given = load_corpus(dataclasses.replace(config, path=str(folder)), 16)
    assert (given.meta["versions"], given.meta["licences"]) == (versions, docs.LICENCES)
    assert np.array_equal(given.train, open_prepared(folder).train)
    told = (
        r"data\.path = '.*', but data\.corpus = 'docs' brings its own text.* `flowlm prepare docs --out` made"
    )
    with pytest.raises(ValueError, match=told):
        load_corpus(dataclasses.replace(config, path=str(tmp_path / "docs.jsonl")), 16)
    # rows of some other text, made in the same way, are not these
    other = tmp_path / "other"
    plain = dataclasses.replace(config, corpus="text", path=str(tmp_path / "docs.jsonl"), unit="line")
    prepare_corpus(plain, 16, other, silent)
    with pytest.raises(
        ValueError, match=r"rows of another text than docs, .*: name theirs, with data\.corpus = 'text'"
    ):
        load_corpus(dataclasses.replace(config, path=str(other)), 16)
    assert len(load_corpus(dataclasses.replace(plain, path=str(other)), 16).train)
