"""A trained solver in other tools: in diffusers pipelines, and in files of other formats."""
