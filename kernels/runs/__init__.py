"""Runs: many objects under one key prefix, one product.

Upstream: the kernel host (live frames and stored versions of one frame each) and the catalogue, which knows every partial
and its members. Downstream: partials at ``_products/<kernel>/<run>.partials/``, the product ``_products/<kernel>/<run>_run.nxs``.

- ``gather``: objects of one frame go into a batch's state; a batch becomes one partial about once a second.
- ``partial``: what a partial holds, as bytes and back; the product of an object with more frames is a partial, too.
- ``merge``: the exact merge of a run's partials. Pure.
- ``keeper``: the one worker that owns a run keeps its product up to date, compacts partials, closes runs that idle.

What always holds: a version's frames count once (the catalogue decides, in commit order); what is merged is what is stored.
"""
