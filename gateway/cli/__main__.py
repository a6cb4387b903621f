"""``python -m gateway.cli``: the same as the ``hiss`` command."""

from gateway.cli import main

main()
