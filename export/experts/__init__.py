"""Further denoisers of a model into its bundle: `read.py` examines them, `write.py` exports them."""
