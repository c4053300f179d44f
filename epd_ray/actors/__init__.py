"""The Ray wing: joining or starting a cluster, pools of rollout and reward actors, and the way of a task through them."""
