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

from nettorrent_mpi.cli.characters import Characters
from nettorrent_mpi.cli.drawings import png
from nettorrent_mpi.cli.local_server import NOT_FOUND, TEXT, LocalServer, Request, Response
from nettorrent_mpi.data.handwriting import LONGEST, ink_of_picture
from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.engine.trained_network import TrainedNetwork, load
from nettorrent_mpi.plan.errors import readable

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
    """A Reader prepares drawings as the data set of a network did, and tells what the network takes them to be. `like`
    and what is raised are as for Characters."""

    def __init__(self, network: TrainedNetwork, like: str | None = None):
        self.network, self._characters, self._lock = network, Characters(network, like), Lock()
        self.like, self.transposed = self._characters.like, self._characters.transposed

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
        found = self._characters.prepared(ink)
        if found is None:
            return {"empty": True}
        rows = self._characters.row(found)[np.newaxis]
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
            "PEN-WIDTH": f"{self._characters.hand.pen:g}",
            "PERCENT": "yes" if self.network.answers.tells_probabilities else "",
            "CHARACTER": "digit" if digits else "letter",
            "ABOUT-RUN": escape(readable(about)),
        }
        for name, value in filled.items():
            text = text.replace(f"{{{name}}}", value)
        return text
