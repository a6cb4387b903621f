"""Takes the decoders through everything a locked-down child will need: libraries loaded, functions compiled."""

from __future__ import annotations

import zlib

import bitshuffle
import numpy as np

from kernels.decode.chunk import FRAMING_BYTES, Undecodable, decode
from kernels.decode.encoding import CODECS, Encoding, Filter


def warm_decoders() -> None:
    """Decode one small chunk with every codec. Raises RuntimeError where one does not give back what went in."""
    plain = np.arange(64, dtype="<u2")
    blocks = bitshuffle.compress_lz4(plain, 64).view(np.uint8)
    framing = plain.nbytes.to_bytes(8, "big") + plain.nbytes.to_bytes(4, "big")
    assert len(framing) == FRAMING_BYTES
    shuffled = plain.view(np.uint8).reshape(-1, 2).T.tobytes()
    whole = plain.tobytes()
    samples = {
        "bslz4": framing + blocks.tobytes(),
        "bitshuffle": bitshuffle.bitshuffle(plain, 64).tobytes(),
        "deflate": zlib.compress(whole),
        "shuffle": shuffled,
        "fletcher32": whole + bytes(4),
        "lz4": framing + plain.nbytes.to_bytes(4, "big") + whole,
        "packbits": bytes([127]) + whole,
    }
    for codec, stored in samples.items():
        encoding = Encoding("<u2", (1, 64), (Filter(codec, 2, 64),))
        data = np.frombuffer(stored, np.uint8)
        if decode(data, encoding, 0).tobytes() != whole:
            raise RuntimeError(f"the {codec} decoder does not work here")
    for codec in CODECS:
        try:
            decode(np.frombuffer(b"\xff" * 20, np.uint8), Encoding("<u2", (1, 64), (Filter(codec, 2, 64),)), 0)
        except Undecodable:
            continue
