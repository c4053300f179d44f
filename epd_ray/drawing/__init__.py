"""Drawing pictures: samplers by name, and the worker that answers a rollout actor's jobs. It uses no Ray."""
