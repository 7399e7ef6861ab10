"""Adds a built site to the sites of other versions: ``python docs/publish.py HTML SITE NAME``.

``HTML`` is the folder that Sphinx built, ``SITE`` the folder with all versions, and ``NAME`` the release tag or the
branch. ``SITE`` gets the folder ``NAME``, the folder ``latest`` with the newest release, and a list of the versions in
``versions``. The root page of ``SITE`` leads to ``latest``, or to the branch while there is no release.
"""

import re
import shutil
import sys
from pathlib import Path

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>gaal_surgery</title>
{}
</html>
"""


def releases(site: Path) -> list[str]:
    """The release tags that have a folder, newest first. Pre-releases such as v0.3.0rc1 are left out."""
    tags = [folder.name for folder in site.iterdir() if re.fullmatch(r"v\d+(\.\d+)*", folder.name)]
    return sorted(tags, key=lambda tag: [int(part) for part in tag[1:].split(".")], reverse=True)


def replace(old: Path, new: Path) -> None:
    """Makes the folder `old` a copy of `new`."""
    shutil.rmtree(old, ignore_errors=True)
    shutil.copytree(new, old)


def publish(html: Path, site: Path, name: str) -> None:
    """Adds the built site in `html` to `site` under `name`, and renews `latest`, the list of versions and the root.

    Raises:
        ValueError: `name` is not the name of one folder, or is "latest" or "versions".
    """
    if not re.fullmatch(r"\w[\w.-]*", name) or name in {"latest", "versions"}:
        raise ValueError(f"{name!r} cannot be the folder of a version; use a tag such as v1.2.3, or a branch's name")
    replace(site / name, html)
    tags = releases(site)
    if tags:
        replace(site / "latest", site / tags[0])
    others = sorted({folder.parent.name for folder in site.glob("*/index.html")} - {"latest", "versions", *tags})
    first = "latest" if tags else name
    rows = [f'<li><a href="../{version}/">{version}</a></li>' for version in [*tags, *others]]
    (site / "versions").mkdir(exist_ok=True)
    body = "\n".join(["<h1>Versions of this documentation</h1>", "<ul>", *rows, "</ul>"])
    (site / "versions" / "index.html").write_text(PAGE.format(body), encoding="utf-8")
    lead = f'<meta http-equiv="refresh" content="0; url={first}/">\n<a href="{first}/">Documentation</a>'
    (site / "index.html").write_text(PAGE.format(lead), encoding="utf-8")
    (site / ".nojekyll").touch()  # without this file GitHub Pages leaves out _static


if __name__ == "__main__":
    publish(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
