"""Write a checkpoint in a form that another program reads.

python recipes/export/export.py recipes/export/export.yaml model=state-spaces/mamba2-130m output=runs/130m
"""

from spiking_mamba.common.errors import fail_clearly
from spiking_mamba.common.progress import quiet
from spiking_mamba.common.settings import parse_settings
from spiking_mamba.model.exporting import ExportSettings, export


@fail_clearly()
def main() -> None:
    settings = parse_settings(ExportSettings, description=__doc__)
    quiet()
    print(f"Written: {export(settings)}")


if __name__ == "__main__":
    main()
