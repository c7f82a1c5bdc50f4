"""The Python interface, whose functions are also names of the package: see ``functions.py``."""
