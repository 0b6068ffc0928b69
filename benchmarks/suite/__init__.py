"""The suite behind `make bench` and `make bench-quick`: arrows go bench -> report -> items -> runners -> models -> cases.

A *workload* is one image as everybody draws it; a *case* is an item, a model and a runner, measured in a process of its own;
a *record* is what a case measured, kept by commit so that a run that was cut off goes on.
"""
