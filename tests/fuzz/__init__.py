"""Fuzzing of everything that reads a stranger's bytes: heads, chunk framings, chunk signatures, documents, whole requests.

``targets`` are functions of one ``bytes`` that raise when a promise is broken; ``python -m tests.fuzz`` drives one of them with
atheris (guided by coverage), or with random mutations where there is none. `make fuzz` runs all of them for an hour.
"""
