"""What a run reports while it works: progress on stderr, metrics for Prometheus, memory, machine and commands used."""
