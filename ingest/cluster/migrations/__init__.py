"""Alembic's script folder for the engine of a cluster: one file in ``versions`` for each step, shipped with the program."""
