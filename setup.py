"""Puts what recipes and package share into the wheel: in the repository it lies in ``recipes`` alone."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

TARGET = "spiking_mamba/commands"  # where spiking_mamba.commands.configuration looks for it
SHARED = (
    "recipes/quickstart/quickstart.yaml",
    "recipes/quickstart/teacher/*",
    "recipes/quickstart/student/*",
    "recipes/generate/generate.yaml",
    "recipes/benchmark/bench.yaml",
    "recipes/evaluate/evaluate.yaml",
    "recipes/teacher/tiny.yaml",
    "recipes/teacher/teacher.yaml",
    "recipes/distill/tiny.yaml",
    "recipes/distill/mamba2-*.yaml",
    "recipes/distill/ddp.yaml",
    "recipes/distill/fsdp2.yaml",
    "recipes/rl/dpo.yaml",
    "recipes/rl/kto.yaml",
    "recipes/rl/mamba2-*.yaml",
)


class BuildWithRecipes(build_py):
    """An editable installation finds them in the checkout."""

    def run(self) -> None:
        """Copy what the package has itself, then what is shared."""
        super().run()
        if self.editable_mode:
            return
        here = Path(__file__).parent
        for pattern in SHARED:
            found = sorted(here.glob(pattern))
            if not found:
                raise FileNotFoundError(f"There is no {pattern}.")
            for path in found:
                target = Path(self.build_lib, TARGET, path.relative_to(here))
                self.mkpath(str(target.parent))
                self.copy_file(str(path), str(target))


setup(cmdclass={"build_py": BuildWithRecipes})
