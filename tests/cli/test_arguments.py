"""The command line: what is said of wrong arguments, and help that fits a terminal."""

from __future__ import annotations

import pytest

from nettorrent_mpi.cli.arguments import parse
from nettorrent_mpi.plan.errors import UserError


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
        ("train --zzz", "unrecognized arguments: --zzz (see nettorrent train --help)"),
        ("export r x.npz --overwrit", "did you mean --overwrite? (see nettorrent export --help)"),
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
    ["", "train", "evaluate", "predict", "export", "inspect", "speedup", "tune", "data", "data fetch", "data import"],
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
    assert max(map(len, said[80].splitlines())) <= 80
    assert said[80].split() == said[300].split()
