"""Many requests for one engine: batches from a manifest, in files that a killed run goes on with."""
