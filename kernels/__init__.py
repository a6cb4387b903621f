"""Scientists' kernels: admitted, sandboxed, fed with frames while they arrive, their products stored.

Upstream: ``ingest`` (frames that lie in shared memory, stored bodies, the catalogue), through ``ingest.ports`` only.
Downstream: products as objects of the same bucket, feedback events to the control process.

- engine: contract, gate, zygote and forkserver, child and lockdown, process and sandbox (one process, one batch);
- host: formats and attach (what runs where), scheduler (pure), lane and pool (sandboxes shared by streams), passes and
  reduction (one kernel, all kernels of a version), product, feedback, host.

What always holds: a kernel's code runs in a locked-down process and nowhere else; whatever a kernel does costs its own
product, never a raw frame and never another stream; every frame is judged exactly once in the state of a product.
"""
