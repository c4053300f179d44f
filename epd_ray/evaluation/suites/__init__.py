"""Suites: several solvers draw many pictures on one model, and their scores are set beside each other and the papers'.

A suite (`epd-ray evaluate --suite`) works in shards of pictures that are kept as they finish, so that an
interrupted suite goes on where it stopped.
"""
