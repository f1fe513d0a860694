"""Access to torch that costs nothing until a tensor is really there.

Importing torch takes seconds, and a state without tensors must save where torch is not installed. So this
package never imports torch at module level: saving looks at what the process has already imported (a tensor
cannot exist before its library does), and only loading a tensor imports it.
"""

from __future__ import annotations

import sys
from types import ModuleType

from castore.errors import MissingExtraError


def loaded_torch() -> ModuleType | None:
    """The torch module if this process has imported it, else None."""
    torch = sys.modules.get("torch")
    # Another thread may be in the middle of the import: then no tensor of this state exists yet either.
    return torch if torch is not None and hasattr(torch, "Tensor") and hasattr(torch, "nn") else None


def require_torch(why: str) -> ModuleType:
    """The torch module, imported now if need be. Raises MissingExtraError, which says what needed it."""
    try:
        import torch  # asked for with every leaf, and as a statement it costs next to nothing
    except ImportError as error:
        raise MissingExtraError(f"{why} needs torch, which is not installed: pip install torch") from error
    return torch


def is_torch_tensor(value: object) -> bool:
    """Whether the value is a torch tensor, of any subclass."""
    torch = loaded_torch()
    return torch is not None and isinstance(value, torch.Tensor)
