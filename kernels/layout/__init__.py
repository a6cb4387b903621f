"""How the frames of a body are stored: found from its bytes and its metadata, never by decoding anything.

Upstream: bodies, live (scanners are fed as bytes arrive) or stored (finders ask for ranges). Downstream: ``kernels.reduction``
and ``kernels.passes``, which bring the stored chunks before the kernels. A result is a ``FrameGeometry`` (frames lie plainly
one behind the other), a ``FrameIndex`` (chunks anywhere, encoded), or ``NotFrames`` with a reason fit for the scientist.
Structure that only a C library can read is read in a sandbox.
"""
