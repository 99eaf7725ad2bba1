"""Give every recipe settings that are wrong, follow it up to its first write, and count how it takes them.

python tests/storm/settings.py            # as `make storm` does
python tests/storm/settings.py --short    # as the tests do

Right settings must come to a first write, wrong ones must be refused before: clearly, that is by one line
that names the key or the file. What is refused otherwise is obscure, what is refused behind the first write
late, what is not refused senseless. Every run is a child of this process, which imports everything once.
"""

import argparse
import contextlib
import importlib.util
import os
import random
import runpy
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="storm-")  # what is read is no write of a recipe's
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from tests.storm.inputs import RECIPES, Recipe, make_inputs, recipes
from tests.storm.mutations import Case, cases

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
WROTE = 77  # exit status of a run that came to its first write
LONGEST = 700  # characters of a line that is read
SECONDS = 120  # that a run may take
# where the descriptors of open folders begin among the arguments of an audit event
_FOLDERS = {"os.mkdir": 2, "os.rename": 2, "os.remove": 1, "os.rmdir": 1, "shutil.rmtree": 1}
FAULTS = ("obscure", "late", "senseless", "refused though right")


@contextlib.contextmanager
def beside(script: Path) -> Iterator[None]:
    """What a script imports is found beside it; behind the block another's may be called the same."""
    sys.path.insert(0, str(script.parent))
    before = set(sys.modules)
    try:
        yield
    finally:
        sys.path.remove(str(script.parent))
        for name in set(sys.modules) - before:
            if str(getattr(sys.modules[name], "__file__", None)).startswith(str(RECIPES)):
                del sys.modules[name]


def settings_class(recipe: Recipe) -> type:
    script = RECIPES / recipe.script
    with beside(script):
        spec = importlib.util.spec_from_file_location(f"stormed_{script.parent.name}_{script.stem}", script)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        if not hasattr(module, recipe.settings):  # it calls a command of the package
            module = sys.modules[module.main.__module__]
        return getattr(module, recipe.settings)


def import_everything() -> None:
    """What the recipes import; children find it imported."""
    for name in ("evaluation.evaluator", "evaluation.harness", "reports.evaluation", "training.preference"):
        importlib.import_module(f"spiking_mamba.{name}")
    for name in ("training.pretraining", "training.rehearsal", "evaluation.outliers"):
        importlib.import_module(f"spiking_mamba.{name}")


def watch_writes(home: Path, follow: bool) -> None:
    """End this process before its first write below ``home``, unless it is to be followed further."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if not isinstance(flags, int) or not flags & WRITING:
                return
        elif event in _FOLDERS:
            path = arguments[0]
            if any(isinstance(each, int) and each >= 0 for each in arguments[_FOLDERS[event] :]):
                return  # relative to an open folder, within a tree that is removed: its rmtree was judged
        else:
            return
        within = isinstance(path, str) and Path(path).absolute().resolve().is_relative_to(home)
        if within and not follow:
            os._exit(WROTE)

    sys.addaudithook(hook)


def perform(recipe: Recipe, case: Case, home: Path, follow: bool = False) -> tuple[int | None, str]:
    """Run a case in a folder of its own; its exit status (None: it took too long) and what it said."""
    shutil.rmtree(home, ignore_errors=True)
    folder = home / "case"
    folder.mkdir(parents=True)
    said = home.with_name("said.txt")
    if case.file == "folder":
        (folder / "settings.yaml").mkdir()
    elif case.file is not None:
        (folder / "settings.yaml").write_bytes(case.file)
    place = folder / str(recipe.good.get("output"))
    if case.before == "file":
        place.write_text("precious")
    elif case.before == "foreign":
        place.mkdir()
        (place / "thesis.tex").write_text("precious")
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            with said.open("w") as file, open(os.devnull, "w") as nowhere:
                os.dup2(file.fileno(), 2)
                os.dup2(nowhere.fileno(), 1)
                os.chdir(folder)
                signal.alarm(SECONDS)
                script = RECIPES / recipe.script
                sys.path.insert(0, str(script.parent))
                sys.argv = [str(script), "settings.yaml", *case.arguments]
                watch_writes(home.resolve(), follow)
                status = ended(str(script))
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return (None if status == -signal.SIGALRM else status), said.read_text(errors="replace")


def ended(script: str) -> int:
    """Run a script as Python would, and say its exit status."""
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        sys.stderr.flush()
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
        return 1
    return 0


def is_clear(case: Case, said: str) -> bool:
    """One line at the end that names a key or a file."""
    lines = said.strip().splitlines()
    if not lines or "Traceback" in said or "error: " not in lines[-1] or len(lines[-1]) > LONGEST:
        return False
    return any(name in lines[-1] for name in case.names)


class Storm:
    """Cases one after another; ``counts`` says what became of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.counts: Counter[str] = Counter()
        self.kinds: Counter[str] = Counter()

    def judge(self, recipe: Recipe, case: Case) -> None:
        self.kinds[f"{case.recipe}: {case.kind}"] += 1
        home = self.folder / "home"
        status, said = perform(recipe, case, home)
        if case.right:
            outcome = "accepted and right" if status == WROTE else "refused though right"
        elif status in (1, 2):
            outcome = "refused clearly" if is_clear(case, said) else "obscure"
        elif status in (0, WROTE):
            status, said = perform(recipe, case, home, follow=True)
            outcome = "senseless" if status in (0, None) else "late"
        else:
            outcome = "obscure"
        self.counts[outcome] += 1
        if outcome in FAULTS:
            last = (said.strip().splitlines() or [""])[-1][:400]
            shown = case.arguments or repr((case.file or b"")[-60:])
            about = f"{case.recipe}, {case.kind}: {str(shown)[:200]} {case.before}"
            print(f"{outcome}: {about}: {last}", file=sys.stderr, flush=True)


def drawn(everything: list[Case], short: bool, seed: int) -> list[Case]:
    """All of them; in short, of each recipe and kind a few."""
    everything = list(dict.fromkeys(everything))
    if not short:
        return everything
    groups: dict[tuple[str, str], list[Case]] = {}
    for case in everything:
        groups.setdefault((case.recipe, case.kind), []).append(case)
    draw = random.Random(seed)
    return [case for group in groups.values() for case in draw.sample(group, min(2, len(group)))]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--short", action="store_true", help="a few cases of each recipe and kind")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn for the short form")
    parser.add_argument("--only", help="of these recipes, with commas between them")
    given = parser.parse_args()
    start = time.monotonic()
    torch.set_num_threads(1)
    import_everything()
    with tempfile.TemporaryDirectory() as name:
        inputs = Path(name).resolve() / "inputs"
        inputs.mkdir()
        make_inputs(inputs)
        storm = Storm(Path(name).resolve())
        for each, recipe in recipes(inputs).items():
            if given.only is None or each in given.only.split(","):
                for case in drawn(
                    list(cases(each, recipe, settings_class(recipe), inputs)), given.short, given.seed
                ):
                    storm.judge(recipe, case)
    shutil.rmtree(os.environ["HF_DATASETS_CACHE"], ignore_errors=True)
    for kind, number in sorted(storm.kinds.items()):
        print(f"{number:5d}  {kind}")
    print(f"{sum(storm.kinds.values()):5d}  settings in {time.monotonic() - start:.0f} s, of which")
    for outcome in ("refused clearly", "accepted and right", *FAULTS):
        print(f"{storm.counts[outcome]:5d}  {outcome}")
    return int(any(storm.counts[fault] for fault in FAULTS))


if __name__ == "__main__":
    sys.exit(main())
