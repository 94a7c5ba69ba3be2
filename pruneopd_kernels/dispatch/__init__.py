"""From the declarations in `ops` to `torch.ops.pruneopd`: registration, the choice of an implementation, its library.

torch is imported here, before any module of this package. Its import may end in a call of `pruneopd_autoload`, which
imports `registration` and with it all the others: none of them can be half imported at that time.
"""

import torch  # noqa: F401
