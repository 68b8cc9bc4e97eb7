"""Score videos by a server, which `reward.backend http://HOST:PORT/PATH` names.

Each video is posted in a request of its own, with its prompt and photos, in the format of
`exchange`. `idgrpo serve-reward` is such a server. A few requests are under way at once, beside the
accelerator. In a run of several processes each process posts its own videos.

Failures are treated as follows:

    no connection, no answer in `reward.http_timeout` seconds,    repeated `reward.http_retries`
    a broken answer, status 408, 429 or 500 and above             times after 0.5, 1, 2, ... seconds
    another status, a redirect, a reply that is no reward         not repeated

A video without a reward costs only itself: its reward is NaN, it is excluded from the update, and
one line gives the reason. No redirect is followed, and no proxy is used.
"""

import contextlib
import functools
import http.client
import math
import socket
import time
from collections.abc import Sequence
from urllib.parse import urlsplit

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int

from jax_idgrpo.errors import UserError
from jax_idgrpo.rewards import exchange
from jax_idgrpo.rewards.base import NumberedRows, References
from jax_idgrpo.rewards.host import HostPool, Pending, in_time

MAX_REPLY = 2**20  # bytes
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0  # seconds
REQUESTS = 4  # requests under way at once
_REPEATED = (408, 429)  # statuses below 500 that another attempt may change


class NoScore(Exception):
    """A request that gave no reward, as one line."""


class _Repeatable(Exception):
    """A failure that another attempt may not have."""


