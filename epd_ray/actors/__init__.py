"""The Ray wing: starting or joining a cluster, pools of actors that draw and score, and the path of a task."""
