"""The parts that need Ray: joining or starting a cluster, rollout and reward actors, and the tasks they are given."""
