"""Alembic's script folder: one file in ``versions`` for each step of the schema, shipped with the program."""
