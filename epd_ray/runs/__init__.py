"""What the commands do: training with its stages, distilling, sampling, fetching weights, dry runs and reports."""
