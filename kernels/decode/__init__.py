"""From stored bytes to frames: what runs inside the sandbox, and the tables by which the gateway tells it where to look.

Upstream: ``kernels.layout``, which finds out how the frames of a body are stored. Downstream: ``kernels.session``, which
drives the kernel over the decoded frames. Nothing here opens a file or allocates more than a declared and capped size.
"""
