"""Count how often Pillow decodes the pixels of each photo."""

import hashlib
from collections import Counter

from PIL import ImageFile


def count_decodes(monkeypatch) -> Counter[str]:
    """Count decodes from now on, at any size, by the SHA-256 of the photo's bytes.

    These are the digests of `Prompt.digests`. Pictures that are not opened from bytes in memory do
    not count, since no photo of a prompt is opened from elsewhere.
    """
    counts: Counter[str] = Counter()
    load = ImageFile.ImageFile.load

    def counted(image, *given):
        content = getattr(image.fp, "getvalue", None)
        if image.tile and content is not None:  # not decoded yet
            counts[hashlib.sha256(content()).hexdigest()] += 1
        return load(image, *given)

    monkeypatch.setattr(ImageFile.ImageFile, "load", counted)
    return counts
