"""What README and its like tell a user to type is right: each command, and the quick start from a fresh clone on."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from nettorrent_mpi.cli import arguments
from nettorrent_mpi.config import reading as configuration
from nettorrent_mpi.config.search_file import read_search

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = next(action.choices for action in arguments.make_parser()._actions if action.dest == "command")
TEXTS = {
    "README.md": README,
    "CONTRIBUTING.md": (ROOT / "CONTRIBUTING.md").read_text(),
    **{str(page.relative_to(ROOT)): page.read_text() for page in sorted((ROOT / "docs").rglob("*.md"))},
    **{f"{name} --help": parser.description or "" for name, parser in COMMANDS.items()},
}
PROGRAMS = ["make", "mpirun", "nettorrent", "pip", "python", "python3", "sbatch"]
PARTS = ("...", "X", "PATH", "P", "R", "S")  # words that stand for something


def blocks(language: str) -> list[str]:
    """The code blocks of README in this language."""
    return code_of(README, language)


def code_of(text: str, language: str) -> list[str]:
    """The code blocks of a text in this language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def commands() -> list[tuple[str, list[str]]]:
    """(text, words) of each command in a block or between backticks that begins with one of PROGRAMS."""
    found = []
    for name, text in TEXTS.items():
        lines = re.findall(r"^    (\S.*)$", text, re.MULTILINE) + re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text)
        lines += [line for block in re.findall(r"^```sh\n(.*?)^```$", text, re.M | re.S) for line in block.splitlines()]
        for line in lines:
            words = re.sub(r"\s[#>&].*", "", line).removesuffix("\\").split()
            while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
                del words[0]
            if words[1:] and words[0].removeprefix(".venv/bin/") in PROGRAMS and not set(PARTS) & set(words):
                found.append((name, shlex.split(" ".join(words))))
    return found


