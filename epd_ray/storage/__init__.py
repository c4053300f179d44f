"""Runs on disk and on remote filesystems: where each file lies, complete writes, locks, checkpoints and rollouts."""
