"""What cannot be had or read is refused in one line with exit code 2, whatever raises the error."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import h5py
import numpy as np
import pytest

from nettorrent_mpi.__main__ import main

CONFIG = """\
data: {name: digits}
model: {layers: [flatten, {linear: {units: 8}}, {linear: 10}]}
train: {steps: 2, batch_size: 8}
"""


def refusal(capfd: pytest.CaptureFixture[str], arguments: Sequence[str | Path]) -> str:
    assert main([str(argument) for argument in arguments]) == 2
    told = capfd.readouterr().err.strip()
    assert told.startswith("nettorrent: error: ")
    assert "\n" not in told
    return told


def test_a_network_that_no_memory_holds(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.yaml").write_text(CONFIG)
    wide = "model.layers=[flatten, {linear: 20000000}, {linear: 10000000}, {linear: 10}]"
    told = refusal(capfd, ["train", tmp_path / "c.yaml", "--dry-run", "--set", wide])
    assert "more than any computer holds" in told or "there is not enough memory (Unable to allocate" in told


def test_paths_that_the_system_refuses(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.yaml").write_text(CONFIG)
    train, long = ["train", tmp_path / "c.yaml"], "o" * 300
    assert f"{tmp_path / long}: File name too long" in refusal(capfd, [*train, "--output", tmp_path / long])
    output = [*train, "--output", tmp_path / "run", "--set", "data.name=mnist"]
    told = refusal(capfd, [*output, "--set", f"data.root={tmp_path / long}"])
    assert f"{long}/mnist/train-images-idx3-ubyte.gz: cannot be read (File name too long)" in told
    told = refusal(capfd, [*output, "--set", "data.root=~nobody-of-this-name/data"])
    assert told.endswith("data.root: ~nobody-of-this-name/data: this machine knows no such user's folder")
    assert os.listdir(tmp_path) == ["c.yaml"]


def test_a_file_of_weights_reads_no_other_file(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """External storage, a virtual array and a link would let a stranger's file read any of the user's."""
    (tmp_path / "secret").write_bytes(b"secret" * 10)
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["weight"] = np.zeros(60, np.uint8)
    for how in ("external", "virtual", "link"):
        (tmp_path / how).mkdir()
        with h5py.File(tmp_path / how / "model.h5", "w") as file:
            group = file.create_group("parameters/linear1")
            if how == "external":
                group.create_dataset("weight", (60,), np.uint8, external=[(tmp_path / "secret", 0, 60)])
            elif how == "virtual":
                layout = h5py.VirtualLayout((60,), np.uint8)
                layout[...] = h5py.VirtualSource(tmp_path / "other.h5", "weight", (60,))
                group.create_virtual_dataset("weight", layout)
            else:
                group["weight"] = h5py.ExternalLink(tmp_path / "other.h5", "weight")
        told = refusal(capfd, ["export", tmp_path / how, "--output", tmp_path / "out.npz"])
        assert ("holds no arrays" if how == "link" else "is not stored in this file") in told
        assert not (tmp_path / "out.npz").exists()
