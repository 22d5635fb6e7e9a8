"""`nettorrent inspect` tells what a checkpoint, a run folder and model.h5 have, and names what is damaged."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest

import nettorrent_mpi as nt
from nettorrent_mpi.__main__ import main
from nettorrent_mpi.engine.checkpoint_manifest import _text
from nettorrent_mpi.engine.model_file import write_attributes

DATA = np.random.default_rng(0).normal(size=(32, 6)).astype(np.float32), np.arange(32) % 3


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("trained") / "run"
    how = {"batch_size": 16, "epochs": 2, "optimizer": nt.Adam(0.01), "seed": 1}
    with nt.Trainer([nt.Linear(4, activation="relu"), nt.Linear(3)], DATA, output=run, **how) as trainer:  # type: ignore[arg-type]
        list(trainer.train())
        trainer.save(run / "model.h5")
    return run


def told(capfd: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    capfd.readouterr()
    code = main(["inspect", *map(str, arguments)])
    return code, *capfd.readouterr()


def test_what_is_whole(trained: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, text, _ = told(capfd, trained)
    few, found = told(capfd, trained / "checkpoints" / "step-0000000004")[1], ["2: a checkpoint", "4: a checkpoint"]
    assert [each for each in (*found, "model.h5: a network, whole") if each not in text] == []
    assert code == 0
    assert re.search(r"\n  network +2 layers, 43 parameters: linear 4 relu, linear 3\n", few)
    assert re.search(r"\n  data +arrays: 32 training rows of 6 in 3 classes\n", few)
    assert re.search(r"\n  samples +64 training rows\n  time +[0-9.]+ s\n  ", few)
    assert "optimizer/m/linear1" not in few
    code, text, _ = told(capfd, trained, "--all")
    assert re.search(r"\n  optimizer/m/linear1/weight +6 x 4 +float32 +24\n", text)
    code, text, _ = told(capfd, trained / "checkpoints", "--json")
    _, found = json.loads(text)
    assert (code, found["step"], found["samples"], found["ranks"]) == (0, 4, 64, 1)
    assert found["layout"] == "1 replica x [linear1..linear2 1x1]"
    assert found["exchange"] == "allreduce"
    assert found["arrays"]["parameters/linear2/bias"] == {"shape": [3], "dtype": "float32"}
    assert found["config"]["seed"] == 1
    assert found["files"].keys() == {"index.h5", "shard-00000.h5"}
    assert {"version", "numpy", "h5py", "hdf5", "python", "mpi"} <= found.keys()
    (model,) = json.loads(told(capfd, trained / "model.h5", "--json")[1])
    assert list(model["arrays"]) == [f"parameters/linear{i}/{name}" for i in (1, 2) for name in ("bias", "weight")]


def test_what_is_damaged_or_missing(trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    newest = run / "checkpoints" / "step-0000000004"
    (newest / "index.h5").unlink()
    data = bytearray((newest / "shard-00000.h5").read_bytes())
    data[-9] ^= 4
    (newest / "shard-00000.h5").write_bytes(data)
    (run / "checkpoints" / "step-0000000002" / "manifest.json").write_text("{}")
    (run / "model.h5").write_bytes(b"no")
    code, text, _ = told(capfd, run)
    assert code == 2
    for words in (
        "step-0000000002/manifest.json: is not the whole manifest",
        "step-0000000004: a checkpoint, damaged",
        "step-0000000004/index.h5: is missing",
        "step-0000000004/shard-00000.h5: is not the file that was written (its checksum is another)",
        "model.h5: is not a whole file",
    ):
        assert words in text, text
    code, text, _ = told(capfd, run, "--json")
    assert (code, [bool(each["damage"]) for each in json.loads(text)]) == (2, [True, True, True])
    code, _, error = told(capfd, tmp_path)
    told_of = "has none of a run's files: name the folder of a run, which `nettorrent train` makes"
    assert code == 2
    assert error.startswith(f"nettorrent: error: {tmp_path} {told_of}")  # and which runs are near: of other tests, too


@pytest.mark.parametrize("name", ["file", "allow_pickle", "model", "..", "\x1b[2J", b"caf\xff", "a\nb", "a/.."])
def test_arrays_of_strange_names(tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str | bytes) -> None:
    with h5py.File(tmp_path / "model.h5", "w", libver=("v110", "latest")) as file:
        group = file.create_group("parameters")
        group.create_dataset(name, data=np.ones(3), chunks=True, fletcher32=True)
        about = {"rows": 1, "classes": None, "class_names": None, "mean": [0], "std": [1]}
        about |= {"name": "arrays", "transposed": False, "shape": [1], "unit": None}
        write_attributes(file, {"model": '{"layers": [], "loss": {}}', "data": json.dumps(about)})
    code, text, _ = told(capfd, tmp_path)
    assert text.replace("\n", "").isprintable()
    assert told(capfd, tmp_path, "--json")[0] == code == (0 if name in ("file", "allow_pickle", "model") else 2)
    assert main(["export", str(tmp_path), "--output", str(tmp_path / "out.npz")]) == (2 if name == "model" else code)
    if name == "model":
        assert "array model is no layer's" in capfd.readouterr().err
    elif code == 0:
        np.testing.assert_array_equal(np.load(tmp_path / "out.npz")[name], np.ones(3))
    else:
        assert "has an array of a strange name" in text
        assert "has an array of a strange name" in capfd.readouterr().err


def test_attributes_are_shown_as_text(trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    manifest = run / "checkpoints" / "step-0000000004" / "manifest.json"
    body = json.loads(manifest.read_text())
    del body["checksum"]
    body["attributes"]["layout"] = "\x1b[2J"
    manifest.write_text(_text(body))
    code, text, _ = told(capfd, run)
    assert code == 0
    assert text.replace("\n", "").isprintable()


def test_a_checkpoint_is_exported(trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for i, place in enumerate((trained, trained / "checkpoints", trained / "checkpoints" / "step-0000000004")):
        assert main(["export", str(place), "--output", str(tmp_path / f"{i}.npz")]) == 0
    first, *others = (np.load(tmp_path / f"{i}.npz") for i in range(3))
    for other in others:
        assert other.keys() == first.keys()
        assert all(np.array_equal(first[key], other[key]) for key in first)
