"""Keep what a run encodes once on the host, within bounded memory."""

from collections.abc import Hashable

import jax
from jaxtyping import PyTree

from jax_idgrpo.parallel.hosts import memory_share

ROOM = 4 * 2**30  # bytes per machine that a run may fill with encoded prompts
PHOTO_ROOM = 2 * 2**30  # the same, with encoded photos; one of 480 x 832 pixels takes 400 kB


class BoundedCache(dict[Hashable, PyTree]):
    """A cache on the host that takes bounded memory.

    Attributes:
      room: bytes left; entries that do not fit are not stored.
      full: whether an entry did not fit.
    """

    def __init__(self, room: int):
        super().__init__()
        self.room, self.full = room, False

    def keep(self, name: Hashable, made: PyTree) -> None:
        """Store a pytree of numpy arrays under a name, if it fits."""
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(made))
        if size <= self.room:
            self.room -= size
            self[name] = made
        else:
            self.full = True


class Cache(BoundedCache):
    """Encoded prompts of a run, on the host, apart from their photos.

    Attributes:
      photos: latents of the photos. A photo is decoded again whenever it is needed if its latents
        did not fit.
    """

    def __init__(self, room: int | None = None, photo_room: int | None = None):
        """Start empty.

        Args:
          room: bytes for prompts; by default this process's share of `ROOM`.
          photo_room: bytes for photos; by default this process's share of `PHOTO_ROOM`.
        """
        super().__init__(memory_share(ROOM) if room is None else room)
        self.photos = BoundedCache(memory_share(PHOTO_ROOM) if photo_room is None else photo_room)
