"""Optimise a model on preferences by DPO or KTO: python recipes/rl/align.py recipes/rl/dpo.yaml"""

from summary import summary

from spiking_mamba.common.errors import fail_clearly
from spiking_mamba.common.progress import quiet
from spiking_mamba.common.settings import parse_settings
from spiking_mamba.training.preference import PreferenceSettings, optimise


@fail_clearly()
def main() -> None:
    settings = parse_settings(PreferenceSettings, description=__doc__)
    quiet()
    results = optimise(settings)
    if results is not None:  # the first process
        print(f"\n{summary(results)}\n\nModel: {results['model']}; numbers: {settings.output}/results.json")


if __name__ == "__main__":
    main()
