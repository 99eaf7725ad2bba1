"""Optimise a model on preferences by DPO: python recipes/rl/dpo.py recipes/rl/dpo.yaml"""

from spiking_mamba.preference import DPOSettings, optimise
from spiking_mamba.preference_evaluation import summary
from spiking_mamba.settings import parse_settings
from spiking_mamba.training import fail_clearly, quiet


@fail_clearly()
def main() -> None:
    settings = parse_settings(DPOSettings, description=__doc__)
    quiet()
    results = optimise(settings)
    if results is not None:  # the first process
        print(f"\n{summary(results)}\n\nModel: {results['model']}; numbers: {settings.output}/results.json")


if __name__ == "__main__":
    main()
