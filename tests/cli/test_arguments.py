"""The command line: what is said of wrong arguments, and help that fits a terminal."""

from __future__ import annotations

import re

import pytest

from nettorrent_mpi.cli.arguments import make_parser, parse
from nettorrent_mpi.plan.errors import UserError

COMMANDS = ["", *next(each.choices for each in make_parser()._actions if each.dest == "command"), "data fetch"]
COMMANDS.append("data import")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("train --epochs 3", "unrecognized arguments: --epochs; write --set train.epochs=3 in place of --epochs"),
        ("train c.yaml --batch-size=64", "write --set train.batch_size=64 in place of --batch-size=64"),
        (
            "train c.yaml --lr 0.1 --seed 3",
            "write --set train.optimizer.adam.lr=0.1 in place of --lr; write --set seed=3",
        ),
        ("train c.yaml train.epochs=3", "write --set train.epochs=3 in place of train.epochs=3"),
        ("train --gpu", "--gpu: write device: gpu, or leave it out: device: auto takes a GPU where every rank has one"),
        ("train c.yaml --nproc 4", "--nproc: leave it out: mpirun -n N starts N ranks"),
        ("train --config c.yaml", "write the configuration's file without an option before it"),
        ("train --resum", "did you mean --resume? (see nettorrent train --help)"),
        ("train --dryrun", "did you mean --dry-run?"),
        ("train --zzz", "unrecognized arguments: --zzz; its options are --dry-run, --link, "),
        (
            "evaluate --misspelt",
            "--misspelt; its options are --confusion, --output, --set (see",
        ),
        ("evaluate --confuson", "unrecognized arguments: --confuson; did you mean --confusion? (see"),
        ("evaluate --set a=1", "the following arguments are required: RUN (see nettorrent evaluate --help)"),
        ("data --rot", "unrecognized arguments: --rot"),
        ("--verson", "did you mean --version? (see nettorrent --help)"),
        ("export r x.npz", "the file that it writes is named by an option: --output x.npz (see"),
        ("train a.yaml b.yaml", "unrecognized arguments: b.yaml (see nettorrent train --help)"),
        ("export r -o x.npz --overwrit", "did you mean --overwrite? (see nettorrent export --help)"),
        ("data fetch mnist --rot d", "did you mean --root? (see nettorrent data fetch --help)"),
        ("tran c.yaml", "invalid choice: 'tran' (choose from"),
        ("tran c.yaml", "did you mean train? (see nettorrent --help)"),
    ],
)
def test_wrong_arguments_are_corrected(arguments: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(arguments.split())
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "command",
    COMMANDS,
)
def test_help_is_broken_between_words(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = {}
    for columns in (80, 300):
        monkeypatch.setenv("COLUMNS", str(columns))
        with pytest.raises(SystemExit):
            parse([*command.split(), "--help"])
        said[columns] = capsys.readouterr().out
    examples = ("    nettorrent", "    mpirun")  # are lines to copy
    assert max(len(line) for line in said[80].splitlines() if not line.startswith(examples)) <= 80
    if command:  # a sentence, and a line to copy
        assert re.search(r"\n\n[A-Z][a-z]+ .{20}", said[80])
        assert f"\n    nettorrent {command} " in said[300] or f" nettorrent {command}" in said[300].partition("\n\n")[2]
    assert said[80].split() == said[300].split()
