"""The command `nettorrent draw`: a page on which a person draws, and the network of a run reads it."""

from __future__ import annotations

import base64
import hashlib
import json
import sys
from contextlib import suppress
from html import escape
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from nettorrent_mpi.cli.drawings import png
from nettorrent_mpi.cli.local_server import NOT_FOUND, TEXT, LocalServer, Request, Response
from nettorrent_mpi.data.handwriting import HANDS, ink_of_picture, prepared
from nettorrent_mpi.data.strokes import GLYPHS, inked
from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.engine.trained_network import TrainedNetwork, load
from nettorrent_mpi.plan.errors import ConfigError, UserError, readable

LONGEST = 1024  # side of a picture that is read
SHOWN = 10  # classes that are shown


def draw(run: str, *, like: str | None, port: int) -> None:
    """Serve the page for the network of RUN until the person ends it. Raises UserErrors."""
    reader = Reader(load(run), like)
    server = LocalServer(reader.answer, port)
    sys.stdout.write(
        f"{run}: {len(reader.network.classes)} classes, drawings are prepared as those of {reader.like}"
        f"{', transposed as EMNIST stores them' if reader.transposed else ''}\n"
        f"draw at      {server.url}\n"
        f"from afar    {server.tunnel}\n"
        f"end          Ctrl-C\n"
    )
    sys.stdout.flush()
    with suppress(KeyboardInterrupt):
        server.serve()


class Reader:
    """A Reader prepares drawings as the data set of a network did, and tells what the network takes them to be.

    like: the data set whose preparation is meant, one of HANDS; None: that on which the network was trained. Raises
    UserError for a network that reads no handwriting.
    """

    def __init__(self, network: TrainedNetwork, like: str | None = None):
        self.network, self.like = network, like or network.trained_on.name
        if like is not None and like not in HANDS:
            raise ConfigError(f"--like {like}: there are {', '.join(HANDS)}")
        if self.like not in HANDS:
            text = f"was trained on data of the kind {readable(self.like)}, not on {', '.join(HANDS)}"
            raise UserError(f"{network.file} {text}: say with --like which of these its pictures resemble")
        shape = network.shape
        if len(shape) != 3 or shape[0] != shape[1] or shape[2] != 1 or not network.classes:
            text = f"reads rows of {shape} and knows {len(network.classes)} classes; "
            raise UserError(f"{network.file} {text}handwriting has square grey pictures and classes")
        self._hand, self._lock = HANDS[self.like], Lock()
        self.transposed = self._reads_transposed()

    def _reads_transposed(self) -> bool:
        """Whether the network knows its characters transposed, as it does where the files of EMNIST were taken as they
        are: then it reads plain characters better that way."""
        known = [name for name in self.network.classes if name.upper() in GLYPHS]
        if not known or self.network.trained_on.transposed:
            return False
        found = [
            prepared(inked(GLYPHS[name.upper()], self._hand.pen), self._hand, self.network.shape[0]) for name in known
        ]
        upright = np.stack([each for each in found if each is not None])
        right = [
            sum(self.network.classes[i] == name for i, name in zip(labels, known, strict=True))
            for labels in (self._labels(upright), self._labels(upright.transpose(0, 2, 1)))
        ]
        return bool(right[1] > 2 * right[0])

    def _labels(self, values: Array) -> Array:
        return self.network.predict(self._stored(values))

    def _stored(self, values: Array) -> Array:
        """Return values of 0 to 1, (rows, side, side), as rows of the network's data set."""
        unit = self.network.trained_on.unit
        rows = values[..., np.newaxis]
        return rows if unit is None else np.rint(rows / unit).astype(np.uint8)

    def answer(self, request: Request) -> Response:
        """Answer the browser: the page itself, or what a drawing is taken to be, "read/KIND/WIDTH/HEIGHT": a byte for
        each pixel, from 0 to 255 of ink or of the light of a picture."""
        if request == ("GET", "", b""):
            return Response(self.page().encode())
        asked, *rest = request.path.split("/")
        if request.method != "POST" or asked != "read" or len(rest) != 3:
            return NOT_FOUND
        kind, *sides = rest
        if not all(side.isascii() and side.isdigit() and 0 < int(side[:9]) <= LONGEST for side in sides):
            return Response(f"width and height go from 1 to {LONGEST}\n".encode(), TEXT, 400)
        width, height = map(int, sides)
        if len(request.body) != width * height or kind not in ("ink", "picture"):
            return Response(b"a byte for each pixel is wanted, of the kind ink or picture\n", TEXT, 400)
        pixels = np.frombuffer(request.body, np.uint8).reshape(height, width)
        ink = pixels / 255 if kind == "ink" else ink_of_picture(pixels)
        return Response(json.dumps(self.read(ink)).encode(), "application/json")

    def read(self, ink: Array) -> dict[str, Any]:
        """Return what the network takes the ink (height, width), 0 for paper and 1 for ink, to be: its best classes,
        and the picture that it sees, upright, as a PNG; {"empty": True} where there is none."""
        found = prepared(ink, self._hand, self.network.shape[0])
        if found is None:
            return {"empty": True}
        rows = self._stored((found.T if self.transposed else found)[np.newaxis])
        with self._lock:  # the network's memory is used again by every call
            scores = self.network.answers.scores(self.network.outputs(rows))[0]
        best = np.argsort(-scores, kind="stable")[:SHOWN]
        seen = base64.b64encode(png(np.rint(found * 255).astype(np.uint8)[..., np.newaxis])).decode()
        ranked = [{"class": self.network.classes[i], "score": float(scores[i])} for i in best]
        return {"classes": ranked, "seen": f"data:image/png;base64,{seen}"}

    def page(self) -> str:
        """Return the page: one HTML text that refers to nothing else."""
        text = Path(__file__).with_name("draw.html").read_text(encoding="utf-8")
        script = text.partition("<script>")[2].partition("</script>")[0]
        digits = all(name.isdecimal() for name in self.network.classes)
        about = f"{Path(self.network.file).absolute().name}, trained on {self.network.trained_on.name}"
        filled = {
            "SCRIPT-SUM": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
            "PEN-WIDTH": f"{self._hand.pen:g}",
            "PERCENT": "yes" if self.network.answers.tells_probabilities else "",
            "CHARACTER": "digit" if digits else "letter",
            "ABOUT-RUN": escape(readable(about)),
        }
        for name, value in filled.items():
            text = text.replace(f"{{{name}}}", value)
        return text
