"""Post-training INT8 of a bundle's networks: `stepforge quantize`."""
