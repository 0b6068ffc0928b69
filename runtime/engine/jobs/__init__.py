"""What is kept of requests beside their work: futures (future.py), the way into the queue (intake.py), deadlines, counts; and
what is left of them behind a fork."""
