"""Which of two solvers' pictures people prefer: a blind page, what is saved of it, what came of it."""
