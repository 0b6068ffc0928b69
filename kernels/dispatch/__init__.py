"""Which path runs a layer: measured constants, the cost model over them, and the table of its choices."""
