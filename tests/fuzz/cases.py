"""Cases: for each target the sound files that are damaged, and strategies that write a case into a folder."""

from __future__ import annotations

import copy
import gzip
import hashlib
import io
import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, TypeAlias

import h5py
import numpy as np
from PIL import Image

from nettorrent_mpi.plan.topology import Stage, Topology
from tests.fuzz import config_cases
from tests.fuzz.hdf5_cases import NAMES, SECRET, strange
from tests.fuzz.mutations import mutated, mutations

Files: TypeAlias = dict[str, bytes]  # by their names in the case's folder


class Seeds(list[Files]):
    """Seeds are sound files, too many bytes to be shown."""

    def __repr__(self) -> str:
        return f"{len(self)} seeds"


def write(files: Files, folder: Path) -> None:
    """Make the folder hold these files alone."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    os.mkfifo(folder / "fifo")  # whoever opens it waits for ever
    (folder.parent / "secret").write_bytes(SECRET)
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def read(folder: Path) -> Files:
    """Return the files of a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def damaged(random: Random, seeds: Seeds) -> Files:
    """Damage one file, seldom several, of one of the seeds."""
    files = dict(random.choice(seeds))
    others = [content for seed in seeds for content in seed.values()]
    for name in random.sample(sorted(files), random.randint(1, min(2, len(files)))):
        files[name] = mutated(files[name], mutations(random), others)
    return files


def idx_seeds(folder: Path) -> Seeds:
    """Small MNISTs: compressed, plain, of several gzip members."""
    numbers = np.random.default_rng(0)
    plain: Files = {}
    for prefix, rows in (("train", 40), ("t10k", 10)):
        x, y = numbers.integers(0, 40, (rows, 9, 8), np.uint8), np.arange(rows, dtype=np.uint8) % 10
        for kind, values in (("images-idx3", x), ("labels-idx1", y)):
            head = struct.pack(f">4B{values.ndim}I", 0, 0, 8, values.ndim, *values.shape)
            plain[f"mnist/{prefix}-{kind}-ubyte"] = head + values.tobytes()
    packed = {f"{name}.gz": gzip.compress(content, mtime=0) for name, content in plain.items()}
    members = {
        f"{name}.gz": gzip.compress(content[:20], mtime=0) + gzip.compress(content[20:], mtime=0)
        for name, content in plain.items()
    }
    return Seeds([plain, packed, members])


