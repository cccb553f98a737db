"""How the verbs are wired: each pipeline is build(root, ...) -> outputs."""
