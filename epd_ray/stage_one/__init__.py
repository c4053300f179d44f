"""Stage 1, distillation: fit a solver table to a finer solver, by least squares or by gradient, before RDPO starts."""
