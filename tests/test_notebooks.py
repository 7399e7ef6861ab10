"""The notebooks of the documentation run, and print what they print on the site.

`python tests/test_notebooks.py` runs them all and stores their outputs; names of notebooks after it run these alone.
Words have to be those that are stored. Numbers may differ a little, as other versions of torch add in another order.
A cell with the tag "varies" has to run, and may print what it likes, such as seconds.
"""

import asyncio
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat import NotebookNode

NOTEBOOKS = sorted((Path(__file__).resolve().parent.parent / "docs" / "notebooks").glob("*.ipynb"))
_NUMBER = re.compile(r"-?\d+\.\d+")  # the integers are counts, and as stable as words


def executed(path: Path, folder: str | Path) -> NotebookNode:
    """The notebook with new outputs, run in a folder by this interpreter, on one thread."""
    notebook = nbformat.read(path, as_version=4)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "IPYTHONDIR": str(folder)}
    client = NotebookClient(
        notebook,
        timeout=600,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(folder)}},
    )
    asyncio.run(client.async_execute(env=environment))
    return notebook


def printed(notebook: NotebookNode) -> Iterator[str]:
    """What each cell prints or shows as text; pictures, and cells that vary, are left out."""
    for cell in notebook.cells:
        outputs = [] if "varies" in cell.metadata.get("tags", ()) else cell.get("outputs", [])
        streams = [output.text for output in outputs if output.output_type == "stream"]
        shown = [output.data.get("text/plain", "") for output in outputs if output.output_type == "execute_result"]
        yield "".join(streams + shown)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_prints_what_is_stored(path, tmp_path):
    for stored, now in zip(printed(nbformat.read(path, as_version=4)), printed(executed(path, tmp_path)), strict=True):
        assert _NUMBER.sub("#", now).split() == _NUMBER.sub("#", stored).split(), now
        numbers = [[float(number) for number in _NUMBER.findall(text)] for text in (now, stored)]
        assert numbers[0] == pytest.approx(numbers[1], rel=0.1, abs=0.08), now


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_whole_and_knows_no_machine(path):
    text = path.read_text(encoding="utf-8")
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), "outputs of one run, in order"
    assert not [output for cell in cells for output in cell.outputs if output.output_type == "error"]
    assert not re.search(r"/(home|tmp|root|work|Users)/|iopub", text)
    assert len(text) < 200_000


def store(path: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        notebook = executed(path, folder)
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    nbformat.write(notebook, path)


if __name__ == "__main__":
    for chosen in [Path(name) for name in sys.argv[1:]] or NOTEBOOKS:
        store(chosen)
        print(chosen.name)
