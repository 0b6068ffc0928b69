"""What is kept of requests beside their work: futures (future.py), deadlines (deadlines.py) and counts (statistics.py)."""
