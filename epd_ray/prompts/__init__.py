"""Prompts of a run: read from files, built in, or captions of scenes, and split for training, validation and test."""
