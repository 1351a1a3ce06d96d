"""Where each logical axis lies on the mesh (data, fsdp, tensor); shared by all configs."""

import ml_collections


def mesh(data: int, fsdp: int, tensor: int) -> ml_collections.ConfigDict:
    """The section `mesh`; one size may be -1, for all devices that are left."""
    c = ml_collections.ConfigDict()
    c.data, c.fsdp, c.tensor = data, fsdp, tensor
    c.rules = ml_collections.ConfigDict()
    # Activations.
    c.rules.batch = ("data", "fsdp")
    c.rules.seq = ()
    c.rules.residual = (
        "tensor",
    )  # The stream between layers, kept for the backward pass.
    # Weights; heads, kv_heads and mlp also of activations.
    c.rules.layers = ()  # The axis that the scan over layers walks.
    c.rules.embed = ("fsdp",)
    c.rules.vocab = ("tensor",)
    c.rules.heads = ("tensor",)
    c.rules.kv_heads = ("tensor",)
    c.rules.mlp = ("tensor",)
    c.rules.head_dim = ()
    c.rules.norm = ()
    return c