def check(words: list[str]) -> None:
    """Raise an error unless a command is one that there is, of things that there are."""
    program, *rest = words
    if program.endswith("mpirun"):
        while rest and rest[0].startswith("-"):
            rest = rest[2:] if rest[0] == "-n" else rest[1:]
        if rest:
            check(rest)
    elif program == "make":
        targets = re.findall(r"^([a-z-]+(?: [a-z-]+)*):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert all(word in " ".join(targets).split() for word in rest if "=" not in word)
    elif program == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        for text in re.findall(r"\[(.*?)\]", " ".join(rest)):
            assert set(text.split(",")) <= set(extras)
    elif program == "nettorrent" or rest[:2] == ["-m", "nettorrent_mpi.train"]:
        args = arguments.parse(rest if program == "nettorrent" else ["train", *rest[2:]])
        if "changes" in args and "config" in args and (args.config or "configs/").startswith("configs/"):
            configuration.load(args.config, args.changes)
        if "search" in args:
            read_search(args.search, args.changes)
    elif rest[0] == "-m" and rest[1] not in ("pytest", "venv"):
        module = ROOT.joinpath(*rest[1].split("."))
        assert module.is_dir() or module.with_suffix(".py").exists()
    elif program == "sbatch":
        assert (ROOT / next(word for word in rest if not word.startswith("-"))).exists()


def test_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands name options, configurations and keys that there are."""
    monkeypatch.chdir(ROOT)
    found = commands()
    assert len([name for name, _ in found if name == "README.md"]) > 25
    assert len([name for name, _ in found if name.startswith("docs/")]) > 50
    for name, words in found:
        try:
            check(words)
        except Exception as error:
            pytest.fail(f"{name}: {' '.join(words)}: {error}", pytrace=False)


def test_files_that_are_linked_are_there() -> None:
    links = [
        link for name, text in TEXTS.items() if "docs/" not in name for link in re.findall(r"\]\(([^)#:]+)\)", text)
    ]
    assert len(links) > 10
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_headings_that_are_linked_are_there() -> None:
    headings = {re.sub(r"[^\w -]", "", line).strip().lower().replace(" ", "-") for line in README.splitlines()}
    assert set(re.findall(r"\]\(#([^)]+)\)", README)) <= headings


def test_the_configuration_is_one(tmp_path: Path) -> None:
    (text,) = blocks("yaml")
    (tmp_path / "config.yaml").write_text(text)
    config = configuration.load(str(tmp_path / "config.yaml"), [])
    assert config.train.batch_size == yaml.safe_load(text)["train"]["batch_size"]


ARRAYS = """
import numpy as np
x, y = np.random.default_rng(0).normal(size=(300, 5)), np.arange(300) % 10
x_test, y_test, x_new = x[:50], y[:50], x[:7]
"""


def run_script(script: str, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_script_runs(tmp_path: Path) -> None:
    script, *_ = blocks("python")
    told = run_script(f"{ARRAYS}{script}print(classes.shape, flush=True)", tmp_path)
    assert told.splitlines()[-1] == "(7,)"
    assert (tmp_path / "model.h5").exists()


OF_TORCH = """
import torch
torch.manual_seed(0)
train_set = torch.utils.data.TensorDataset(torch.randn(600, 5), torch.arange(600) % 3)
AnyModule = lambda: torch.nn.Linear(5, 3)
"""


def test_the_script_of_pytorch_runs(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    _, script = blocks("python")
    told = run_script(f"{OF_TORCH}{script}", tmp_path)
    assert "epoch 10  step 30  loss" in told
    assert set(torch.load(tmp_path / "model.pt", weights_only=True)) == {"weight", "bias"}


def test_the_script_of_dpwa_runs(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    (tmp_path / "dpwa.yaml").write_text("- interpolation: clock\n- timeout_ms: 2500\n")
    given = "import torch\nnet, training_samples, loss = torch.nn.Linear(5, 3), [1.5, 0.5], 2.0\ntrain_batch = float\n"
    script = next(code for code in code_of(TEXTS["docs/guide/pytorch.md"], "python") if "dpwa" in code)
    assert run_script(f"{given}{script}print(loss, conn.size)", tmp_path) == "0.5 1\n"


# -- the quick start ---------------------------------------------------------------------------------------------------
(QUICK_START,) = blocks("sh")
AS_USER: dict[str, Any] = {"user": 65534, "group": 65534, "extra_groups": []}  # nobody


SYSTEM = "/usr/local/bin:/usr/bin:/bin"
FIT = ["python3", "-c", "import sys, ensurepip; sys.exit(sys.version_info < (3, 11))"]


@pytest.fixture(scope="module")
def clone() -> Iterator[Path]:
    """A folder with the files of this one that are, or may be, committed; all users may enter and change it."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("this is no clone")
    folder = Path(tempfile.mkdtemp(prefix="nettorrent-clone-"))
    for name in filter(None, listed.stdout.split("\0")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, folder / name)
    folder.chmod(0o777)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def typed(text: str, folder: Path, **options: Any) -> str:
    """What a shell writes that is given this text, in an environment that knows no MPI and no virtual environment.

    Its Python is the system's, which every user can run, unless that is too old.
    """
    unwanted = ("OMPI_", "PRTE_", "PMIX_", "MPI4PY_", "VIRTUAL_ENV", "PYTHONPATH", "OPENBLAS_", "OMP_")
    env = {name: value for name, value in os.environ.items() if not name.startswith(unwanted)}
    env |= {"HOME": str(folder), "PATH": SYSTEM}
    try:
        subprocess.run(FIT, env=env, check=True)
    except (OSError, subprocess.CalledProcessError):
        env["PATH"] = f"{sys.base_prefix}/bin:{SYSTEM}"
    shell = ["timeout", "-k", "10", "600", "bash", "-e"]  # which ends what the shell has started, too
    done = subprocess.run(shell, input=text, cwd=folder, env=env, capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.slow
def test_quick_start(clone: Path) -> None:
    told = typed(QUICK_START, clone)
    assert "on 4 ranks" in told
    assert "test accuracy" in told
    assert (clone / "runs" / "digits" / "model.h5").exists()
    # What is not installed is told in one line, where it would be worth it.
    assert "not installed" not in told
    few = typed(". .venv/bin/activate; nettorrent train --set train.steps=2 --set kernels=fastest --output few", clone)
    assert few.count("pip install") == few.count("up to 1.9 times as fast with Numba") == 1, few


@pytest.mark.long
def test_quick_start_of_a_user(clone: Path) -> None:
    """The same without root and without root's line, with what is installed already."""
    if os.geteuid() != 0:
        pytest.skip("the quick start has been run by a user")
    if not (clone / ".venv").exists():
        pytest.skip("the quick start has to run first")
    lines = [line for line in QUICK_START.splitlines() if not re.match(r"pip |python3 |export OMPI_ALLOW", line)]
    assert len(lines) == len(QUICK_START.splitlines()) - 3
    subprocess.run(["chmod", "-R", "a+rwX", str(clone)], check=True)
    shutil.rmtree(clone / "runs")
    try:
        typed(". .venv/bin/activate; python -c pass", clone, **AS_USER)
    except AssertionError:
        pytest.skip("this Python is root's alone")
    assert "on 4 ranks" in typed("\n".join(lines), clone, **AS_USER)
