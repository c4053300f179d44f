"""Suites: a model's samplers measured on many pictures, set beside each other and beside what the papers say."""
