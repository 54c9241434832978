"""Preparing text takes as much memory for a large one as for a small one, and bears a line of 100 MB."""

from __future__ import annotations

import itertools
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not sys.platform.startswith(("linux", "darwin")), reason="peaks are read as POSIX does"
    ),
]

WORDS = [f"word{i}" for i in range(1500)]

# From a process between: Linux counts the memory of the one that starts a process in its peak.
BETWEEN = "import subprocess, sys; sys.exit(subprocess.call([sys.executable, *sys.argv[1:]]))"

PREPARE = """
import json, resource, sys
from pathlib import Path
from flowlm.cli import main

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

text, small, out, common = sys.argv[1:]
for path, folder in ((small, out + "-first"), (text, out)):  # the first loads all that is loaded once
    before = peak()
    command = ["prepare", *common.split(), "--data.path", path, "--out", folder]
    assert main(command) == 0
print(json.dumps(peak() - before), file=open(out + ".json", "w"))
"""


COMMON = "--data.corpus text --data.rows split --data.held-out 4 --model.length 64 "
TOKENIZERS = {
    "words": "--data.tokenizer words",
    "pieces": "--data.tokenizer bpe --data.vocab-size 512",
}
each_tokenizer = pytest.mark.parametrize("tokenizer", TOKENIZERS)


def prepare(text: Path, folder: Path, tokenizer: str) -> tuple[int, dict[str, int]]:
    """Bytes that preparing this text adds to the peak of a process which has prepared a small one; its meta.json."""
    small = folder / "small.txt"
    small.write_text("\n".join(f"{a} {b}" for a, b in itertools.pairwise(WORDS)), encoding="utf-8")
    return measured(text, small, folder / f"rows-{text.stem}", COMMON + TOKENIZERS[tokenizer])


def measured(text: Path, small: Path, out: Path, options: str) -> tuple[int, dict[str, int]]:
    # One arena: with one for each thread what stays unused depends on which thread had what, that is on chance.
    env = os.environ | {"MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(
        [sys.executable, "-c", BETWEEN, "-c", PREPARE, *map(str, (text, small, out)), options],
        capture_output=True,
        text=True,
        env=env,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(out.with_suffix(".json").read_text()), json.loads((out / "meta.json").read_text())


@each_tokenizer
def test_five_times_the_text_takes_no_more_memory(tokenizer: str, tmp_path: Path) -> None:
    draw = random.Random(0)
    lines = [" ".join(draw.choices(WORDS, k=12)) + "\n" for _ in range(5000)]
    added = {}
    for megabytes in (8, 40):
        path = tmp_path / f"{megabytes}.txt"
        with path.open("w", encoding="utf-8") as file:
            for i in range(megabytes * 1_000_000 // sum(map(len, lines))):
                # another first word every time: no line is a copy
                file.writelines(f"{WORDS[i]} {line}" for line in lines)
        added[megabytes], meta = prepare(path, tmp_path, tokenizer)
        assert meta["documents"] > megabytes * 8000
    # As text alone the difference is 32 MB, as lists of ids some 200 MB; allocators leave a few.
    assert added[40] - added[8] < 16_000_000, added


@pytest.mark.parametrize(("tokenizer", "megabytes", "most"), [("words", 100, 2000), ("pieces", 40, 1000)])
def test_a_line_that_is_a_whole_text(tokenizer: str, megabytes: int, most: int, tmp_path: Path) -> None:
    draw = random.Random(0)
    part = " ".join(draw.choices(WORDS, k=20_000)) + " "
    path = tmp_path / "line.txt"
    with path.open("w", encoding="utf-8") as file:
        for _ in range(megabytes * 1_000_000 // len(part) + 1):
            file.write(part)
        file.write("\n" + "\n".join(f"{a} {b}" for a, b in zip(WORDS, WORDS[7:])))
    assert path.stat().st_size > megabytes * 1_000_000
    added, meta = prepare(path, tmp_path, tokenizer)
    count = (megabytes * 1_000_000 // len(part) + 1) * 20_000
    assert meta["max_tokens"] == count if tokenizer == "words" else meta["max_tokens"] > count
    assert meta["train"] > meta["max_tokens"] // 64
    assert added < most * 1_000_000


def test_twenty_times_the_documents_of_a_corpus_by_name_take_no_more_memory(tmp_path: Path) -> None:
    """In the form of OpenWebText: long documents in Parquet, the last of them held out."""
    arrow = pytest.importorskip("pyarrow", reason="pyarrow comes with flowlm[data]")
    import pyarrow.parquet as parquet

    from helpers import REAL

    if not (REAL / "gpt2").exists():
        pytest.skip(f"no real tokenizer in {REAL}: set FLOWLM_TEST_DATA")
    draw = random.Random(0)
    documents = [" ".join(draw.choices(WORDS, k=500)) for _ in range(640)]

    def corpus(files: int) -> Path:
        folder = tmp_path / f"owt-{files}"
        folder.mkdir()
        for n in range(files):
            own = [f"{WORDS[n]} {text}" for text in documents]
            parquet.write_table(
                arrow.table({"text": own}), folder / f"train-{n:05}.parquet", row_group_size=100
            )
        return folder

    first, options = (
        corpus(2),
        f"--data.corpus openwebtext --data.tokenizer {REAL / 'gpt2'} --data.held-out 100",
    )
    added = {}
    for files in (2, 40):
        path = first if files == 2 else corpus(40)
        added[files], meta = measured(
            path, first, tmp_path / f"rows-{files}", f"{options} --model.length 1024"
        )
        assert meta["documents"] == 640 * files
        assert meta["held_out_documents"] == 100
    # more than 80 MB of text, and twice that as lists of ids
    assert added[40] - added[2] < 30_000_000, added
