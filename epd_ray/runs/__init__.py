"""The work behind the commands: training, stage 1, sampling, evaluation, dry runs, reports and fetched weights."""
