"""Serve the configured reward over HTTP, for `reward.backend http://...` and for other trainers.

    /score        our format (see `exchange`), videos with their photos; GET names the frames to send
    /verl-omni    the format of verl-omni's HTTP scorer
    /flow-grpo    the format of flow_grpo's remote scorers with prompts, such as UnifiedReward's

The formats of other trainers are pickles, which are read without executing anything (`pickles`).
They carry single pictures and no photos: a picture is scored as a video of one frame, and the photos
are those of the same prompt in a CSV.

Videos are scored one at a time, so a score depends on no other video, and there is one program per
size of videos. Photos are stored in a temporary folder, each once. There is no access control.
"""

import dataclasses
import functools
import hashlib
import pickle
import signal
import tempfile
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_idgrpo.config import Config
from jax_idgrpo.data.photos import load_reference
from jax_idgrpo.data.prompts import load_prompts
from jax_idgrpo.data.video import from_uint8
from jax_idgrpo.errors import UserError
from jax_idgrpo.local_server import address_of, leave, listen, require_packages
from jax_idgrpo.rewards import exchange, pickles
from jax_idgrpo.rewards.base import Photo, References, check_references
from jax_idgrpo.rewards.exchange import Refused, Video
from jax_idgrpo.rewards.factory import make_reward
from jax_idgrpo.rewards.host import collect

MAX_BODY = 2**30  # bytes of a request
MAX_REQUESTS = 32  # under way at once; further ones get status 503
MAX_PICTURES = 1024  # of a request in the formats of other trainers
PICKLED = {"verl-omni": "scores", "flow-grpo": "outputs"}
"""Path of another trainer's format -> name of the list of scores in its replies."""


@dataclasses.dataclass(frozen=True)
class Sent:
    """A photo of a request, stored under the hash of its bytes.

    Attributes:
      path: the file.
    """

    path: Path

    def read_bytes(self) -> bytes:
        """Read all bytes."""
        return self.path.read_bytes()

    def __str__(self) -> str:
        return "of the request"


@dataclasses.dataclass(frozen=True)
class Received:
    """A picture of a request, in memory.

    Attributes:
      content: bytes of the file.
      number: number of the picture in the request.
    """

    content: bytes
    number: int

    def read_bytes(self) -> bytes:
        """Return all bytes."""
        return self.content

    def __str__(self) -> str:
        return f"{self.number} of the request"


class Service:
    """Score the videos of requests with the reward of a configuration, one at a time."""

    def __init__(self, config: Config, folder: Path, prompts: Path | None = None):
        """Load the reward, and check the photos of the CSV.

        Args:
          config: the configuration.
          folder: an empty folder, for the photos of requests.
          prompts: CSV with the photos of prompts that are sent without photos.

        Raises:
          UserError: the reward cannot be made, or a photo of the CSV cannot be used.
        """
        self._people, self._folder = config.data.max_people, folder
        self._without_photos = bool(config.reward.custom) or config.reward.served
        self._reward = make_reward(config)
        self._one_at_a_time = threading.Lock()
        self._listed: dict[str, tuple[Photo, ...]] = {}
        if prompts is not None:
            listed = load_prompts(prompts, self._people)
            check_references(self._reward, listed)
            for prompt, row in zip(listed, References.of_prompts(listed, self._people).photos):
                self._listed.setdefault(prompt.text, row)

    def frames(self, total: int) -> bytes:
        """Answer which frames of a video of `total` frames the reward depends on."""
        if self._reward.motion_of_all_frames:
            return exchange.encode_frames(None)
        return exchange.encode_frames(self._reward.frames_read(total))

    def answer(self, body: bytes) -> bytes:
        """Answer a request in our format.

        Raises:
          Refused: the request is not in the format, or a photo cannot be used.
        """
        request = exchange.decode_request(body)
        references = [
            self._stored(photos) or self._of_prompt(text)
            for photos, text in zip(request.references, request.prompts, strict=True)
        ]
        return exchange.encode_reply(self.score(request.videos, request.prompts, references))

    def answer_pickle(self, body: bytes, name: str) -> bytes:
        """Answer a request in the format of another trainer by a pickle.

        Args:
          body: a pickled dict of images and prompts.
          name: name of the list of scores in the reply.

        Raises:
          Refused: the request is not in the format, a prompt has no photos, or a picture cannot be
            scored.
        """
        request = pickles.read(body)
        if "prompts" not in request:
            raise Refused("the request has no prompts; use a scorer of the client that sends them")
        texts, images = pickles.texts(request["prompts"]), request.get("images")
        if not isinstance(images, list) or not all(type(image) is bytes for image in images):
            raise Refused("the request has no list of encoded images")
        if len(images) != len(texts) or len(images) > MAX_PICTURES:
            raise Refused(
                f"the request has {len(images)} images and {len(texts)} prompts; send one each, "
                f"up to {MAX_PICTURES}"
            )
        videos = exchange.within_limits(
            _picture(image, number) for number, image in enumerate(images)
        )
        references = [self._of_prompt(text) for text in texts]
        scores = self.score(videos, texts, references).get("reward", [])
        if not np.isfinite(scores).all():
            raise Refused("an image could not be scored; see the output of the server")
        return pickle.dumps({name: scores}, protocol=4)

    def score(
        self,
        videos: Sequence[Video],
        prompts: Sequence[str],
        references: Sequence[tuple[Photo, ...]],
    ) -> dict[str, list[float]]:
        """Score videos; a video that fails has NaN as its reward.

        Args:
          videos: values in [-1, 1].
          prompts: a text per video.
          references: the photos of each prompt.

        Raises:
          Refused: a photo or the size of a video cannot be used.
        """
        rows = []
        for video, text, photos in zip(videos, prompts, references, strict=True):
            with self._one_at_a_time:
                try:
                    encoded = self._reward.encode_references(
                        References((photos,), self._people), [text], video.shape[:3]
                    )
                    placed = jax.tree.map(jnp.asarray, encoded)
                    terms = collect(self._reward.score(jnp.asarray(video)[None], placed))
                except UserError as error:
                    raise Refused(exchange.one_line(str(error), 400)) from None
            rows.append({name: float(value[0]) for name, value in terms.items()})
        names = dict.fromkeys(["reward", *(name for row in rows for name in row)])
        return {name: [row.get(name, np.nan) for row in rows] for name in names}

    def _stored(self, photos: Sequence[bytes]) -> tuple[Photo, ...]:
        """Store photos by their content, so that each is encoded once."""
        if len(photos) > self._people:
            raise Refused(
                f"a video has {len(photos)} photos; data.max_people of the server is {self._people}"
            )
        found = []
        for number, content in enumerate(photos, 1):
            path = self._folder / hashlib.sha256(content).hexdigest()
            if not path.exists():
                aside = path.with_name(f"{path.name}.{threading.get_ident()}")
                aside.write_bytes(content)
                aside.replace(path)
            found.append(Photo(Sent(path), f"photo {number}"))
        return tuple(found)

    def _of_prompt(self, text: str) -> tuple[Photo, ...]:
        """Return the photos of a prompt that came without photos."""
        if text not in self._listed and not self._without_photos:
            raise Refused(
                f"the prompt {exchange.one_line(text, 60)!r} comes without photos; start the "
                "server with --prompts CSV, which lists it"
            )
        return self._listed.get(text, ())


