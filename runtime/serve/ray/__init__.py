"""Ray: workers for batches (`pool.py`, `worker.py`) and Ray Serve's deployment (`deployment.py`), whose builder is `app`."""

from stepforge.runtime.serve.ray.deployment import Options, app

__all__ = ["Options", "app"]
