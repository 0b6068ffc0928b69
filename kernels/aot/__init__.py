"""Ahead-of-time compilation: what is shipped, and what must hold of its machine code."""
