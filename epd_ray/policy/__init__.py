"""The policy over solver tables: its distribution, network and loss, and searches without gradients. It uses no Ray."""