class HttpReward:
    """Compute the reward by requests to a server.

    Attributes:
      reported: names of the terms that the server has returned so far, without the reward.
    """

    term_names = ("reward",)
    motion_of_all_frames = False

    def __init__(
        self,
        address: str,
        video: tuple[int, int, int],
        timeout: float = 120.0,
        retries: int = 3,
    ):
        """Connect to the server once, to report an unreachable one before any expensive work.

        Args:
          address: "http://HOST:PORT/PATH", or the same with https.
          video: frames, height and width of the videos of the run.
          timeout: seconds after which a request is abandoned.
          retries: number of further attempts.

        Raises:
          UserError: the server cannot be reached.
        """
        self._address, self._timeout, self._retries = address, timeout, retries
        self._video = video
        self._where = urlsplit(address)
        self.reported: tuple[str, ...] = ()
        self._rows = NumberedRows()
        self._pool = HostPool(workers=REQUESTS)
        self._numbers: dict[int, np.ndarray | None] = {}
        try:
            self._ask_frames(video[0])
        except NoScore as error:
            raise UserError(
                f"reward.backend {address}: {error}; start the server, or correct the address"
            ) from None

    def check(self, references: References, prompts: Sequence[str]) -> None:
        """Post a blank video of the run's size for the first prompt.

        Args:
          references: the photos of the prompts.
          prompts: the texts of the prompts.

        Raises:
          UserError: the server refuses the request or its reply is not in the format.
        """
        encoded = self.encode_references(references, prompts)
        blank = np.zeros((*self._video, 3), np.float32)
        chosen = self.frames_read(len(blank))
        try:
            self._terms(blank if chosen is None else blank[chosen], encoded[0])
        except NoScore as error:
            raise UserError(
                f"reward.backend {self._address}: {error}; see docs/reward.md for the format, or "
                "use another server"
            ) from None

    def encode_references(
        self,
        references: References,
        prompts: Sequence[str],
        video: tuple[int, int, int] | None = None,
    ) -> Int[np.ndarray, " P"]:
        """Return numbers under which texts and photos are stored; no photo is opened.

        Args:
          references: the photos of the prompts.
          prompts: the texts of the prompts.
          video: unused.
        """
        return self._rows.add(references, prompts)

    def frames_read(self, total: int) -> np.ndarray | None:
        """Return the indices of the frames that the server asks for; None for all frames.

        A server that announces no frames, or does not answer, gets all of them.
        """
        try:
            return self._ask_frames(total)
        except NoScore:
            return None  # the requests to come fail by themselves, each with its line

    def _ask_frames(self, total: int) -> np.ndarray | None:
        if total not in self._numbers:
            status, body = self._ask("GET", f"?frames={total}", b"")
            self._numbers[total] = exchange.decode_frames(body, total) if status == 200 else None
        return self._numbers[total]

    def score(
        self, videos: Float[ArrayLike, "B F H W 3"], encoded: Int[ArrayLike, " B"]
    ) -> Pending:
        """Post the videos without waiting for their rewards."""
        total = jnp.shape(videos)[1]
        chosen = self.frames_read(total)
        numbers = range(total) if chosen is None else chosen.tolist()
        return self._pool.submit(
            self._score, (_frames(tuple(numbers), videos), encoded), "reward.backend"
        )

    def _score(self, video: Float[np.ndarray, "F H W 3"], number: np.integer) -> dict[str, float]:
        terms = self._terms(video, number)
        if not math.isfinite(terms["reward"]):
            raise NoScore("the server gives no number as the reward")
        names = (name for name in terms if name != "reward")
        self.reported = tuple(dict.fromkeys([*self.reported, *names]))
        return terms

    def _terms(self, video: Float[np.ndarray, "F H W 3"], number: np.integer) -> dict[str, float]:
        """Return the terms of a video; the reward may be NaN.

        Raises:
          NoScore: the server cannot be reached, refuses the request, or gives no usable reply.
        """
        row = self._rows[number]
        photos = [photo.content() for photo in row.photos]
        status, body = self._ask("POST", "", exchange.encode_request([video], [row.text], [photos]))
        if status != 200:
            raise NoScore(f"status {status}: {exchange.error_of(body)}")
        try:
            found = exchange.decode_reply(body, 1)
        except exchange.Refused as error:
            raise NoScore(str(error)) from None
        return {name: values[0] for name, values in found.items()}

    def _ask(self, method: str, query: str, body: bytes) -> tuple[int, bytes]:
        """Send a request, repeatedly if necessary, and return status and body of the reply."""
        reason = ""
        for attempt in range(self._retries + 1):
            if attempt:
                time.sleep(min(FIRST_PAUSE * 2 ** (attempt - 1), LONGEST_PAUSE))
            try:
                return self._ask_once(method, query, body)
            except _Repeatable as error:
                reason = str(error)
        attempts = f"after {self._retries + 1} attempts" if self._retries else "after one attempt"
        raise NoScore(f"{reason} {attempts}")

    def _ask_once(self, method: str, query: str, body: bytes) -> tuple[int, bytes]:
        secure = self._where.scheme == "https"
        kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        connection = kind(self._where.hostname or "", self._where.port, timeout=self._timeout)
        target = f"{self._where.path or '/'}{query}"
        try:
            status, found = in_time(
                lambda: _exchange(connection, method, target, body), self._timeout, "reward.backend"
            )
        except TimeoutError:
            raise _Repeatable(f"no answer in {self._timeout:g} seconds") from None
        except (OSError, http.client.HTTPException, OverflowError) as error:
            reason = exchange.one_line(str(error) or type(error).__name__, 100)
            raise _Repeatable(f"the connection failed ({reason})") from None
        finally:
            _end(connection)
        if status >= 500 or status in _REPEATED:
            raise _Repeatable(f"status {status}: {exchange.error_of(found)}")
        if 300 <= status < 400:
            raise NoScore(f"status {status}: redirects elsewhere; name the final address")
        if len(found) > MAX_REPLY:
            raise NoScore(f"the reply has more than {MAX_REPLY} bytes")
        return status, found


def _exchange(
    connection: http.client.HTTPConnection, method: str, target: str, body: bytes
) -> tuple[int, bytes]:
    """Send a request, and read the reply up to one byte more than is accepted."""
    headers = {"Content-Type": "application/json"} if body else {}
    try:
        connection.request(method, target, body or None, headers)
    except (BrokenPipeError, ConnectionResetError):
        if connection.sock is None:
            raise
        # A server that refuses a large body answers before it has read it.
    with connection.getresponse() as reply:
        found = reply.read(MAX_REPLY + 1)
        if len(found) <= MAX_REPLY and reply.length:  # `read` returns what there is, without error
            raise http.client.IncompleteRead(found, reply.length)
        return reply.status, found


def _end(connection: http.client.HTTPConnection) -> None:
    """Close a connection, which also ends a call that waits for it in another thread."""
    if connection.sock is not None:
        with contextlib.suppress(OSError):  # it is not connected any more
            connection.sock.shutdown(socket.SHUT_RDWR)
    connection.close()


@functools.partial(jax.jit, static_argnums=0)
def _frames(
    numbers: tuple[int, ...], videos: Float[Array, "B F H W 3"]
) -> Float[Array, "B t H W 3"]:
    """Return the chosen frames as float32, so that only these are copied from the device."""
    chosen = videos if len(numbers) == videos.shape[1] else videos[:, np.asarray(numbers)]
    return chosen.astype(jnp.float32)
