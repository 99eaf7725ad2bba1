"""One lock: what pyproject.toml asks for has one version in constraints.txt, and every install takes it."""

import re
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from itertools import product
from pathlib import Path

import pytest
import yaml
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
ASKED = [Requirement(text) for group in (PROJECT["dependencies"], *EXTRAS.values()) for text in group]
LOCK = [
    Requirement(line)
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if not line.startswith("#")
]
PLATFORMS = {
    "linux": {"platform_system": "Linux", "os_name": "posix", "platform_machine": "x86_64"},
    "linux-arm": {"platform_system": "Linux", "os_name": "posix", "platform_machine": "aarch64"},
    "darwin": {"platform_system": "Darwin", "os_name": "posix", "platform_machine": "arm64"},
    "win32": {"platform_system": "Windows", "os_name": "nt", "platform_machine": "AMD64"},
}


def environment(platform: str, python: str) -> dict[str, str]:
    version = {"python_version": python, "python_full_version": f"{python}.9"}
    cpython = {"implementation_name": "cpython", "platform_python_implementation": "CPython", "extra": ""}
    return {"sys_platform": platform.removesuffix("-arm"), **PLATFORMS[platform], **version, **cpython}


def applies(requirement: Requirement, where: dict[str, str]) -> bool:
    return requirement.marker is None or requirement.marker.evaluate(where)


def pins(where: dict[str, str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for pin in LOCK:
        if applies(pin, where):
            found.setdefault(canonicalize_name(pin.name), []).append(str(pin.specifier).removeprefix("=="))
    return found


@pytest.mark.parametrize(("platform", "python"), [*product(PLATFORMS, ("3.11", "3.12", "3.13"))])
def test_lock_has_one_version_of_each(platform, python):
    where = environment(platform, python)
    locked = pins(where)
    assert not {name: versions for name, versions in locked.items() if len(versions) > 1}
    asked = [wanted for wanted in ASKED if applies(wanted, where)]
    assert len(asked) > 25
    missing = [wanted.name for wanted in asked if canonicalize_name(wanted.name) not in locked]
    assert not missing, "make lock"
    outside = [
        f"{wanted} is locked at {version}"
        for wanted in asked
        for version in locked[canonicalize_name(wanted.name)]
        if not wanted.specifier.contains(version)
    ]
    assert not outside
    assert ("cupy-cuda13x" in locked) == (platform != "darwin")
    assert ("mamba-ssm" in locked) == platform.startswith("linux")
    assert ("triton" in locked) == platform.startswith("linux")


def test_lock_has_pins_and_nothing_else():
    assert all(re.fullmatch(r"==[^,*]+", str(pin.specifier)) and pin.url is None for pin in LOCK)
    assert not re.search(r"^-|://|(^|\s)/", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE)


@pytest.mark.parametrize("wanted", ASKED, ids=str)
def test_ranges_have_both_ends(wanted):
    operators = {clause.operator for clause in wanted.specifier}
    unbounded = {"packaging", "pip", "wheel"}  # tools, whose newest release is always wanted
    assert "==" in operators or {">=", "<"} <= operators or wanted.name in unbounded


def test_installed_versions_are_the_locks():
    if not Path(sys.prefix, "bin", ".ready").exists():
        pytest.skip("not an environment that `make` has set up from the lock")
    locked, seen, wrong = pins(default_environment() | {"extra": ""}), set(), []
    queue = [(PROJECT["name"], extra) for extra in ("", "recipes", "dev")]
    while queue:
        name, extra = queue.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        try:
            found = distribution(name)
        except PackageNotFoundError:  # what spikingjelly asks for and nothing here uses
            continue
        version = ",".join(locked.get(name, ["not locked"]))
        if name != PROJECT["name"] and found.version.split("+")[0] != version:  # 2.14.1+cpu is 2.14.1
            wrong.append(f"{name} {found.version}, the lock: {version}")
        for text in found.requires or []:
            wanted = Requirement(text)
            if applies(wanted, default_environment() | {"extra": extra}):
                queue += [(canonicalize_name(wanted.name), inner) for inner in ("", *wanted.extras)]
    assert len({name for name, _ in seen}) > 60
    assert not wrong


def test_everything_installs_from_the_lock():
    pip = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"][-1]["pip"]
    assert pip == ["-c constraints.txt", "--editable .[recipes,gpu]"]
    assert {"recipes", "gpu"} <= set(EXTRAS)
    makefile, script = (ROOT / "Makefile").read_text(), (ROOT / "recipes" / "install_gpu.sh").read_text()
    recipe = makefile[makefile.index("$(BIN)/.ready: pyproject.toml constraints.txt") :].split("\n\n")[0]
    installs = [line for line in recipe.splitlines() if "pip install" in line]
    assert len(installs) == 4
    assert all("-c constraints.txt" in line for line in installs if "--editable ." not in line)
    assert "--no-deps" in installs[-1]  # the project itself
    assert script.count("pip install") == script.count('pip install --quiet -c "$lock" "$@"') == 1
    assert "==" not in script
    for name in ("ninja", "packaging", "setuptools", "wheel", "einops", "mamba-ssm", "causal-conv1d"):
        assert re.search(rf"install .*\b{name}\b", script)
        assert name in pins(environment("linux", "3.11"))
