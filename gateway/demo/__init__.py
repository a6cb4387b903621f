"""The demonstration: real frames through a whole node, in one command (``hiss demo``).

Upstream: gateway/cli/demo.py. Downstream: a node of its own (``hiss serve`` in a process), spoken to over its three
ports like any instrument would. What always holds: nothing is shown that was not measured in this run, resampled or
synthetic data are called so, and no process is left behind, however the demonstration ends.

frames.py makes the data, stream.py sends it (in a process of its own), node.py runs and asks the node, feedback.py
follows what the kernel says, product.py reads and draws the reduction, story.py tells it all in order.
"""
