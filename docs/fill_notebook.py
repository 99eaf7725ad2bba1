"""Run a notebook, and keep in it what its cells print and draw: python docs/fill_notebook.py NOTEBOOK"""

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]


def main(path: Path) -> None:
    """Fill the notebook in place, with a kernel of this Python that runs in the repository's root."""
    notebook = nbformat.read(path, as_version=4)
    where = {"metadata": {"path": str(ROOT)}}
    NotebookClient(notebook, kernel_name="python3", resources=where, coalesce_streams=True).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # the time of day
        if cell.cell_type == "code":
            # what a library says of its progress is no result
            cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
            cell.outputs = [o for o in cell.outputs if "widget" not in str(o.get("data", {}).keys())]
    notebook.metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(notebook, path)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
