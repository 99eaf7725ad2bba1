"""Build the teacher's corpus: python recipes/teacher/corpus.py recipes/teacher/corpus.yaml"""

from corpus_builder import build_corpus
from corpus_settings import CorpusSettings

from spiking_mamba.common.errors import fail_clearly
from spiking_mamba.common.progress import quiet
from spiking_mamba.common.settings import parse_settings


@fail_clearly()
def main() -> None:
    settings = parse_settings(CorpusSettings, description=__doc__)
    quiet()
    manifest = build_corpus(settings)
    print(f"{'source':32}{'documents':>10}{'MB':>8}{'tokens':>12}")
    for name, source in (manifest["sources"] | manifest["files"]).items():
        tokens = "" if source["tokens"] is None else f"{source['tokens']:,}"
        print(f"{name:32}{source['documents']:10,}{source['bytes'] / 1e6:8.2f}{tokens:>12}")
    for name, reason in manifest["missing"].items():
        print(f"{name:32} missing, its tokens are not in: {reason}")


if __name__ == "__main__":
    main()
