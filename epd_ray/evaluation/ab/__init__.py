"""Side-by-side tests: a page on which people judge pairs of pictures without knowing which solver drew which."""