def cifar_seeds(folder: Path) -> Seeds:
    """A small CIFAR-10."""
    numbers = np.random.default_rng(0)
    files = {}
    for name in (*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin"):
        records = numbers.integers(0, 256, (3, 3073), np.uint8)
        records[:, 0] %= 10
        files[f"cifar-10-batches-bin/{name}"] = records.tobytes()
    return Seeds([files])


def hdf5_seeds(folder: Path) -> Seeds:
    """Data sets in each way in which HDF5 stores them."""
    numbers = np.random.default_rng(0)
    rows = 60
    x, y = numbers.integers(0, 256, (rows, 6, 5, 3), np.uint8), np.arange(rows) % 4
    real = x.astype(np.float32) / 255
    ways: list[tuple[Any, dict[str, Any], dict[str, Any]]] = [
        (x, {}, {}),
        (x, {"libver": "latest"}, {}),
        (x, {"libver": ("v110", "v110")}, {"chunks": (7, 6, 5, 3), "fletcher32": True}),
        (x, {"userblock_size": 512}, {"chunks": (7, 6, 5, 3), "compression": "gzip", "shuffle": True}),
        (real, {}, {"chunks": (20, 6, 5, 3), "compression": "lzf"}),
        (real, {"libver": "latest"}, {"chunks": (20, 6, 5, 3), "compression": "gzip"}),
        (real.astype(">f8"), {"track_order": True}, {"fletcher32": True}),
        (real, {}, {"chunks": (8, 6, 5, 3), "scaleoffset": 2}),
        (x, {"libver": "latest"}, {"chunks": (8, 6, 5, 3), "maxshape": (None, None, 5, 3)}),
    ]
    seeds = Seeds()
    for number, (values, options, how) in enumerate(ways):
        path = folder / f"{number}.h5"
        with h5py.File(path, "w", **options) as file:
            file.create_dataset("x", data=values, **how)
            if number % 2:
                file["y"] = y
                file.attrs["classes"] = ["a", "b", "c", "d"] if number % 4 == 1 else np.array([b"a", b"b", b"c", b"d"])
                file["x_test"], file["y_test"] = values[:9], y[:9]
            else:
                file.create_dataset("y", data=numbers.normal(size=(rows, 2)), **({"chunks": (7, 2)} if how else {}))
        seeds.append({"data.h5": path.read_bytes()})
    return seeds


def hdf5_strange_seeds(folder: Path) -> Seeds:
    """Other files to which a strange one may lead."""
    secret = np.frombuffer(SECRET * 100, np.uint8)[: 60 * 90].reshape(60, 6, 5, 3)
    for path in (folder / "other.h5", folder.parent.parent / "secret.h5"):
        with h5py.File(path, "w") as file:
            file["x"] = secret if path.name == "secret.h5" else secret // 2
            file["y"] = np.arange(60) % 4
            file["parameters/linear1/weight"] = np.frombuffer(SECRET[: 8 * 6 * 4], np.float32).reshape(8, 6)
    with h5py.File(folder / "link.h5", "w") as file:
        file["x"], file["y"] = h5py.ExternalLink("../secret.h5", "/x"), h5py.ExternalLink("fifo", "/y")
        file["loop"] = h5py.ExternalLink("link.h5", "/loop")
    return Seeds([{name: (folder / name).read_bytes() for name in ("other.h5", "link.h5")}])


def hdf5_strange(random: Random, seeds: Seeds) -> Files:
    """Lay a strange file beside the others."""
    return {**seeds[0], "data.h5": strange(random, NAMES)}


def model_strange(random: Random, seeds: Seeds) -> Files:
    """Lay a strange model.h5 beside the others."""
    names = [f"parameters/linear{number}/{name}" for number in (1, 2) for name in ("weight", "bias")]
    return {**seeds[0], "model.h5": strange(random, names)}


def config_seeds(folder: Path) -> Seeds:
    """The project's own configurations."""
    return Seeds([{"c.yaml": text.encode()} for text in config_cases.seeds()])


def config_files(random: Random, seeds: Seeds) -> Files:
    """Make a configuration."""
    return {"c.yaml": config_cases.configurations(random, [seed["c.yaml"].decode() for seed in seeds])}


def dpwa_seeds(folder: Path) -> Seeds:
    """Files of dpwa, as a list and as a mapping."""
    return Seeds([{"d.yaml": text.encode()} for text in config_cases.DPWA])


def dpwa_files(random: Random, seeds: Seeds) -> Files:
    """Make a file of dpwa."""
    return {"d.yaml": config_cases.configurations(random, [seed["d.yaml"].decode() for seed in seeds])}


def image_seeds(folder: Path) -> Seeds:
    """Small pictures in every format that is read, and some that are not."""
    numbers = np.random.default_rng(0)
    exif = Image.Exif()
    exif[0x0112] = 6
    ways: list[tuple[str, str, dict[str, Any]]] = [
        ("PNG", "RGB", {"exif": exif}), ("PNG", "LA", {}), ("PNG", "I;16", {}), ("PNG", "1", {}), ("PNG",
        "P", {"transparency": 3}),
        ("JPEG", "RGB", {"exif": exif, "icc_profile": b"x" * 200}), ("JPEG", "CMYK", {}), ("JPEG", "L",
        {"progressive": True}),
        ("GIF", "P", {"save_all": True, "append_images": [Image.new("P", (9, 7), 3)] * 3}), ("BMP", "RGB", {}),
        ("TIFF", "RGB", {"compression": "tiff_lzw"}), ("TIFF", "RGB", {"compression": "tiff_deflate"}),
        ("TIFF", "L", {"save_all": True, "append_images": [Image.new("L", (9, 7))] * 2}), ("TIFF", "CMYK", {}),
        ("TIFF", "1", {"compression": "group4"}), ("TIFF", "RGB", {"compression": "jpeg"}),
        ("WEBP", "RGB", {"exif": exif}), ("WEBP", "RGBA", {"lossless": True}), ("AVIF", "RGB", {}), ("PPM", "RGB", {}),
        ("TGA", "RGBA", {"compression": "tga_rle"}), ("PCX", "P", {}), ("JPEG2000", "RGB", {}), ("MPO", "RGB", {}),
        ("EPS", "RGB", {}), ("ICO", "RGBA", {}), ("DDS", "RGB", {}), ("PDF", "RGB", {}), ("IM", "RGB", {}),
        ("SGI", "L", {}),
    ]  # fmt: skip
    seeds = Seeds()
    sound = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(sound, "PNG")
    for form, mode, options in ways:
        picture = Image.fromarray(numbers.integers(0, 256, (7, 9, 3), np.uint8)).convert(mode)
        made = io.BytesIO()
        try:
            picture.save(made, form, **options)
        except (OSError, KeyError):  # this Pillow lacks the format
            continue
        seeds.append({"in/a/x.png": made.getvalue(), "in/b/y.png": sound.getvalue()})
    return seeds


def image_files(random: Random, seeds: Seeds) -> Files:
    """Damage one picture."""
    files = dict(random.choice(seeds))
    others = [seed["in/a/x.png"] for seed in seeds]
    files["in/a/x.png"] = mutated(files["in/a/x.png"], mutations(random), others)
    if random.randint(0, 9) == 0:
        files[random.choice(["in/a/\x1b[2J.png", "in/\u202ec/z.gif", "in/c\n/z", "in/a/\udce9.jpg"])] = files[
            "in/a/x.png"
        ]
    return files


def rows_seeds(folder: Path) -> Seeds:
    """Rows in a .npy of each version, and in archives, stored and packed."""
    x = np.random.default_rng(0).normal(size=(20, 6, 5)).astype(np.float32)
    seeds = Seeds()
    for values in (x, (9 * np.abs(x)).astype(np.uint8), x.astype(">f8")):
        for save, name in ((np.save, "x.npy"), (np.savez, "x.npz"), (np.savez_compressed, "x.npz")):
            made = io.BytesIO()
            save(made, values) if save is np.save else save(made, x=values, y=np.arange(20))
            seeds.append({name: made.getvalue()})
    second = io.BytesIO()
    np.lib.format.write_array(second, x, version=(2, 0))
    return Seeds([*seeds, {"x.npy": second.getvalue()}])


def tables_seeds(folder: Path) -> Seeds:
    """Tables, with and without a header, and archives."""
    x, y = np.random.default_rng(0).integers(0, 256, (24, 6)), np.arange(24) % 3
    lines = [",".join(map(str, [*row, label])) for row, label in zip(x.tolist(), y.tolist(), strict=True)]
    texts = ["\n".join(lines), "a,b,c,d,e,f,label\n" + "\n".join(lines), "\n".join(lines).replace(",", ";")]
    seeds = Seeds([{"x.csv": text.encode()} for text in texts])
    for save in (np.savez, np.savez_compressed):
        made = io.BytesIO()
        images = x.astype(np.uint8).reshape(24, 2, 3)
        save(made, x=images, y=y, x_test=images[:5], y_test=y[:5])
        seeds.append({"x.npz": made.getvalue()})
    return seeds


def model_seeds(folder: Path) -> Seeds:
    """A small network's model.h5."""
    from tests.fuzz import targets  # loads the whole package

    targets.make_model(folder / "model.h5")
    return Seeds([{"model.h5": (folder / "model.h5").read_bytes()}])


def checkpoint_seeds(folder: Path) -> Seeds:
    """A small network's checkpoint."""
    from tests.fuzz import targets

    shutil.rmtree(folder)  # that of a process before
    targets.make_checkpoint(folder)
    return Seeds([{name: text for name, text in read(folder).items() if name.startswith("checkpoints/")}])


def sealed(random: Random, seeds: Seeds) -> Files:
    """Change files of a checkpoint, and its manifest, and then make all checksums right, as somebody else could."""
    files = dict(random.choice(seeds))
    (manifest,) = (name for name in files if name.endswith("manifest.json"))
    folder = manifest.rpartition("/")[0]
    told = json.loads(files[manifest])
    del told["checksum"]
    name = random.choice([name for name in files if name != manifest])
    if random.random() < 0.5:
        content = mutated(files[name], mutations(random), list(files.values()))
        if random.random() < 0.3:
            content = strange(random, ["parameters/linear1/weight/0-8x0-6", "parameters/linear1/bias/0-6"])
        files[name] = content
        about = told["files"][name.removeprefix(f"{folder}/")]
        about["bytes"], about["sha256"] = len(content), hashlib.sha256(content).hexdigest()
    for _ in range(random.randint(0, 3)):
        _change(random, told)
    checksum = hashlib.sha256(json.dumps(told).encode()).hexdigest()
    files[manifest] = (json.dumps({**told, "checksum": checksum}) + "\n").encode()
    return files


_ODD_VALUES: list[Any] = [
    0, -1, 1 << 40, 1 << 62, 1e308, float("inf"), float("nan"), True, None, "", "x", "../../secret.h5", "/etc/passwd",
    [], {}, [[0, 3]], [["parameters/linear1/weight", [[0, 1 << 40], [0, 6]]]], "{}", "[" * 50_000, "\x1b[2J", "float64",
]  # fmt: skip


def _change(random: Random, told: Any) -> None:
    """Change one value of JSON, at any depth."""
    while True:
        keys = list(told) if isinstance(told, dict) else list(range(len(told)))
        if not keys:
            return
        key = random.choice(keys)
        if isinstance(told[key], dict | list) and random.random() < 0.8:
            told = told[key]
            continue
        kind = random.random()
        if kind < 0.7:
            told[key] = copy.deepcopy(random.choice(_ODD_VALUES))
        elif kind < 0.85:
            del told[key]
        elif isinstance(told, dict):
            names = ["x", "../x.h5", "shard-00001.h5", "parameters/linear1/weight", "parameters/\x1b[2J", ""]
            told[random.choice(names)] = copy.deepcopy(told[key])
        else:
            told.append(copy.deepcopy(told[key]))
        return


def metrics_seeds(folder: Path) -> Seeds:
    """A run folder's records and summary."""
    lines = [{"step": step, "epoch": step / 10, "train_loss": 0.5, "test_accuracy": None} for step in range(5, 45, 5)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    summary = json.dumps({"steps": 20, "test_accuracy": 0.5, "data": {"rows": 40}}, indent=2)
    return Seeds([{"metrics.jsonl": text.encode(), "summary.json": summary.encode()}])


_ODD_JSON = [
    "[" * 100_000, '{"step": 1e999}', '{"step": NaN}', '{"step": -Infinity}', '{"step": ' + "9" * 5000 + "}",
    '{"step": true}',
    '{"step": "5"}', '{"step": [5]}', '{"step": {}}', "null", "5", '"x"', "{}", '{"step": 5, "step": 50}',
    '{"step": 5.9}',
    '{"steps": 20}', '{"steps": [20]}', '{"steps": 1e999}', "\0" * 50, "\ud800", "\u2028", '{"step": 1}\r',
    '{"a":' * 50_000,
    '{"step": 1, "\x1b[2J": "\x1b"}', " ", '{"step": 5}{"step": 5}',
]  # fmt: skip


def metrics_files(random: Random, seeds: Seeds) -> Files:
    """Damage the bytes of a run's records, or put odd lines among them."""
    files = damaged(random, seeds)
    for name in random.sample(["metrics.jsonl", "summary.json"], random.randint(0, 2)):
        odd = random.choice(_ODD_JSON).encode("utf-8", "surrogatepass")
        files[name] = odd if name == "summary.json" or (random.random() < 0.5) else files[name] + odd + b"\n"
    return files


def run_folder_seeds(folder: Path) -> Seeds:
    """Folders of a run, one of few ranks with a trace, in two parts, one of many."""
    from tests.cli.runs.made import TWO, earlier, make, records, trace

    shutil.rmtree(folder, ignore_errors=True)
    many = Topology(1, (Stage(0, 1, 300, 1), Stage(1, 2, 4, 2)))
    few = make(folder / "few", metrics=records(TWO, 4), after=50, earlier=[earlier(1, 50, TWO)])
    (few / "trace.json").write_text(trace(TWO, steps=2))
    return Seeds([read(few), read(make(folder / "many", many, metrics=records(many, 4, slowest=7)))])


_ODD_VALUES = [
    None, True, -1, 0, 1e308, 1e-320, 10**40, "", "x" * 600,
    "\x1b[2J\n", "<script>alert(1)</script><img src=x>", [], {},
    [[]], {"a": {}},
]  # fmt: skip


def run_folder_files(random: Random, seeds: Seeds) -> Files:
    """Damage the bytes of a run's files, or values and keys in them."""
    files = damaged(random, seeds) if random.random() < 0.3 else dict(random.choice(seeds))
    for name in random.sample(sorted(files), random.randint(1, 3)):
        lines = files[name].split(b"\n") if name == "metrics.jsonl" else [files[name]]
        number = random.randrange(len(lines))
        try:
            told = json.loads(lines[number])
        except ValueError:
            continue
        for _ in range(random.randint(1, 4)):
            _spoil(told, random)
        lines[number] = json.dumps(told).encode()
        files[name] = b"\n".join(lines)
    return files


def _spoil(told: Any, random: Random) -> None:
    """Put an odd value somewhere into a value of JSON."""
    while isinstance(told, dict | list) and told:
        key: Any = random.choice([*told]) if isinstance(told, dict) else random.randrange(len(told))
        if not isinstance(told[key], dict | list) or not told[key] or random.random() < 0.4:
            told[key] = copy.deepcopy(random.choice(_ODD_VALUES))
            return
        told = told[key]


SEEDS: dict[str, Callable[[Path], Seeds]] = {
    "idx": idx_seeds,
    "cifar": cifar_seeds,
    "hdf5": hdf5_seeds,
    "strange_hdf5": hdf5_strange_seeds,
    "config": config_seeds,
    "dpwa": dpwa_seeds,
    "images": image_seeds,
    "rows": rows_seeds,
    "tables": tables_seeds,
    "model": model_seeds,
    "checkpoint": checkpoint_seeds,
    "sealed_checkpoint": checkpoint_seeds,
    "strange_model": hdf5_strange_seeds,
    "metrics": metrics_seeds,
    "run_folder": run_folder_seeds,
}
CASES: dict[str, Callable[[Random, Seeds], Files]] = {
    "idx": damaged,
    "cifar": damaged,
    "hdf5": damaged,
    "strange_hdf5": hdf5_strange,
    "config": config_files,
    "dpwa": dpwa_files,
    "images": image_files,
    "rows": damaged,
    "tables": damaged,
    "model": damaged,
    "strange_model": model_strange,
    "checkpoint": damaged,
    "sealed_checkpoint": sealed,
    "metrics": metrics_files,
    "run_folder": run_folder_files,
}
