"""Serve the page on which people label pairs of videos.

All addresses begin with a random token, so other users of the machine and other web pages can
neither see the videos nor label them. Files are named by pair and side, never by path.

    /TOKEN/                       the page
    /TOKEN/next?annotator=NAME    the next question, and the one after it for preloading
    /TOKEN/label                  POST {annotator, unit, labels, seconds}; no labels skip the pair
    /TOKEN/undo                   POST {annotator}: take back the last answer
    /TOKEN/summary                progress, agreement, accuracy on gold pairs
    /TOKEN/pairs.csv              the labelled pairs
    /TOKEN/media/PAIR/NAME        video A or B, or photo 0, 1, ...

Browsers play few kinds of video. Others are converted to 8-bit H.264 when they are first shown.
"""

import contextlib
import importlib.resources
import json
import math
import secrets
import signal
import tempfile
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import av

from jax_idgrpo.data.video import Clip, preview
from jax_idgrpo.errors import UserError
from jax_idgrpo.local_server import address_of, leave, listen, require_packages
from jax_idgrpo.preferences.csv_source import check_dimensions
from jax_idgrpo.preferences.label_items import Item, Order, load_items, ordered
from jax_idgrpo.preferences.labels import Answer, Desk, Refused, Unit
from jax_idgrpo.workdir import prepare_workdir

if TYPE_CHECKING:
    from starlette.applications import Starlette

