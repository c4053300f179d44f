"""Two tiny models that ship with the package, `shapes` (text to image) and `shapes-clip` (its CLIP model), the scenes
that they were trained on, and a judge that checks pictures of such scenes without a network."""
