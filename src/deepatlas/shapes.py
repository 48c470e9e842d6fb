"""Names of tensors and frames, used in every annotation.

Four frames, never guessed from a shape, always in the name of a variable:

=======  ==========================================  =====================================
frame    what                                        where it stands
=======  ==========================================  =====================================
voxel    array index (i, j, k) of the exam as read   input and output files
mm       patient space, RAS+                         every point or box a user sees
box      -1 ... +1, corner to corner                 over the prepared grid, in the network
atlas    -1 ... +1 in the learned template space     what the network predicts
=======  ==========================================  =====================================

Axes run ``batch channel i j k``; channel ``a`` of a coordinate field belongs to array axis ``a``.
"""

from jaxtyping import Bool, Float
from torch import Tensor

Image = Float[Tensor, "batch 1 i j k"]
"""Intensities, 0 ... 1 after clipping to the window of the preparation."""

Features = Float[Tensor, "batch channel i j k"]
"""Any dense feature map."""

Coordinates = Float[Tensor, "batch 3 i j k"]
"""A point per voxel, in the frame the variable's name tells."""

Points = Float[Tensor, "batch 3 point"]
"""A list of points per exam, in the frame the variable's name tells."""

Mask = Bool[Tensor, "batch 1 i j k"]
"""Where a voxel counts."""

Affine = Float[Tensor, "batch 4 4"]
"""Homogeneous maps, applied to column vectors."""