def _picture(content: bytes, number: int) -> Video:
    """Decode a picture as a video of one frame."""
    try:
        pixels = np.asarray(load_reference(Received(content, number)))
    except UserError as error:
        raise Refused(exchange.one_line(str(error))) from None
    exchange.check_size((1, *pixels.shape), f"{number} of the request")
    return from_uint8(pixels)[None]


# ---- HTTP ----------------------------------------------------------------------------------------


def make_app(service: Service) -> Any:
    """Make the ASGI application of a service.

    Raises:
      UserError: Starlette or uvicorn is not installed.
    """
    require_packages("serve-reward")
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route

    async def body_of(request: Request) -> bytes | None:
        """Read the body; None if it is too large."""
        announced = request.headers.get("content-length", "0")
        if announced.isdecimal() and int(announced) > MAX_BODY:
            return None
        parts, size = [], 0
        async for part in request.stream():
            parts.append(part)
            size += len(part)
            if size > MAX_BODY:
                return None
        return b"".join(parts)

    async def reply(
        request: Request, answer: Callable[[bytes], bytes], kind: str, failed: Callable
    ) -> Response:
        try:
            body = await body_of(request)
        except ClientDisconnect:
            return Response(status_code=400)  # nobody reads it
        if body is None:
            reason, status = f"the request has more than {MAX_BODY} bytes", 413
        else:
            try:
                found = await run_in_threadpool(answer, body)
                return Response(found, media_type=kind)
            except Refused as error:
                reason, status = str(error), 400
            except Exception as error:  # whatever a reward raises; the server goes on
                traceback.print_exc()
                reason, status = exchange.one_line(f"{type(error).__name__}: {error}"), 500
        return Response(failed({"error": reason}), status_code=status, media_type=kind)

    async def score(request: Request) -> Response:
        return await reply(
            request,
            service.answer,
            "application/json",
            lambda value: JSONResponse(value).body,
        )

    async def frames(request: Request) -> Response:
        total = request.query_params.get("frames", "")
        if not (total.isdecimal() and len(total) < 9 and 1 <= int(total) <= exchange.MAX_FRAMES):
            return JSONResponse({"error": "post videos here, or pass frames=F"}, status_code=400)
        try:
            return Response(service.frames(int(total)), media_type="application/json")
        except UserError as error:
            return JSONResponse({"error": exchange.one_line(str(error))}, status_code=400)

    def pickled(name: str) -> Callable:
        async def endpoint(request: Request) -> Response:
            answer = functools.partial(service.answer_pickle, name=name)
            return await reply(request, answer, "application/octet-stream", _pickled_error)

        return endpoint

    return Starlette(
        routes=[
            Route("/score", score, methods=["POST"]),
            Route("/score", frames, methods=["GET"]),
            *(Route(f"/{path}", pickled(name), methods=["POST"]) for path, name in PICKLED.items()),
        ]
    )


def _pickled_error(value: Mapping[str, str]) -> bytes:
    return pickle.dumps(dict(value), protocol=4)


def serve(config: Config, host: str, port: int, prompts: Path | None = None) -> None:
    """Serve the reward of a configuration until the process is stopped.

    Args:
      config: the configuration.
      host: address to listen on.
      port: port to listen on; 0 takes a free one, which is printed.
      prompts: CSV with the photos of prompts that are sent without photos.

    Raises:
      UserError: a package is missing, the address cannot be used, or the reward cannot be made.
    """
    require_packages("serve-reward")
    import uvicorn

    signal.signal(signal.SIGTERM, leave)
    with listen(host, port) as opened, tempfile.TemporaryDirectory(prefix="idgrpo-") as folder:
        app = make_app(Service(config, Path(folder), prompts))
        server = uvicorn.Server(
            uvicorn.Config(
                app,
                log_level="warning",
                access_log=False,
                lifespan="off",
                limit_concurrency=MAX_REQUESTS,
            )
        )
        print(f"serving the reward at {address_of(opened)}/score", flush=True)
        server.run(sockets=[opened])
