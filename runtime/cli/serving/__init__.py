"""Commands over `runtime/serve/`."""