PAGE = {
    "": ("label_page.html", "text/html"),
    "label_page.js": ("label_page.js", "text/javascript"),
    "label_page.css": ("label_page.css", "text/css"),
}
"""Address -> file of this package, and its type."""
MAX_BODY = 2**16  # bytes of a request
MAX_NAME = 64  # letters of an annotator's name
MAX_SIDE = 1280  # pixels of a converted video
PLAYABLE = ("h264", "vp8", "vp9", "av1")  # codecs that browsers play, with 8-bit 4:2:0 pixels
HEADERS = {
    "content-security-policy": "default-src 'self'; frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


class Media:
    """Find the files of pairs, and convert videos that browsers do not play."""

    def __init__(self, items: Sequence[Item], folder: Path):
        """Index the files.

        Args:
          items: all pairs.
          folder: folder of converted videos.
        """
        self._items = {item.id: item for item in items}
        self._folder, self._converting = folder, threading.Lock()

    def file(self, pair: str, name: str) -> Path | None:
        """Return a file that browsers show; None if there is no such file.

        Args:
          pair: id of the pair.
          name: "A", "B", or the number of a photo.

        Raises:
          UserError: the video cannot be read.
        """
        item = self._items.get(pair)
        if item is None:
            return None
        if name in ("A", "B"):
            return self._playable(Path(str(item.row.videos["AB".index(name)])), f"{pair}-{name}")
        photos = item.row.references
        if name.isdecimal() and len(name) < 4 and int(name) < len(photos):
            return Path(str(photos[int(name)]))
        return None

    def _playable(self, video: Path, name: str) -> Path:
        if _is_playable(video):
            return video
        out = self._folder / f"{name}.mp4"
        with self._converting:
            if not out.exists():
                clip = Clip.open(video)
                aside = out.with_name(f".{out.name}")
                size = clip.height, clip.width
                with preview(aside, size, clip.rate or 8, MAX_SIDE) as add:
                    for frame in clip.frames():
                        add(frame)
                aside.replace(out)
        return out


def _is_playable(video: Path) -> bool:
    """Return whether every browser plays a video."""
    try:
        with av.open(str(video)) as container:
            context = container.streams.video[0].codec_context
            known = video.suffix.lower() in (".mp4", ".webm", ".m4v")
            return known and context.name in PLAYABLE and context.pix_fmt == "yuv420p"
    except (OSError, IndexError, av.FFmpegError):
        return False  # the conversion reports what is wrong


def _shown(desk: Desk, unit: Unit, annotator: str) -> dict[str, object]:
    """Describe a question for the page."""
    return {
        "unit": unit.id,
        "pair": unit.item.id,
        "prompt": unit.item.row.prompt,
        "photos": len(unit.item.row.references),
        "dimensions": unit.dimensions,
        "exchanged": desk.exchanged(annotator, unit.item),
    }


def question(desk: Desk, annotator: str) -> dict[str, object]:
    """Return the next question of an annotator, the one after it, and the progress.

    Args:
      desk: hands out the pairs.
      annotator: name of the annotator.
    """
    units = desk.next(annotator, 2)
    done, total = desk.progress(annotator)
    shown = [_shown(desk, unit, annotator) for unit in units] + [None, None]
    return {"now": shown[0], "after": shown[1], "done": done, "total": total}


def _annotator(value: object) -> str:
    """Return the name of an annotator.

    Raises:
      Refused: it is no name.
    """
    name = value.strip() if isinstance(value, str) else ""
    if not name or len(name) > MAX_NAME or not name.isprintable():
        raise Refused(f"enter a name of 1 to {MAX_NAME} letters")
    return name


def read_answer(value: Mapping[str, object]) -> Answer:
    """Read the answer that the page sends.

    Raises:
      Refused: it is not in the format.
    """
    labels, seconds = value.get("labels"), value.get("seconds", 0.0)
    if not isinstance(labels, dict) or not all(isinstance(text, str) for text in labels.values()):
        raise Refused("labels maps dimensions to A, B or same")
    if isinstance(seconds, bool) or not isinstance(seconds, int | float):
        seconds = 0.0
    seconds = float(seconds) if math.isfinite(seconds) else 0.0
    return Answer(_annotator(value.get("annotator")), str(value.get("unit")), labels, seconds)


def make_app(desk: Desk, media: Media, token: str, out: Path) -> "Starlette":
    """Make the ASGI application.

    Args:
      desk: hands out the pairs and stores the labels.
      media: finds videos and photos.
      token: first part of every address.
      out: CSV of the labelled pairs.
    """
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.middleware import Middleware
    from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
    from starlette.requests import Request
    from starlette.responses import FileResponse, JSONResponse, Response
    from starlette.routing import Mount, Route

    async def guard(request: Request, call_next: RequestResponseEndpoint) -> Response:
        given = request.url.path.split("/")[1]
        if not secrets.compare_digest(given.encode(), token.encode()):
            return Response("not found", status_code=404)
        reply = await call_next(request)
        reply.headers.update(HEADERS)
        return reply

    async def received(request: Request) -> dict[str, object]:
        body = b""
        async for part in request.stream():
            body += part
            if len(body) > MAX_BODY:
                raise Refused(f"the request has more than {MAX_BODY} bytes")
        try:
            value = json.loads(body)
        except ValueError:
            raise Refused("the request is no JSON") from None
        if not isinstance(value, dict):
            raise Refused("the request is no JSON object")
        return value

    def refused(error: Refused) -> Response:
        return JSONResponse({"error": str(error)}, status_code=400)

    def static(name: str, kind: str) -> Callable[[Request], Awaitable[Response]]:
        text = importlib.resources.files(__package__).joinpath(name).read_text("utf-8")

        async def page(request: Request) -> Response:
            return Response(text, media_type=kind)

        return page

    async def following(request: Request) -> Response:
        try:
            annotator = _annotator(request.query_params.get("annotator"))
        except Refused as error:
            return refused(error)
        return JSONResponse(await run_in_threadpool(question, desk, annotator))

    async def label(request: Request) -> Response:
        try:
            answer = read_answer(await received(request))
            await run_in_threadpool(desk.answer, answer)
        except Refused as error:
            return refused(error)
        return JSONResponse(await run_in_threadpool(question, desk, answer.annotator))

    async def undo(request: Request) -> Response:
        try:
            annotator = _annotator((await received(request)).get("annotator"))
        except Refused as error:
            return refused(error)
        unit = await run_in_threadpool(desk.undo, annotator)
        found = await run_in_threadpool(question, desk, annotator)
        if unit is not None:
            found |= {"now": _shown(desk, unit, annotator)}
        return JSONResponse(found)

    async def summary(request: Request) -> Response:
        return JSONResponse(await run_in_threadpool(desk.summary))

    async def pairs(request: Request) -> Response:
        await run_in_threadpool(desk.export, out)
        return FileResponse(out, media_type="text/csv", filename="pairs.csv")

    async def medium(request: Request) -> Response:
        pair, name = (request.path_params[key] for key in ("pair", "name"))
        try:
            file = await run_in_threadpool(media.file, pair, name)
        except UserError as error:
            return JSONResponse({"error": str(error)}, status_code=422)
        if file is None:
            return Response("not found", status_code=404)
        return FileResponse(file, headers={"cache-control": "private, max-age=3600"})

    routes = [
        *(Route(f"/{name}", static(*content)) for name, content in PAGE.items()),
        Route("/next", following),
        Route("/label", label, methods=["POST"]),
        Route("/undo", undo, methods=["POST"]),
        Route("/summary", summary),
        Route("/pairs.csv", pairs),
        Route("/media/{pair}/{name}", medium),
    ]
    return Starlette(
        routes=[Mount(f"/{token}", routes=routes)],
        middleware=[Middleware(BaseHTTPMiddleware, dispatch=guard)],
    )


def serve_labels(desk: Desk, folder: Path, host: str, port: int, token: str | None = None) -> None:
    """Serve the page until the process is stopped, then write `pairs.csv`.

    Args:
      desk: hands out the pairs and stores the labels.
      folder: existing folder of `pairs.csv`.
      host: address to listen on.
      port: port to listen on; 0 takes a free one.
      token: first part of every address; None draws a random one.

    Raises:
      UserError: a package is missing, or the address cannot be used.
    """
    require_packages("idgrpo annotate --page")
    import uvicorn

    token, out = token or secrets.token_urlsafe(16), folder / "pairs.csv"
    signal.signal(signal.SIGTERM, leave)
    with (
        listen(host, port) as opened,
        tempfile.TemporaryDirectory(prefix="idgrpo-") as converted,
        contextlib.closing(desk),
    ):
        media = Media([*desk.items, *desk.gold], Path(converted))
        server = uvicorn.Server(
            uvicorn.Config(
                make_app(desk, media, token, out),
                log_level="warning",
                access_log=False,
                lifespan="off",
            )
        )
        print(f"label the pairs at {address_of(opened)}/{token}/ (Ctrl-C ends)", flush=True)
        try:
            server.run(sockets=[opened])
        finally:
            print(f"{desk.export(out)} labelled pairs in {out}", flush=True)


def label_pairs(
    pairs: Path,
    folder: Path,
    dimensions: Sequence[str],
    gold: Path | None,
    order: Order,
    overlap: float,
    one_at_a_time: bool,
    host: str,
    port: int,
) -> None:
    """Read pairs, and serve the page on which people label them.

    Args:
      pairs: CSV of pairs, with or without labels.
      folder: folder of the labels; an existing one is continued.
      dimensions: dimensions to label.
      gold: CSV of pairs with known answers; None for none.
      order: see `labels.ordered`.
      overlap: see `labels.Desk`.
      one_at_a_time: see `labels.Desk`.
      host: address to listen on.
      port: port to listen on.

    Raises:
      UserError: a file, option or address cannot be used.
    """
    require_packages("idgrpo annotate --page")
    if not 0 <= overlap <= 1:
        raise UserError(f"--overlap is {overlap}; use 0 to 1")
    check_dimensions(dimensions)
    items = ordered(load_items(pairs, dimensions), order)
    known = load_items(gold, dimensions, gold=True) if gold else []
    prepare_workdir(folder)
    desk = Desk(items, known, dimensions, folder, overlap, one_at_a_time)
    serve_labels(desk, folder, host, port)
