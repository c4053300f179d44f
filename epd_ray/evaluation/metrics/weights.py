"""A checksum that identifies a network's weights, whatever file they came from."""

import hashlib

import torch


def weights_checksum(network: torch.nn.Module) -> str:
    """Compute a checksum of a network's weights and their names, of 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
