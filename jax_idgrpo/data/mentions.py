"""Find the people that an English prompt mentions, and describe them where they are mentioned first.

A mention is a singular noun of `NOUNS`. It is a new person

- after `a`, `an` or `another`, with up to four words between;
- otherwise, if the same noun has not occurred before: "the man" behind "a man" is the same man.

Neighbouring nouns, as in "a woman doctor", are one mention. Counts ("one person"), negations and
`every`, possessives ("the man's hat"), hyphenated words and views ("a first person view") are none.
The n-th new person is the one of the n-th photo. The words follow the mention:

    a man walks      with red hair      a man with red hair walks
    a man walks      red hair           a man (red hair) walks

A prompt with fewer mentions than photos, such as one with names, gets a sentence at its end, because
it is unknown who is mentioned: "The first person has red hair; the second person has a beard."
"""

import re
from collections.abc import Sequence

_NOUNS = (
    "actor actress adult artist athlete boy bride brother businessman businesswoman chef child dad "
    "dancer daughter doctor farmer father firefighter fisherman friend gentleman girl grandfather "
    "grandmother groom guy husband kid lady man mom mother musician nurse person policeman "
    "policewoman scientist singer sister soldier son student teacher teenager toddler waiter "
    "waitress wife woman worker"
)
NOUNS = frozenset(_NOUNS.split())
"""Nouns that mention a person."""
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")
"""Names of people by their photo; their number is the most photos of a row."""

_NEW = ("a", "an", "another")
_DEFINITE = ("the", "this", "that", "his", "her", "their", "its", "my", "your", "our")
_NOBODY = ("one", "no", "every", "each", "any", "either", "neither")
_VIEWS = ("view", "perspective", "shot", "pov")
_BETWEEN = 4  # words between the article and the noun
_WORD = re.compile(r"\w+(?:['\u2019-]\w+)*")
_WITH = "with "


def find_mentions(text: str) -> list[int]:
    """Return the position behind the first mention of every person, in order."""
    words = [(match.group().casefold(), match.span()) for match in _WORD.finditer(text)]
    found: list[int] = []
    seen: set[str] = set()
    for number, (word, (_, end)) in enumerate(words):
        if word not in NOUNS:
            continue
        following = words[number + 1] if number + 1 < len(words) else ("", (end, end))
        adjoins = text[end : following[1][0]].isspace()
        if adjoins and following[0] in NOUNS:
            seen.add(word)
            continue
        if adjoins and following[0] in _VIEWS:
            continue
        before = [name for name, _ in words[max(0, number - 1 - _BETWEEN) : number]]
        articles = (*_NEW, *_DEFINITE, *_NOBODY)
        article = next((name for name in reversed(before) if name in articles), "")
        if article in _NOBODY:
            continue
        if article in _NEW or word not in seen:
            found.append(end)
        seen.add(word)
    return found


def complete_prompt(text: str, words: Sequence[str]) -> str:
    """Describe every person of a prompt, as the module's docstring says.

    Args:
      text: the prompt.
      words: one description per photo, in one line; a phrase that begins with "with" reads best.
    """
    places = find_mentions(text)
    if len(places) < len(words):
        return _with_sentence(text, words)
    for place, described in reversed(list(zip(places, words))):
        features = _features(described)
        phrase = f"with {features}" if features else f"({described})"
        text = f"{text[:place]} {phrase}{text[place:]}"
    return text


def _features(described: str) -> str:
    """Return what follows the "with" at the beginning of a description; "" without one."""
    return described[len(_WITH) :] if described.casefold().startswith(_WITH) else ""


def _with_sentence(text: str, words: Sequence[str]) -> str:
    """Describe all people in a sentence at the end."""
    names = ["the person"] if len(words) == 1 else [f"the {name} person" for name in ORDINALS]
    parts = []
    for name, described in zip(names, words):
        features = _features(described)
        parts.append(f"{name} has {features}" if features else f"{name}: {described}")
    sentence = "; ".join(parts)
    text = text.rstrip()
    stop = "" if text.endswith((".", "!", "?", "…", "。")) else "."
    return f"{text}{stop} {sentence[0].upper()}{sentence[1:]}."


def keeps_words(before: str, after: str) -> bool:
    """Return whether every word of `before` is in `after`, in order."""
    rest = iter(re.findall(r"\w+", after))
    return all(word in rest for word in re.findall(r"\w+", before))
