"""A small Unigram model of SentencePiece 0.2.3, and the ids that it gives texts."""

import base64

MODEL = base64.b64decode(
    "Cg4KBTxwYWQ+FQAAAAAYAwoNCgQ8L3M+FQAAAAAYAwoOCgU8dW5rPhUAAAAAGAIKFQoMPGV4dHJhX2lkXzA+FQAA"
    "AAAYBAoNCgbiloF0aGUVm3dHwAoNCgbiloFkb2cVjL1IwAoRCgriloFaw7xyaWNoFeruSMAKEAoJ4paBcGVyc29u"
    "FQWNScAKEAoJ4paBbmHDr3ZlFRDsScAKDwoI4paBd2hpbGUVSRxKwAoPCgjiloF3b3JsZBW/fErAChAKCeKWgeWM"
    "l+S6rBVtqUrACgsKBOKWgWEVcddKwAoPCgjiloFoZWxsbxUwDkvACg8KCOKWgWFsb25nFWIxS8AKDwoI4paBYmVh"
    "Y2gVtF9LwAoQCgniloFwZW9wbGUV/fNLwAoSCgviloFpZGVudGl0eRWc9EvACg0KBuKWgW1hbhVA9kvACg0KBuKW"
    "gXJlZBW8EkzAChEKCuKWgXRhbGtpbmcVtldMwAoPCgjiloF3b21hbhULmkzAChAKCeKWgeadseS6rBU46UzACg4K"
    "B+KWgXdhbGsVhi9NwAoPCgjiloFzaGlydBXRL03ACg0KBuKWgXR3bxWfPU7ACggKAXUVa7dQwAoJCgLDqRUOuVDA"
    "CggKAWYVsbpQwAoKCgPmnbEVVbxQwAoICgF5Ffi9UMAKCAoBYhWcv1DACgoKA+WMlxU/wVDACgkKAsOvFePCUMAK"
    "CAoBdhWGxFDACgkKAsO8FSnGUMAKCAoBWhXNx1DACggKAWsVcMlQwAoICgFtFRTLUMAKCgoD5LqsFbfMUMAKCAoB"
    "cxVbzlDACggKAWMV/s9QwAoICgFwFaHRUMAKCAoBZxVF01DACggKAWQV6NRQwAoICgF3FYzWUMAKCAoBdBUv2FDA"
    "CggKAXIV09lQwAoICgFpFXbbUMAKCAoBaBUZ3VDACggKAW4Vvd5QwAoICgFsFWDgUMAKCAoBbxUE4lDACggKAWEV"
    "p+NQwAoICgFlFUvlUMAKCgoD4paBFe7mUMASLRgBIDhVAACAP/oBDDxleHRyYV9pZF8wPsACAsgC////////////"
    "AdACAdgCABoMCghpZGVudGl0eRIA"
)

# text -> ids of `SentencePieceProcessor.encode`, and the end of the sequence
IDS = {
    "the two people walk along the beach": [4, 25, 16, 23, 14, 4, 15, 1],
    "  Hello   world ": [55, 2, 54, 51, 51, 52, 10, 1],
    "Zürich café 東京 dog!": [6, 55, 41, 53, 28, 27, 22, 5, 2, 1],
    "\ufb01 \uff21\uff22\uff23 a\u0301 identity": [55, 2, 55, 2, 12, 2, 17, 1],
    "unknown qqq ☃ persons": [55, 26, 50, 37, 50, 52, 45, 50, 55, 2, 55, 2, 7, 40, 1],
    "": [1],
}
