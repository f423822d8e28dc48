"""State that does not depend on the TP size."""

from .unsharded import load_unsharded_state_dict, unsharded_gradients, unsharded_state_dict

__all__ = ["load_unsharded_state_dict", "unsharded_gradients", "unsharded_state_dict"]
