"""What a release consists of beside the code: its version, its metadata, the workflows and the published site."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import check_jsonschema
import publish
import pytest
import yaml
from click.testing import CliRunner
from markdown_it import MarkdownIt

import gaal_surgery

ROOT = Path(__file__).resolve().parents[1]
CONFIGURATION = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = CONFIGURATION["project"]
PYTHONS = [found[1] for line in PROJECT["classifiers"] if (found := re.fullmatch(r".*Python :: (3\.\d+)", line))]
WORKFLOWS = {path.stem: path for path in (ROOT / ".github" / "workflows").iterdir()}
FORMS = (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*_*.yml")


def loaded(path):
    return yaml.safe_load(path.read_text())


def commands(workflow):
    return "\n".join(step.get("run", "") for job in loaded(workflow)["jobs"].values() for step in job["steps"])


def test_one_version_everywhere():
    citation = loaded(ROOT / "CITATION.cff")
    assert citation["version"] == gaal_surgery.__version__
    newest = re.search(r"^## \[(\d.*)\] - (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest.groups() == (gaal_surgery.__version__, str(citation["date-released"]))


@pytest.mark.parametrize(
    ("schema", "paths"),
    [
        ("vendor.citation-file-format", [ROOT / "CITATION.cff"]),
        ("vendor.github-workflows", WORKFLOWS.values()),
        ("vendor.github-issue-forms", FORMS),
        ("vendor.github-issue-config", [ROOT / ".github" / "ISSUE_TEMPLATE" / "config.yml"]),
    ],
)
def test_files_follow_their_schemas(schema, paths):
    checked = CliRunner().invoke(check_jsonschema.main, ["--builtin-schema", schema, *map(str, paths)])
    assert checked.exit_code == 0, checked.output


def test_a_package_index_shows_the_readme_with_links_that_lead_there():
    hook = CONFIGURATION["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]
    readme = (ROOT / "README.md").read_text()
    for change in hook["substitutions"]:
        readme = re.sub(change["pattern"], change["replacement"], readme)
    links = [
        child.attrGet("href") or child.attrGet("src")
        for token in MarkdownIt("gfm-like", {"linkify": False}).parse(readme)
        for child in token.children or ()
        if child.type in ("image", "link_open")
    ]
    ours = [link for link in links if "gaal-surgery" in link]
    assert len(ours) > 10
    assert not [link for link in links if not link.startswith("https://")]
    assert not [link for link in ours if not (ROOT / re.split(r"/main/|#", link)[1]).is_file()]


@pytest.mark.parametrize("workflow", WORKFLOWS.values(), ids=WORKFLOWS)
def test_workflows_name_what_exists(workflow):
    run = commands(workflow)
    extras = {name for names in re.findall(r"\.\[([\w,]+)\]", run) for name in names.split(",")}
    assert extras
    assert extras <= PROJECT["optional-dependencies"].keys()
    files = re.findall(r"[\w./-]+\.py\b", run)
    assert files
    assert not [file for file in files if not (ROOT / file).is_file()]


def test_the_checks_run_on_every_python_that_is_promised():
    jobs = loaded(WORKFLOWS["checks"])["jobs"]
    assert jobs["tests"]["strategy"]["matrix"]["python"] == PYTHONS
    assert PROJECT["requires-python"] == f">={PYTHONS[0]}"
    (oldest,) = (step["with"] for step in jobs["oldest"]["steps"] if "python-version" in step.get("with", {}))
    assert oldest["python-version"] == PYTHONS[0]


def test_the_checks_are_those_of_ci_run():
    """A check that `.ci/run` gains is missed in the workflow."""
    tools = r"(?:pytest|ruff|mypy|sphinx|tests/oldest\.py)\b.*"
    ours = re.findall(
        rf"^(?:\.venv/bin/)?(?:python3? (?:-m )?)?({tools})", (ROOT / ".ci" / "run").read_text(), re.MULTILINE
    )
    theirs = re.findall(rf"^(?:python (?:-m )?)?({tools})", commands(WORKFLOWS["checks"]), re.MULTILINE)
    assert len(ours) > 5
    assert {re.sub(r"-n \d", "-n N", check) for check in ours} <= {re.sub(r"-n \d", "-n N", check) for check in theirs}


def test_links_lead_to_one_repository():
    repository = PROJECT["urls"]["Source"]
    for text in (loaded(ROOT / "CITATION.cff")["repository-code"], *PROJECT["urls"].values()):
        assert text.startswith((repository, PROJECT["urls"]["Documentation"]))
    assert repository + "/security/advisories/new" in (ROOT / "SECURITY.md").read_text()


class TestTheSite:
    @pytest.fixture
    def html(self, tmp_path):
        """A built site whose page says which version it is of."""

        def build(name):
            folder = tmp_path / "html"
            folder.mkdir(exist_ok=True)
            (folder / "index.html").write_text(name)
            return folder

        return build

    def test_latest_is_the_newest_release_and_not_the_one_built_last(self, html, tmp_path):
        site = tmp_path / "site"
        site.mkdir()
        publish.publish(html("main"), site, "main")
        assert "url=main/" in (site / "index.html").read_text()
        for name in ("v0.9.0", "v0.10.0", "v0.9.1", "v0.11.0rc1"):
            publish.publish(html(name), site, name)
        assert "url=latest/" in (site / "index.html").read_text()
        assert (site / "latest" / "index.html").read_text() == "v0.10.0"
        listed = re.findall(r">([^<]+)</a>", (site / "versions" / "index.html").read_text())
        assert listed == ["v0.10.0", "v0.9.1", "v0.9.0", "main", "v0.11.0rc1"]
        assert all((site / name / "index.html").read_text() == name for name in listed)

    def test_pages_that_a_version_no_longer_has_go(self, html, tmp_path):
        site = tmp_path / "site"
        (site / "main").mkdir(parents=True)
        (site / "main" / "old.html").touch()
        publish.publish(html("main"), site, "main")
        assert not (site / "main" / "old.html").exists()

    @pytest.mark.parametrize("name", ["", "..", "a/b", "latest", "versions"])
    def test_names_that_are_no_folder_of_a_version_are_refused(self, html, tmp_path, name):
        with pytest.raises(ValueError, match="cannot be the folder of a version"):
            publish.publish(html("main"), tmp_path / "site", name)

    @pytest.mark.slow
    def test_the_workflow_publishes_to_a_branch(self, html, tmp_path):
        """The step `Publish` as it stands, in a clone, without and with a branch of earlier versions."""
        steps = loaded(WORKFLOWS["docs"])["jobs"]["publish"]["steps"]
        (script,) = (step["run"] for step in steps if step.get("name") == "Publish")

        def git(*arguments, cwd=tmp_path):
            return subprocess.run(["git", *arguments], cwd=cwd, check=True, capture_output=True, text=True).stdout

        git("init", "-q", "--bare", "-b", "main", "origin")
        for name in ("main", "v0.2.0", "v0.2.0"):  # a tag may be built again
            clone = tmp_path / f"clone{len(list(tmp_path.glob('clone*')))}"
            git("clone", "-q", "origin", clone)
            (clone / "docs" / "_build").mkdir(parents=True)
            (clone / "docs" / "publish.py").write_text(Path(publish.__file__).read_text())
            html(name).rename(clone / "docs" / "_build" / "html")
            if name == "main":
                git("add", "docs/publish.py", cwd=clone)
                git("-c", "user.name=a", "-c", "user.email=a@b.c", "commit", "-qm", "Start", cwd=clone)
                git("push", "-q", "origin", "HEAD:main", cwd=clone)
            done = subprocess.run(
                ["bash", "-e", "-c", script], cwd=clone, capture_output=True, text=True,
                env={"PATH": f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin", "GITHUB_REF_NAME": name},
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
        files = git("ls-tree", "-r", "--name-only", "gh-pages", cwd=tmp_path / "origin").split()
        folders = ("latest", "main", "v0.2.0", "versions")
        assert files == [".nojekyll", "index.html", *(f"{folder}/index.html" for folder in folders)]
        assert git("show", "gh-pages:latest/index.html", cwd=tmp_path / "origin") == "v0.2.0"
        assert git("log", "--format=%s", "gh-pages", cwd=tmp_path / "origin").splitlines() == [
            "Documentation of v0.2.0",
            "Documentation of main",
        ]
